"""Train on a user's own examples so that nothing is lost: any moment may be the last, and the next call goes on as if none had been.

A step is computed in parts of a pass each; between two of them `stop` is asked. Everything that decides what follows is a function of
the settings, the examples and a `State`: the order of an epoch is drawn from the seed and its number, and nothing else is drawn. So a
training that was broken off anywhere and gone on with has the losses and, bit for bit, the weights of one that was not, on the same
machine with as many threads.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from saddlepoint.errors import TrainingError, UsageError
from saddlepoint.finetuning import checkpoints, counts
from saddlepoint.finetuning.checkpoints import State
from saddlepoint.finetuning.learner import Learner, learner
from saddlepoint.finetuning.masks import encoded
from saddlepoint.finetuning.objectives import gradient, measured
from saddlepoint.finetuning.plan import ALPHA, RANK, Event, Note, Result, Saved, Spec, Step, resolved
from saddlepoint.models import WHOLE
from saddlepoint.targets import trained_on
from saddlepoint.targets.hf import HF
from saddlepoint.training import Encoded, _rate, _write, based

if TYPE_CHECKING:
    from saddlepoint.finetuning.data import Record

__all__ = ["ALPHA", "RANK", "Event", "Note", "Result", "Saved", "Spec", "Step", "resolved", "train"]

LR = {"supervised": 4e-4, "dpo": 1e-4}  # of a LoRA at its peak
FULL = 0.05  # times that of a LoRA where every weight is trained
EVERY = 5.0  # seconds between two states; more where writing one takes more than a twentieth of that


def never() -> bool:
    return False


class Stopped(Exception):
    """The training was told to stop."""


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
    lessons, checks = _lessons(model, training, ""), _lessons(model, validation, " of the validation examples")
    run = hashlib.sha256(json.dumps([repr(spec), [[_key(e) for e in part] for part in (lessons, checks)]]).encode()).hexdigest()
    checkpoints.sweep(folder)
    pupil = learner(model, spec)
    state = checkpoints.load(folder / "state", run, model.device)
    if state is None:
        weights = torch.cat([p.detach().float().flatten() for p in pupil.working])
        state = State(weights, torch.zeros_like(weights), torch.zeros_like(weights))
        for records, read, epochs in ((training, lessons, spec.epochs), (validation, checks, None)):
            texts = [[e, e.rejected] if e.rejected else [e] for e in read]
            learned = [sum(token != -100 for e in both for token in e.learned) for both in texts]
            for note in counts.told(records, [[len(e.ids) for e in both] for both in texts], learned, model.context, epochs):
                tell(note)
    hazards = sorted({r.hazard for r in training if r.hazard} | trained_on(spec.start or spec.base))
    saved, cost = time.monotonic(), 0.0

    def save() -> None:
        nonlocal saved, cost
        began = time.monotonic()
        checkpoints.save(state, folder / "state", run)
        saved, cost = time.monotonic(), time.monotonic() - began

    try:
        for step in _steps(spec, pupil, lessons, checks, state, _checked(stop)):
            tell(step)
            if step.step % math.ceil(len(lessons) / spec.batch) == 0:
                tell(Saved(step.step, _checkpoint(spec, pupil, folder, step, hazards), step))
                save()
            elif time.monotonic() - saved > max(EVERY, 20 * cost):
                save()
    except Stopped:
        save()
        return None
    tokens = sum(len(e.ids) + (len(e.rejected.ids) if e.rejected else 0) for e in lessons) * spec.epochs
    return Result(tokens, state.step, _csv(state.told), folder / f"checkpoint-{state.step}")


def _lessons(model: HF, records: "Sequence[Record]", of: str) -> list[Encoded]:
    """Examples as they are trained on.

    Args:
        of: Which examples they are, after the number of a line.

    Raises:
        TrainingError: Some cannot be: what is wrong with the first, and the lines of the others.
    """
    made, wrong = [], dict[int, str]()
    for record in records:
        try:
            made.append(encoded(model, record))
        except TrainingError as why:
            wrong[record.line] = str(why)
    if wrong:
        first, *others = wrong
        said = wrong[first].replace(":", f"{of}:", 1)
        raise TrainingError(said + (f"; {len(others)} more cannot be trained on: {counts.lines(others)}" if others else ""))
    return made


def _key(e: Encoded) -> list[Any]:
    return [e.ids, e.learned, e.rejected and _key(e.rejected)]


def _checked(stop: Callable[[], bool]) -> Callable[[], None]:
    def check() -> None:
        if stop():
            raise Stopped

    return check


def _steps(
    spec: Spec, pupil: Learner, lessons: list[Encoded], checks: list[Encoded], state: State, check: Callable[[], None]
) -> Iterator[Step]:
    """Make the steps that `state` still has before it, and yield each. Between two of them the state is that of this moment.

    Raises:
        Stopped: By `check`; the state is then one to go on from.
    """
    each = math.ceil(len(lessons) / spec.batch)
    steps = each * spec.epochs
    peak = LR[spec.method] * spec.lr_multiplier * (FULL if spec.full else 1.0)
    optimizer = _optimizer(state)
    pupil.take(state.weights)
    while state.pending or state.step < steps:
        check()
        if state.pending is None:
            epoch, at = divmod(state.step, each)
            batch = [lessons[i] for i in order(spec, epoch, len(lessons))[at * spec.batch : (at + 1) * spec.batch]]
            slope, loss, accuracy = gradient(spec, pupil, batch, state.weights, check)
            length = slope.norm()
            if not (math.isfinite(loss) and torch.isfinite(length)):
                raise TrainingError(f"the loss is not a number at step {state.step + 1} of {steps}; lower the learning rate multiplier")
            state.weights.grad = slope.mul_(min(1.0, 1.0 / (float(length) + 1e-6)))
            optimizer.param_groups[0]["lr"] = peak * _rate(state.step, steps)
            optimizer.step()
            state.weights.grad = None
            pupil.take(state.weights)
            state.step, state.pending = state.step + 1, (loss, accuracy)
        at = (state.step - 1) * spec.batch
        some = [checks[(at + i) % len(checks)] for i in range(min(spec.batch, len(checks)))]
        asked = (some, checks) if state.step % each == 0 else (some,)
        numbers = [x for these in asked for x in measured(spec, pupil, these, state.weights, check)] if checks else []
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


def _checkpoint(spec: Spec, pupil: Learner, folder: Path, step: Step, hazards: list[str]) -> Path:
    """Write what was learned so far, whole or not at all, and drop all but the last checkpoints.

    Args:
        hazards: Of a policy, on which this model or one below it was trained: what it must not be scored on.
    """
    out = folder / f"checkpoint-{step.step}"
    card = {
        "name": out.name,
        "base": based(spec.base, out),
        "training": {k: v for k, v in asdict(spec).items() if k not in ("base", "start")},
        "step": step.step,
        "metrics": asdict(step),
        "trained_on": hazards,
    }
    if pupil.wrapped is not None:
        _write(pupil.wrapped, out, card)
    else:
        unfinished = folder / f".partial-{out.name}"
        pupil.model.model.save_pretrained(unfinished)
        pupil.model.tokenizer.save_pretrained(unfinished)
        (unfinished / WHOLE).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    checkpoints.keep_last(folder)
    return out


def _csv(steps: Sequence[Step]) -> str:
    """The result file."""
    rows = [(s.step, s.train_loss, s.train_accuracy, s.valid_loss, s.valid_accuracy) for s in steps]
    lines = [",".join("" if x is None else str(x) if isinstance(x, int) else f"{x:.5f}" for x in row) for row in rows]
    return "\n".join(["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", *lines]) + "\n"
