"""Fine-tuning by reinforcement: a model answers each item several times, a grader says what each answer is worth, trl's GRPO learns.

Every update draws from a seed of its own number, and its learning rate follows from that number, so nothing but the weights and AdamW's
moments has to be kept. They are after every update: a training that was broken off goes on from the last update that was whole, and
the updates after it are made again with the same answers, rewards, losses and weights, on the same machine with as many threads. What is
inside an update (answers that were written, a backward pass) is lost, and a grader that is a remote model may grade otherwise.

Source:  Shao et al. 2024, "DeepSeekMath", https://arxiv.org/abs/2402.03300; trl's GRPOTrainer
"""

import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from saddlepoint.errors import MissingExtraError, TrainingError, UsageError
from saddlepoint.finetuning import checkpoints, counts, grader_types
from saddlepoint.finetuning.checkpoints import State
from saddlepoint.finetuning.data import Record
from saddlepoint.finetuning.graders import OF_THE_ANSWER, grade
from saddlepoint.finetuning.learner import going_on
from saddlepoint.finetuning.plan import ALPHA, RANK, Event, Result, Saved, Spec, Step
from saddlepoint.finetuning.train import Stopped, _csv, never
from saddlepoint.reinforcement import UNWEIGHED, settings
from saddlepoint.targets import open_target, trained_on
from saddlepoint.targets.hf import HF
from saddlepoint.training import _write, based
from saddlepoint.types import Chat, Completion, Query, Sampling, Shaping, Target

LR = 5e-4  # of a LoRA at its peak; linear to 0
BETA = 0.02  # weight of the KL penalty to the model that the training began with
EACH = 4  # answers to an item: each is compared with the others
MAX_TOKENS = 64  # of an answer


def train(
    spec: Spec,
    training: Sequence[Record],
    validation: Sequence[Record],
    folder: Path,
    tell: Callable[[Event], None] = lambda _: None,
    stop: Callable[[], bool] = never,
) -> Result | None:
    """As `finetuning.train.train`, for the method reinforcement: `train_loss` is trl's, `train_accuracy` the mean reward of an update.

    An epoch is cut into updates of `spec.batch` items; its last one is filled up from its beginning. At the end of each epoch the
    validation items are answered greedily, and their mean reward is `full_valid_accuracy`; there is no loss of those.

    Args:
        stop: Asked before every forward pass. What is done of an update is then lost.

    Raises:
        TrainingError: An item lacks a field that the grader names, a reward of no answer can be had, weights that are no numbers.
        UsageError: No items, or a grader that cannot be had.
        MissingExtraError: trl is not installed.
    """
    grader = grader_types.read(spec.grader)
    if not training:
        raise UsageError("there is nothing to train on: no items were given; give at least one")
    for part, where in ((training, ""), (validation, " of the validation examples")):
        for record in part:
            if field := grader_types.missing(grader, record.item):
                raise TrainingError(f"line {record.line}{where}: there is no {field}, which the grader names; add it to every line")
    read = [[(r.chat, dict(r.item)) for r in part] for part in (training, validation)]
    run = hashlib.sha256(repr((spec, read)).encode()).hexdigest()
    checkpoints.sweep(folder)
    model = HF.load(spec.base)
    began = checkpoints.load(folder / "state", run, model.device)
    lengths = [len(model.prompt_ids(r.chat)) for r in training]
    if began is None:
        for note in counts.told(training, [[length] for length in lengths], [0] * len(lengths), model.context, spec.epochs):
            tell(note)
    each = math.ceil(len(training) / spec.batch)
    learning = _Learning(spec, grader, model, training, validation, folder, run, each, tell, stop, began, began.told if began else [])
    if len(learning.told) < each * spec.epochs:
        try:
            learning.go()
        except Stopped:  # the state of the last whole update is kept already
            return None
    steps = learning.told
    return Result(sum(lengths) * EACH * spec.epochs, len(steps), _csv(steps), folder / f"checkpoint-{len(steps)}")


@dataclass(eq=False)
class _Learning(TrainerCallback):  # type: ignore[misc]  # trl's way to hear of each update
    """One training under way.

    Args:
        run: Names it in its state.
        each: Updates of an epoch.
        began: What it goes on from.
        told: The updates that are done.
    """

    spec: Spec
    grader: grader_types.Grader
    model: HF
    training: Sequence[Record]
    validation: Sequence[Record]
    folder: Path
    run: str
    each: int
    tell: Callable[[Event], None]
    stop: Callable[[], bool]
    began: State | None
    told: list[Step]
    trainer: Any = None

    def go(self) -> None:
        """Make the updates that are left."""
        done, steps = len(self.told), self.each * self.spec.epochs
        items = [i for epoch in range(self.spec.epochs) for i in self._order(epoch)][done * self.spec.batch :]
        hook = self.model.model.base_model.register_forward_pre_hook(self._look)
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = self._trainer(items, steps - done, scratch)
            try:
                self.trainer.train()
            finally:
                hook.remove()

    def _order(self, epoch: int) -> list[int]:
        n = len(self.training)
        order = Random(f"{self.spec.seed}:{epoch}").sample(range(n), n)
        return [order[i % n] for i in range(self.each * self.spec.batch)]

    def _trainer(self, items: list[int], steps: int, scratch: str) -> Any:
        try:
            from datasets import Dataset
            from trl import GRPOConfig, GRPOTrainer
        except ModuleNotFoundError as missing:
            raise MissingExtraError(f"reinforcement learning needs {missing.name}: pip install 'saddlepoint[train]'") from missing
        first = self.model.tokenizer("")["input_ids"]  # what the tokenizer writes before any text the template has written already
        bos = self.model.tokenizer.decode(first) if first else ""
        rows = [{"prompt": self.model.render(self.training[i].chat).removeprefix(bos), "place": i} for i in items]
        made = settings(self.model, self.spec.batch, EACH, steps, MAX_TOKENS, LR, 1.0, self.spec.seed)
        adapter: dict[str, Any] = {"peft_config": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")}
        start: Any = self.model.model
        if self.spec.start:
            start, adapter = PeftModel.from_pretrained(start, going_on(self.spec.start), is_trainable=True), {}
        trainer = GRPOTrainer(
            start,
            self._rewards,
            GRPOConfig(output_dir=scratch, beta=max(BETA, UNWEIGHED), **{**made, "lr_scheduler_type": "constant"}),
            Dataset.from_list(rows),
            processing_class=self.model.tokenizer,
            callbacks=[self],
            **adapter,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    # ---- what an answer is worth

    def _rewards(self, completions: list[str], place: list[int], **_: Any) -> list[float | None]:
        found = [self._worth(self.training[i], text) for i, text in zip(place, completions, strict=True)]
        if all(worth is None for worth in found):
            raise TrainingError("the grader could grade no answer of an update; run it on a sample: POST /v1/fine_tuning/alpha/graders/run")
        return found

    def _worth(self, record: Record, text: str) -> float | None:
        """The reward; None where the grader failed, not the answer."""
        graded = grade(self.grader, text, record.item, self._ask)
        return None if graded.errors.keys() - OF_THE_ANSWER else graded.reward

    def _ask(self, name: str, chat: Chat, sampling: Sampling, shape: Mapping[str, Any]) -> Completion:
        query = Query(chat, sampling, shaping=Shaping(grammar=json.dumps(shape)))
        if name != self.spec.base:
            return _opened(name).generate([query])[0]
        with self.trainer.model.disable_adapter():  # the base grades with the weights that are here
            return self.model.generate([query])[0]

    # ---- the updates

    def _look(self, *_: Any) -> None:
        if self.stop():
            raise Stopped

    def _learned(self) -> list[tuple[Any, dict[str, Any]]]:
        """The weights that are trained, each with its moments."""
        optimizer = self.trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return [(p, optimizer.state[p]) for name, p in self.trainer.model.named_parameters() if p.requires_grad and ".ref." not in name]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.began is None:
            return
        at = 0
        with torch.no_grad():
            for p, moments in self._learned():
                own = slice(at, at := at + p.numel())
                p.copy_(self.began.weights[own].view_as(p))
                moments["step"] = torch.tensor(float(self.began.step))
                moments["exp_avg"] = self.began.first[own].view_as(p).to(p.dtype)
                moments["exp_avg_sq"] = self.began.second[own].view_as(p).to(p.dtype)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look()
        steps, at = self.each * self.spec.epochs, len(self.told)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = LR * self.spec.lr_multiplier * (1 - at / steps)
        set_seed(int.from_bytes(hashlib.sha256(f"{self.spec.seed}:{at}".encode()).digest()[:4]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """An update is done: its numbers, its state, and at an epoch's end a checkpoint."""
        if "reward" not in logs:
            return
        if not all(torch.isfinite(p).all() for p, _ in self._learned()):
            raise TrainingError(f"the weights are not numbers after {len(self.told) + 1} updates; lower the learning rate multiplier")
        at = len(self.told) + 1
        ended = at % self.each == 0
        valid = self._validated() if ended and self.validation else None
        step = Step(at, self.each * self.spec.epochs, float(logs["loss"]), float(logs["reward"]), full_valid_accuracy=valid)
        self.told.append(step)
        self.tell(step)
        if ended:
            self.tell(Saved(at, self._checkpoint(step), step))
        learned = self._learned()
        weights = torch.cat([p.detach().float().flatten() for p, _ in learned])
        first, second = (torch.cat([m[name].float().flatten() for _, m in learned]) for name in ("exp_avg", "exp_avg_sq"))
        checkpoints.save(State(weights, first, second, at, self.told), self.folder / "state", self.run)

    def _validated(self) -> float | None:
        """The mean reward of greedy answers to the validation items; None where none could be graded."""
        self.model.forget()
        self.model.model.eval()
        answers = self.model.generate([Query(record.chat, Sampling(MAX_TOKENS)) for record in self.validation])
        worth = [self._worth(r, a.text) for r, a in zip(self.validation, answers, strict=True)]
        self.model.model.train()
        there = [w for w in worth if w is not None]
        return sum(there) / len(there) if there else None

    def _checkpoint(self, step: Step) -> Path:
        out = self.folder / f"checkpoint-{step.step}"
        seen = sorted(trained_on(self.spec.start or self.spec.base))
        _write(self.trainer.model, out, {"name": out.name, "base": based(self.spec.base, out), "step": step.step, "trained_on": seen})
        shutil.rmtree(out / "ref", ignore_errors=True)  # trl's copy of the adapter that was gone on from
        checkpoints.keep_last(self.folder)
        return out


@cache
def _opened(name: str) -> Target:
    return open_target(name)
