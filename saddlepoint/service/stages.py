"""What happens to a job: its files are checked; then they are screened, trained on, and what came of it is compared with its base.

Each part tells its events in the words of OpenAI's service, under keys, so that doing it again tells nothing twice.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from saddlepoint.errors import StoreError, TrainingError
from saddlepoint.finetuning.data import LEAST, Checked, Format, Mistake, Record, check
from saddlepoint.finetuning.plan import Event, Note, Result, Saved, Spec, Step, resolved
from saddlepoint.service.state import Lost
from saddlepoint.service.task import Failed, Task

FORMATS: Mapping[str, tuple[Format, ...]] = {
    "supervised": ("chat", "completion"),
    "dpo": ("preference",),
    "reinforcement": ("reinforcement",),
}
SHOWN = 5  # mistakes that a message lists
_ON_WIRE = {"epochs": "n_epochs", "batch": "batch_size", "lr_multiplier": "learning_rate_multiplier", "beta": "beta"}


def validate(task: Task) -> None:
    """Check a job's files: it is queued where they are good.

    Raises:
        Failed: They are not.
    """
    for name, found in _read(task).items():
        if found.warnings:
            said = f"{name}: {len(found.warnings)} warning(s): {_listed(found.warnings)}"
            task.state.event(task.job.id, said, level="warn", key=f"warnings {name}")
    task.state.validated(task.job.id, task.worker)


def tune(task: Task) -> None:
    """Screen, train, compare, and publish or hold.

    Raises:
        Failed: The job cannot succeed.
    """
    files = _read(task)
    training, validation = files["Training file"].records, files["Validation file"].records if len(files) > 1 else ()
    spec = _spec(task, len(training))
    result = _trained(task, spec, training, validation)
    if result is None:
        return
    _publish(task, result)


# ---- files


def _read(task: Task) -> dict[str, Checked]:
    """The job's files, each by what it is called in a message.

    Raises:
        Failed: One is gone or has mistakes.
    """
    allowed = FORMATS[task.job.method["type"]]
    training = _file(task, task.job.training_file, "Training file", "training_file", allowed, LEAST)
    if not task.job.validation_file:
        return {"Training file": training}
    validation = _file(task, task.job.validation_file, "Validation file", "validation_file", (training.format,), 1)
    return {"Training file": training, "Validation file": validation}


def _file(task: Task, id: str, name: str, param: str, allowed: tuple[Format, ...], least: int) -> Checked:
    file = task.state.files.get(id)
    if file is None:
        raise Failed("invalid_file", f"{name} {id} was deleted before the job came to its end", param)
    try:
        data = b"".join(task.blobs.chunks(file.sha))
    except StoreError as wrong:
        raise Failed("invalid_file", f"{name} {id} cannot be read: {wrong}", param) from wrong
    found = check(data, allowed[0] if len(allowed) == 1 else None, least)
    if found.format not in allowed:
        kind = task.job.method["type"]
        raise Failed("invalid_file_format", f"{name} is of the format {found.format}; {kind} takes: {', '.join(allowed)}", param)
    mistakes = [m for m in found.mistakes if m.code != "invalid_n_examples"]
    if mistakes:
        lines = len({m.line for m in mistakes})
        raise Failed("invalid_file_format", f"{name} has {len(mistakes)} mistake(s) in {lines} line(s): {_listed(mistakes)}", param)
    if found.mistakes:
        raise Failed("invalid_n_examples", f"{name} has {found.examples} example(s), but must have at least {least} examples", param)
    return found


def _listed(found: "list[Mistake] | tuple[Mistake, ...]") -> str:
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(f"line {m.line}, column {m.column}: {m.message}" for m in found[:SHOWN]) + more


# ---- training


def _spec(task: Task, n: int) -> Spec:
    """What to train, with everything decided that was "auto"; the job then says so."""
    job = task.job
    fields = resolved(job.method["type"], job.hyperparameters, n)
    shown = {_ON_WIRE[name]: value for name, value in fields.items() if name != "beta" or job.method["type"] == "dpo"}
    task.state.learned(job.id, task.worker, hyperparameters={**job.hyperparameters, **shown})
    grader = job.method.get("reinforcement", {}).get("grader")
    return Spec(task.setting.target(job.base), _start(task), job.method["type"], seed=job.seed, grader=grader, **fields)


def _start(task: Task) -> str:
    """The folder of the adapter that the job goes on from; "" where it begins from the base."""
    if task.job.model == task.job.base:
        return ""
    folder = task.folder / "start"  # once it is here, the model may be deleted
    if not folder.is_dir():
        model = task.state.model(task.job.model)
        if model is None:
            raise Failed("model_not_found", f"The model '{task.job.model}', which the job starts from, was deleted", "model")
        try:
            task.blobs.fetch(model.manifest, folder)
        except StoreError as wrong:
            raise Failed("model_not_found", f"The model '{task.job.model}', which the job starts from: {wrong}", "model") from wrong
    return str(folder)


def _trained(task: Task, spec: Spec, training: tuple[Record, ...], validation: tuple[Record, ...]) -> Result | None:
    from saddlepoint.finetuning.train import train  # loads torch, which the check of a file does not need

    teller = Teller(task)
    task.patient.set()
    try:
        return train(spec, training, validation, task.folder / "training", teller, task.stop.is_set)
    except TrainingError as wrong:
        if str(wrong).startswith("line "):  # an example that this model cannot be trained on
            raise Failed("invalid_file_format", str(wrong), None if validation else "training_file") from wrong
        raise
    finally:
        task.patient.clear()


class Teller:
    """Tells a job's events as the training makes them, and when it will be done."""

    def __init__(self, task: Task):
        self.task = task
        self.first: tuple[int, float] | None = None  # the first step that this process told, and when
        self.estimated = 0.0  # when that was last told

    def __call__(self, event: Event) -> None:
        state, job = self.task.state, self.task.job.id
        if isinstance(event, Step):
            state.event(job, said(event), type="metrics", data=numbers(event), key=f"step {event.step}")
            self._estimate(event)
        elif isinstance(event, Saved):
            manifest = self.task.blobs.put_folder(event.folder)
            state.checkpoint(job, event.step, numbers(event.metrics), manifest, worker=self.task.worker)
            self.task.blobs.put_folder(event.folder)  # the last other reference to one of them may have been deleted meanwhile
        elif isinstance(event, Note):
            state.event(job, event.message, level="warn", key=event.message)

    def _estimate(self, step: Step) -> None:
        now = time.time()
        self.first = self.first or (step.step, now)
        if step.step > self.first[0] and now - self.estimated > 5:
            each = (now - self.first[1]) / (step.step - self.first[0])
            self.estimated = now
            with suppress(Lost):  # the job was paused a moment ago; the training will be told to stop
                self.task.state.learned(self.task.job.id, self.task.worker, estimated_finish=round(now + each * (step.steps - step.step)))


def said(step: Step) -> str:
    """The message of a step: `Step 300/300: training loss=0.15, validation loss=0.27, full validation loss=0.40`."""
    losses = {"training": step.train_loss, "validation": step.valid_loss, "full validation": step.full_valid_loss}
    shown = ", ".join(f"{name} loss={value:.2f}" for name, value in losses.items() if value is not None)
    return f"Step {step.step}/{step.steps}: {shown}"


def numbers(step: Step) -> dict[str, Any]:
    """The data of a step, under the protocol's names."""
    names = {"steps": "total_steps"} | {f"{kind}_accuracy": f"{kind}_mean_token_accuracy" for kind in ("train", "valid", "full_valid")}
    return {names.get(name, name): value for name, value in asdict(step).items() if value is not None}


# ---- the end


def _publish(task: Task, result: Result) -> None:
    manifest = task.blobs.put_folder(result.folder)
    csv = task.blobs.put(result.csv.encode())
    task.state.finish(task.job.id, "succeeded", worker=task.worker, manifest=manifest, result=csv, trained_tokens=result.trained_tokens)
    task.blobs.put_folder(result.folder)
    task.blobs.put(result.csv.encode())
