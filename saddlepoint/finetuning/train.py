"""Train on a user's own examples so that nothing is lost: any moment may be the last, and the next call goes on as if none had been.

A step is computed in parts of a pass each; between two of them `stop` is asked. Everything that decides what follows is a function of
the settings, the examples and a `State`: the order of an epoch is drawn from the seed and its number, and nothing else is drawn. So a
training that was broken off anywhere and gone on with has the losses and, bit for bit, the weights of one that was not, on the same
machine with as many threads.

Losses: cross-entropy of the trained tokens, mean over those of a batch; with `Spec.constraint` the one of
`first_token.first_token_constraint`; of dpo the one of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, against the model that the
training began with.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from saddlepoint.errors import TrainingError, UsageError
from saddlepoint.finetuning import checkpoints
from saddlepoint.finetuning.checkpoints import State
from saddlepoint.finetuning.first_token import faded
from saddlepoint.finetuning.fused import fuse
from saddlepoint.finetuning.masks import context, encoded
from saddlepoint.finetuning.packed import losses, packs, parts
from saddlepoint.finetuning.plan import Event, Note, Result, Saved, Spec, Step, resolved
from saddlepoint.targets.hf import HF
from saddlepoint.training import Encoded, _rate, _write, based

if TYPE_CHECKING:
    from saddlepoint.finetuning.data import Record

__all__ = ["Event", "Note", "Result", "Saved", "Spec", "Step", "resolved", "train"]

RANK, ALPHA = 16, 32
LR = {"supervised": 4e-4, "dpo": 1e-4}  # of a LoRA at its peak
FULL = 0.05  # times that of a LoRA where every weight is trained
T = TypeVar("T")
KEPT = 3  # checkpoints
EVERY = 5.0  # seconds between two states; more where writing one takes more than a twentieth of that


def never() -> bool:
    return False


class _Stopped(Exception):
    """The training was told to stop."""


@dataclass
class Learner:
    """A model that learns.

    Args:
        wrapped: The peft model around it; None where every weight is trained.
        working: The weights that are multiplied, in the model's dtype; AdamW works on float32 masters, because a small step is lost
            in bfloat16.
        began: Copies of them as the training began; made where a loss asks the model as it was.
        streams: How many parts are computed side by side: on a processor two cores do more with a part each than with one together.
    """

    model: HF
    wrapped: Any
    working: list[Tensor]
    began: list[Tensor]
    streams: int

    @torch.no_grad()
    def take(self, weights: Tensor) -> None:
        """Work with these masters, float32 (parameters,)."""
        for p, own in zip(self.working, torch.split(weights, [p.numel() for p in self.working]), strict=True):
            p.copy_(own.view_as(p))

    @contextmanager
    def as_it_began(self, weights: Tensor) -> Iterator[None]:
        """While it is open, the model is the one that the training began with; `weights` are the masters of afterwards."""
        with torch.no_grad():
            for p, first in zip(self.working, self.began, strict=True):
                p.copy_(first)
        try:
            yield
        finally:
            self.take(weights)

    def side_by_side(self, jobs: Sequence[Callable[[], T]], check: Callable[[], None]) -> Iterator[T]:
        """What the jobs give, in order; before each is begun, and ten times a second while they are waited for, `check` may end it all."""
        if self.streams == 1 or len(jobs) == 1:
            for job in jobs:
                check()
                yield job()
            return
        each = max(1, torch.get_num_threads() // self.streams)
        with ThreadPoolExecutor(self.streams, initializer=lambda: torch.set_num_threads(each)) as pool:
            waiting = [pool.submit(job) for job in jobs]
            try:
                for future in waiting:
                    check()
                    while not wait([future], 0.1).done:
                        check()
                    yield future.result()
            finally:
                for future in waiting:
                    future.cancel()


def train(
    spec: Spec,
    training: "Sequence[Record]",
    validation: "Sequence[Record]",
    folder: Path,
    tell: Callable[[Event], None] = lambda _: None,
    stop: Callable[[], bool] = never,
) -> Result | None:
    """Train, or go on with a training that was broken off: with the same arguments it goes on from `folder/state`.

    At the end of each epoch a checkpoint is written to `folder/checkpoint-STEP`; the last three are kept. Steps after the last saved
    state are told again, with the same numbers.

    Args:
        validation: May be empty. After each step a batch of them is measured, in turn; at the end of each epoch all of them.
        stop: Asked between the parts of a step; at most a second or two of work lie between, unless one example is longer. True saves
            the state and ends the call with None.

    Raises:
        TrainingError: An example without a token to train on (its line is named), a loss that is not a number, or a folder that
            holds another training.
        UsageError: No examples, or an adapter that is none of this base.
        ModelError: The base cannot be loaded.
    """
    if spec.method not in LR:
        raise UsageError(f"this engine trains {' and '.join(LR)}; got method '{spec.method}'")
    if not training:
        raise UsageError("there is nothing to train on: no examples were given; give at least one")
    model = HF.load(spec.base)
    lessons = [encoded(model, r) for r in training]
    try:
        checks = [encoded(model, r) for r in validation]
    except TrainingError as wrong:
        raise TrainingError(str(wrong).replace(":", " of the validation examples:", 1)) from wrong
    run = hashlib.sha256(json.dumps([repr(spec), [[_key(e) for e in part] for part in (lessons, checks)]]).encode()).hexdigest()
    for left in folder.glob(".partial-*"):  # a checkpoint that was being written when the process was killed
        shutil.rmtree(left)
    learner = _learner(model, spec)
    state = checkpoints.load(folder / "state", run, model.device)
    if state is None:
        weights = torch.cat([p.detach().float().flatten() for p in learner.working])
        state = State(weights, torch.zeros_like(weights), torch.zeros_like(weights))
        cut = sum(max(len(e.ids), len(e.rejected.ids) if e.rejected else 0) >= context(model) for e in lessons)
        if cut:
            tell(Note(f"{cut} of {len(lessons)} examples fill the context of {context(model)} tokens; what lies beyond is cut off"))
    saved, cost = time.monotonic(), 0.0

    def save() -> None:
        nonlocal saved, cost
        began = time.monotonic()
        checkpoints.save(state, folder / "state", run)
        saved, cost = time.monotonic(), time.monotonic() - began

    try:
        for step in _steps(spec, learner, lessons, checks, state, _checked(stop)):
            tell(step)
            if step.step % math.ceil(len(lessons) / spec.batch) == 0:
                tell(Saved(step.step, _checkpoint(spec, learner, folder, step), step))
                save()
            elif time.monotonic() - saved > max(EVERY, 20 * cost):
                save()
    except _Stopped:
        save()
        return None
    tokens = sum(len(e.ids) + (len(e.rejected.ids) if e.rejected else 0) for e in lessons) * spec.epochs
    return Result(tokens, state.step, _csv(state.told), folder / f"checkpoint-{state.step}")


def _key(e: Encoded) -> list[Any]:
    return [e.ids, e.learned, e.rejected and _key(e.rejected)]


def _checked(stop: Callable[[], bool]) -> Callable[[], None]:
    def check() -> None:
        if stop():
            raise _Stopped

    return check


def _learner(model: HF, spec: Spec) -> Learner:
    """The model with a new adapter, with the one to go on from, or with every weight free."""
    wrapped: Any = None
    if spec.full and spec.start:
        raise UsageError("full training goes on from a model, not from an adapter; give the model as base, or train a LoRA")
    if spec.full:
        model.model.requires_grad_(True)
    elif spec.start:
        if not (Path(spec.start) / "adapter_model.safetensors").is_file():  # peft would go on to unpickle a .bin, or ask the hub
            raise UsageError(f"{spec.start} holds no adapter_model.safetensors, so it is no adapter to go on from")
        try:
            wrapped = PeftModel.from_pretrained(model.model, spec.start, is_trainable=True, autocast_adapter_dtype=False)
        except (RuntimeError, ValueError) as wrong:
            raise UsageError(f"the adapter {spec.start} does not fit '{spec.base}': {str(wrong).splitlines()[0]}") from wrong
    else:
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            how = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            wrapped = get_peft_model(model.model, how, autocast_adapter_dtype=False)
    model.model.eval()  # no dropout: nothing is drawn
    packs(model)
    if wrapped is not None:
        fuse(wrapped)
    working = [p for p in (wrapped or model.model).parameters() if p.requires_grad]
    asks = spec.constraint or spec.method == "dpo"
    streams = min(8, torch.get_num_threads()) if model.device.type == "cpu" else 1
    return Learner(model, wrapped, working, [p.detach().clone() for p in working] if asks else [], streams)


def _steps(
    spec: Spec, learner: Learner, lessons: list[Encoded], checks: list[Encoded], state: State, check: Callable[[], None]
) -> Iterator[Step]:
    """Make the steps that `state` still has before it, and yield each. Between two of them the state is that of this moment.

    Raises:
        _Stopped: By `check`; the state is then one to go on from.
    """
    each = math.ceil(len(lessons) / spec.batch)
    steps = each * spec.epochs
    peak = LR[spec.method] * spec.lr_multiplier * (FULL if spec.full else 1.0)
    optimizer = _optimizer(state)
    learner.take(state.weights)
    while state.pending or state.step < steps:
        check()
        if state.pending is None:
            epoch, at = divmod(state.step, each)
            batch = [lessons[i] for i in order(spec, epoch, len(lessons))[at * spec.batch : (at + 1) * spec.batch]]
            gradient, loss, accuracy = _gradient(spec, learner, batch, state.weights, check)
            length = gradient.norm()
            if not (math.isfinite(loss) and torch.isfinite(length)):
                raise TrainingError(f"the loss is not a number at step {state.step + 1} of {steps}; lower the learning rate multiplier")
            state.weights.grad = gradient.mul_(min(1.0, 1.0 / (float(length) + 1e-6)))
            optimizer.param_groups[0]["lr"] = peak * _rate(state.step, steps)
            optimizer.step()
            state.weights.grad = None
            learner.take(state.weights)
            state.step, state.pending = state.step + 1, (loss, accuracy)
        at = (state.step - 1) * spec.batch
        some = [checks[(at + i) % len(checks)] for i in range(min(spec.batch, len(checks)))]
        measured = [
            _measured(spec, learner, these, state.weights, check) for these in ((some, checks) if state.step % each == 0 else (some,))
        ]
        numbers = [x for pair in measured for x in pair] if checks else []
        state.told.append(Step(state.step, steps, *state.pending, *numbers))
        state.pending = None
        yield state.told[-1]


def order(spec: Spec, epoch: int, n: int) -> list[int]:
    """In which order an epoch, from 0, takes the n examples."""
    return Random(f"{spec.seed}:{epoch}").sample(range(n), n)


def _optimizer(state: State) -> torch.optim.AdamW:
    """AdamW over the masters, with the moments and the count of `state`; it changes them in place."""
    made = torch.optim.AdamW([state.weights], lr=0.0, weight_decay=0.0, fused=True)
    count = torch.tensor(float(state.step), dtype=torch.float32, device=state.weights.device)
    made.state[state.weights] = {"step": count, "exp_avg": state.first, "exp_avg_sq": state.second}
    return made


def _gradient(
    spec: Spec, learner: Learner, batch: list[Encoded], weights: Tensor, check: Callable[[], None]
) -> tuple[Tensor, float, float]:
    """float32 (parameters,), the gradient of a batch's mean loss; that loss, and its accuracy."""
    n = _units(spec, batch)

    def compute(part: list[Encoded], frozen: Tensor | None) -> tuple[list[Tensor | None], float, int]:
        aim, told, hits = _losses(spec, learner.model, part, frozen)
        return list(torch.autograd.grad(aim / n, learner.working, allow_unused=True)), float(told), int(hits)

    gradient, loss, right = torch.zeros_like(weights), 0.0, 0
    sizes = [p.numel() for p in learner.working]
    for made, told, hits in _each(spec, learner, batch, weights, compute, check, spec.constraint or spec.method == "dpo"):
        for own, g in zip(torch.split(gradient, sizes), made, strict=True):
            if g is not None:
                own.add_(g.flatten())
        loss, right = loss + told, right + hits
    return gradient, loss / n, right / n


def _measured(spec: Spec, learner: Learner, batch: list[Encoded], weights: Tensor, check: Callable[[], None]) -> tuple[float, float]:
    """Mean loss and accuracy of examples that are not trained on."""

    @torch.no_grad()
    def compute(part: list[Encoded], frozen: Tensor | None) -> tuple[float, int]:
        _, told, hits = _losses(spec, learner.model, part, frozen)
        return float(told), int(hits)

    found = list(_each(spec, learner, batch, weights, compute, check, spec.method == "dpo"))
    n = max(1, _units(spec, batch))
    return sum(told for told, _ in found) / n, sum(hits for _, hits in found) / n


def _each(
    spec: Spec,
    learner: Learner,
    batch: list[Encoded],
    weights: Tensor,
    compute: Callable[[list[Encoded], Tensor | None], T],
    check: Callable[[], None],
    reference: bool,
) -> Iterator[T]:
    """What `compute` makes of each part of a batch, in order, and, if wanted, of what the model that the training began with made of it."""
    cut = parts(batch, learner.streams)
    frozen: list[Tensor | None] = [None] * len(cut)
    if reference:

        @torch.no_grad()
        def before(part: list[Encoded]) -> Tensor:
            return losses(learner.model, _answers(part))[0]

        with learner.as_it_began(weights):
            frozen = list(learner.side_by_side([partial(before, part) for part in cut], check))
    yield from learner.side_by_side([partial(compute, part, own) for part, own in zip(cut, frozen, strict=True)], check)


def _answers(part: list[Encoded]) -> list[Encoded]:
    """The answers of a part, then those that are not to be given."""
    return [*part, *(e.rejected for e in part if e.rejected)]


def _units(spec: Spec, batch: list[Encoded]) -> int:
    """What a loss is the mean over: trained tokens, or pairs."""
    return len(batch) if spec.method == "dpo" else sum(token != -100 for e in batch for token in e.learned)


def _losses(spec: Spec, model: HF, part: list[Encoded], frozen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the units of a part: what is minimized, the loss that is told, and how many were right.

    Args:
        frozen: float32 (trained,): the negative log-likelihoods of all its answers by the model that the training began with.
    """
    nll, hits = losses(model, _answers(part))
    if spec.method == "dpo":
        assert frozen is not None
        ratio = torch.split(frozen - nll, [sum(token != -100 for token in e.learned) for e in _answers(part)])
        chosen, rejected = torch.stack([own.sum() for own in ratio]).chunk(2)
        aim = -F.logsigmoid(spec.beta * (chosen - rejected)).sum()
        return aim, aim.detach(), (chosen > rejected).sum()
    aim = nll if frozen is None else faded(nll, frozen, part)
    return aim.sum(), nll.detach().sum(), hits.sum()


def _checkpoint(spec: Spec, learner: Learner, folder: Path, step: Step) -> Path:
    """Write what was learned so far, whole or not at all, and drop all but the last checkpoints."""
    out = folder / f"checkpoint-{step.step}"
    card = {
        "name": out.name,
        "base": based(spec.base, out),
        "training": {k: v for k, v in asdict(spec).items() if k not in ("base", "start")},
        "step": step.step,
        "metrics": asdict(step),
        "trained_on": [],  # behaviors of a policy: a user's own examples name none
    }
    if learner.wrapped is not None:
        _write(learner.wrapped, out, card)
    else:
        unfinished = folder / f".partial-{out.name}"
        learner.model.model.save_pretrained(unfinished)
        learner.model.tokenizer.save_pretrained(unfinished)
        (unfinished / "training.json").write_text(
            json.dumps(card, indent=1) + "\n", encoding="utf-8"
        )  # a card.json would make it an adapter
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    kept = sorted(folder.glob("checkpoint-*"), key=lambda place: int(place.name.rpartition("-")[2]))
    for old in kept[:-KEPT]:
        shutil.rmtree(old)
    return out


def _csv(steps: Sequence[Step]) -> str:
    """The result file."""
    rows = [(s.step, s.train_loss, s.train_accuracy, s.valid_loss, s.valid_accuracy) for s in steps]
    lines = [",".join("" if x is None else str(x) if isinstance(x, int) else f"{x:.5f}" for x in row) for row in rows]
    return "\n".join(["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", *lines]) + "\n"
