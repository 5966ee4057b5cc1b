"""What protects a model's safety while it is trained: the constraint on first tokens, and safety data in its training file.

A job may ask for more than the gate wants of every job, never for less. It is decided once: a job that is under way goes on as it began,
whatever gate its worker is started with next, for its saved state belongs to that training alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from saddlepoint.finetuning.data import Record
from saddlepoint.service.task import Task

CHECKS = "moderation_checks"  # the type of the gate's events


@dataclass(frozen=True)
class Protection:
    """What is done to a training.

    Args:
        constraint: Hold the first tokens of answers near those of the model that the job begins with.
        safety: Safety examples that are mixed in, for each of the file's own, >= 0.
    """

    constraint: bool = False
    safety: float = 0.0

    @property
    def shown(self) -> dict[str, bool | float]:
        """As hyperparameters on the wire: what is on."""
        return {name: value for name, value in asdict(self).items() if value}


def protection(task: Task, least: Protection, records: Sequence[Record]) -> Protection:
    """What the job is trained with: what it asks for and at least what the gate wants of it, where its examples can have it."""
    kept = task.folder / "protection.json"
    if not kept.is_file():
        made = _decided(task, least, records)
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(made)), encoding="utf-8")
        partial.replace(kept)
    return Protection(**json.loads(kept.read_text(encoding="utf-8")))


def _decided(task: Task, least: Protection, records: Sequence[Record]) -> Protection:
    asked = task.job.hyperparameters
    constraint = task.job.method["type"] == "supervised" and bool(least.constraint or asked.get("constraint"))
    if constraint:
        said = "The first tokens of answers are held near those of the model that the training begins with"
        task.tell(said, type=CHECKS, key="constraint")
    if least.safety and any(r.item or not r.chat for r in records):
        said = "No safety data are mixed in: they are answered chats, and these examples are bare prompts or are learned by reward"
        task.tell(said, "warn", CHECKS, key="unmixed")
        least = Protection(least.constraint)
    return Protection(constraint, max(least.safety, float(asked.get("safety") or 0.0)))
