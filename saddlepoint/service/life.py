"""Steps in a job's life, each a part of a transaction of `State`."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, delete, select, update

from saddlepoint.errors import SaddlepointError
from saddlepoint.service.outbox import announce
from saddlepoint.service.records import File, Job, Manifest, Model, Status
from saddlepoint.service.rows import Refused, add, disuse, first, fresh, put, use
from saddlepoint.service.schema import CHECKPOINT, EVENT, FILE, JOB, MODEL

Drop = Callable[[str], None]  # told the SHA-256 of a blob that nothing refers to any more


class Lost(SaddlepointError):
    """The job is no longer this worker's: its lease ran out, or the job was ended or paused. Stop working on it."""


def locked(db: Connection, id: str) -> Job:
    """A job that nobody else changes until the transaction's end.

    Raises:
        Refused: There is none.
    """
    job = first(Job, db, select(JOB).where(JOB.c.id == id).with_for_update())
    if job is None:
        raise Refused(f"there is no job {id}", "not_found")
    return job


def theirs(db: Connection, id: str, worker: str) -> Job:
    """A job, locked, that a worker holds, in whatever state it is.

    Raises:
        Lost: It does not.
    """
    job = locked(db, id)
    if job.worker != worker:
        raise Lost(f"the job {id} is not this worker's any more")
    return job


def mine(db: Connection, id: str, worker: str) -> Job:
    """A job, locked, that a worker may write to.

    Raises:
        Lost: It may not.
    """
    job = theirs(db, id, worker)
    if job.status not in ("validating_files", "running"):
        raise Lost(f"the job {id} is {job.status} and not this worker's to write")
    return job


def holding(db: Connection, id: str) -> tuple[Job, Manifest]:
    """A job, locked, and the model that it holds back.

    Raises:
        Refused: It holds none.
    """
    job = locked(db, id)
    if job.held is None:
        raise Refused(f"the job {id} holds no model back; its status is {job.status}", "invalid_state")
    return job, job.held


def changed(db: Connection, id: str, **values: Any) -> Job:
    """A job with new values."""
    db.execute(update(JOB).where(JOB.c.id == id).values(**values))
    return locked(db, id)


def tell(
    db: Connection,
    job: str,
    message: str,
    level: str = "info",
    type: str = "message",
    data: Mapping[str, Any] | None = None,
    key: str = "",
) -> None:
    """An event; one with a `key` that is recorded already adds nothing."""
    row = {"job": job, "created_at": int(time.time()), "level": level, "message": message, "type": type, "data": data}
    put(db, EVENT, [{"id": fresh("ftevent-"), **row, "key": key or None}])


def publish(db: Connection, job: Job, manifest: Manifest, blobs: Mapping[str, int]) -> None:
    """The job's model, for its owner to call.

    Args:
        blobs: SHA-256 and bytes of its files.
    """
    add(db, MODEL, Model(job.name, job.owner, int(time.time()), job.base, job.id, dict(manifest)))
    use(db, job.name, job.owner, blobs)
    tell(db, job.id, f"New fine-tuned model created: {job.name}")


def result(db: Connection, job: Job, csv: tuple[str, int] | None) -> list[str]:
    """The ids of a job's result files: of one, made of the SHA-256 and the bytes of its CSV."""
    if csv is None:
        return []
    sha, size = csv
    file = File(fresh("file-"), job.owner, size, int(time.time()), "step_metrics.csv", "fine-tune-results", sha)
    add(db, FILE, file)
    use(db, file.id, job.owner, {sha: size})
    return [file.id]


def forget(db: Connection, drop: Drop, checkpoint: str) -> None:
    """Delete a checkpoint."""
    db.execute(delete(CHECKPOINT).where(CHECKPOINT.c.id == checkpoint))
    disuse(db, checkpoint, drop)


def forget_all(db: Connection, drop: Drop, job: str) -> None:
    """Delete a job's checkpoints."""
    for checkpoint in db.execute(select(CHECKPOINT.c.id).where(CHECKPOINT.c.job == job)).scalars().all():
        forget(db, drop, checkpoint)


def end(db: Connection, drop: Drop, job: Job, status: Status, said: str, level: str = "info", **values: Any) -> Job:
    """The end of a job, with its last event and its webhooks. Whoever trains a job that is cancelled holds it until `leave`."""
    tell(db, job.id, said, level)
    if status != "cancelled":
        values |= {"worker": "", "lease": 0.0}
    if status != "succeeded" and not values.get("held"):  # nobody can ever call its checkpoints
        forget_all(db, drop, job.id)
    announce(db, job.id, status)
    return changed(db, job.id, status=status, finished_at=int(time.time()), estimated_finish=None, **values)
