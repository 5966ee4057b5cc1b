"""What protects a model's safety while it is trained: the constraint on first tokens, and safety data in its training file.

A job may ask for more than the gate wants of every job, never for less. It is decided once: a job that is under way goes on as it began,
whatever gate its worker is started with next, for its saved state belongs to that training alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from saddlepoint.finetuning.data import Record
from saddlepoint.service.task import Failed, Task
from saddlepoint.store import whole

CHECKS = "moderation_checks"  # the type of the gate's events
_RECORDS = TypeAdapter(tuple[Record, ...])


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
        whole(kept, json.dumps(asdict(_decided(task, least, records))))
    return Protection(**json.loads(kept.read_text(encoding="utf-8")))


def mixed_in(task: Task, care: Protection, records: tuple[Record, ...], policy: str) -> tuple[Record, ...]:
    """The records with their safety data, the very same each time.

    Args:
        policy: Whose they are; "" where the gate is off.

    Raises:
        Failed: They are to be drawn, and there is no policy.
    """
    if not care.safety:
        return records
    kept = task.folder / "mixed.json"
    if not kept.is_file():
        if not policy:
            said = "The gate of this server is off, so there is no policy of which safety data could be mixed in; leave 'safety' out"
            raise Failed("invalid_value", said, "safety")
        from saddlepoint.finetuning.mixing import mixed  # loads torch, which whoever reads a gate's rules does not need

        made = mixed(records, task.setting.target(task.job.base), care.safety, policy, task.job.seed)
        task.tell(f"{len(made) - len(records)} safety examples are mixed in", type=CHECKS, key="mixed")
        whole(kept, _RECORDS.dump_json(tuple(made)).decode())
    return _RECORDS.validate_json(kept.read_bytes())


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
