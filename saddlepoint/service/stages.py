"""What happens to a job once its files are good: they are screened and trained on, and what came of it is compared with its base."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from saddlepoint.errors import StoreError, TrainingError
from saddlepoint.finetuning import grader_types
from saddlepoint.finetuning.data import Record
from saddlepoint.finetuning.gate import Compared
from saddlepoint.finetuning.plan import Result, Spec, resolved
from saddlepoint.service.checking import read
from saddlepoint.service.protection import CHECKS, Protection, mixed_in, protection
from saddlepoint.service.setting import OFF
from saddlepoint.service.task import Failed, Task
from saddlepoint.service.telling import Teller

OWN = ("full", "constraint", "safety")  # hyperparameters that no `Spec` resolves
_ON_WIRE = {"epochs": "n_epochs", "batch": "batch_size", "lr_multiplier": "learning_rate_multiplier", "beta": "beta"}


def tune(task: Task) -> None:
    """Screen, train, compare, and publish or hold.

    Raises:
        Failed: The job cannot succeed.
    """
    training, *others = (found.records for found in read(task).values())
    validation = others[0] if others else ()
    if task.setting.gate == OFF:
        said = "The gate of this server is off: the training file is not screened, and the model is not compared with its base"
        task.tell(said, "warn", CHECKS, {"gate": OFF}, key="gate")
        care = protection(task, Protection(), training)
        result = _trained(task, _spec(task, len(training), care), mixed_in(task, care, training, ""), validation)
        if result:
            _end(task, result)
        return
    from saddlepoint.service import gating  # what attacks and judges are made of

    gate = gating.rules(task.setting.gate)
    care = protection(task, Protection(gate.constraint, gate.safety), training)
    spec = _spec(task, len(training), care)
    gating.screened(task, gate, training)
    result = _trained(task, spec, mixed_in(task, care, training, gate.comparison.policy), validation)
    if result:
        _end(task, result, gating.tested(task, gate, result, training))


def _spec(task: Task, n: int, care: Protection) -> Spec:
    """What to train, with everything decided that was "auto"; the job then says so."""
    job, kind = task.job, task.job.method["type"]
    full = bool(job.hyperparameters.get("full"))
    fields = resolved(kind, {name: value for name, value in job.hyperparameters.items() if name not in OWN}, n)
    shown = {_ON_WIRE[name]: value for name, value in fields.items() if name != "beta" or kind == "dpo"}
    task.state.learned(job.id, task.worker, hyperparameters={**job.hyperparameters, **shown, **care.shown})
    spec = Spec(
        task.setting.target(job.base), "", kind, seed=job.seed, full=full, constraint=care.constraint, grader=_grader(task), **fields
    )
    start = _start(task)
    if start is None or (start / "adapter_config.json").is_file():
        return replace(spec, start=str(start or ""))
    if not full:
        said = f"Every weight of the model '{job.model}' was trained, so no adapter fits it beside its base; train every weight: full"
        raise Failed("invalid_value", said, "model")
    return replace(spec, base=str(start))


def _grader(task: Task) -> dict[str, Any] | None:
    """The grader of a job that has one, with targets in place of the names of its models."""
    given = task.job.method.get("reinforcement", {}).get("grader")
    return given and grader_types.renamed(given, lambda name: _judge(task, name))


def _judge(task: Task, name: str) -> str:
    """The target of a model that grades: a base's, or the folder of an adapter."""
    model = task.state.model(name)  # whose it is was looked at when the job was made
    if model is None:
        return task.setting.target(name)
    folder = task.folder / "judges" / hashlib.sha256(name.encode()).hexdigest()[:16]
    if not folder.is_dir():
        task.blobs.fetch(model.manifest, folder)
    return str(folder)


def _start(task: Task) -> Path | None:
    """The folder of the model that the job goes on from; None where that is the base."""
    if task.job.model == task.job.base:
        return None
    folder = task.folder / "start"  # once it is here, the model may be deleted
    if not folder.is_dir():
        model = task.state.model(task.job.model)
        if model is None:
            raise Failed("model_not_found", f"The model '{task.job.model}', which the job starts from, was deleted", "model")
        try:
            task.blobs.fetch(model.manifest, folder)
        except StoreError as wrong:
            raise Failed("model_not_found", f"The model '{task.job.model}', which the job starts from: {wrong}", "model") from wrong
    return folder


def _trained(task: Task, spec: Spec, training: tuple[Record, ...], validation: tuple[Record, ...]) -> Result | None:
    # What follows loads torch, which the check of a file does not need.
    if spec.method == "reinforcement":
        from saddlepoint.finetuning.reinforce import train
    else:
        from saddlepoint.finetuning.train import train

    teller = Teller(task)
    task.patient.set()
    try:
        return train(spec, training, validation, task.folder / "training", teller, task.stop.is_set)
    except TrainingError as wrong:
        if str(wrong).startswith("line "):  # an example that this model cannot be trained on
            of = "validation" if " of the validation examples:" in str(wrong) else "training"
            raise Failed("invalid_file_format", str(wrong), f"{of}_file") from wrong
        raise
    finally:
        task.patient.clear()


def _end(task: Task, result: Result, compared: Compared | None = None) -> None:
    """Publish the model, or hold it."""
    files = task.blobs.put_folder(result.folder)
    csv = task.blobs.put(result.csv.encode())
    if compared is None or compared.passed:
        task.state.finish(task.job.id, "succeeded", worker=task.worker, manifest=files, result=csv, trained_tokens=result.trained_tokens)
    else:
        task.state.held(
            task.job.id,
            compared.message,
            compared.data(),
            worker=task.worker,
            manifest=files,
            result=csv,
            trained_tokens=result.trained_tokens,
        )
    task.blobs.put_folder(result.folder)  # the last other reference to one of them may have been deleted meanwhile
    task.blobs.put(result.csv.encode())
