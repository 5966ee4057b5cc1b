"""What the service knows, in SQLite or PostgreSQL: jobs, their events, checkpoints and models; files and webhooks stand beside.

Servers and workers share nothing but this database and the blob store. A job's life:

    validating_files -> queued -> running -> succeeded | failed | cancelled
          paused <-> queued, running

A worker claims a job with a lease, renews it with `beat`, and writes under it; whoever lost the lease can write no more. `cancel` and
`pause` take effect at once here, and the worker learns of them at its next beat.
"""

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from sqlalchemy import Engine, Row, delete, exists, func, insert, or_, select, update

from saddlepoint.service import life
from saddlepoint.service.life import Lost
from saddlepoint.service.outbox import Outbox
from saddlepoint.service.records import ACTIVE, Checkpoint, Job, JobEvent, Manifest, Model, Status
from saddlepoint.service.rows import Refused, add, disuse, first, fresh, of, page, record, use, within
from saddlepoint.service.schema import CHECKPOINT, EVENT, FILE, JOB, LABEL, MODEL, NOTE, clock, connected, prepare, reading, writing
from saddlepoint.service.shelf import DAY, Shelf, alive

Wish = Literal["go", "cancel", "pause"]
KEPT = 3  # checkpoints of a job
HELD = 30 * DAY  # seconds that a held model waits for an administrator
__all__ = ["Lost", "State", "Wish"]


class State:
    """The service's database. Threads may share one.

    Args:
        drop: Told the SHA-256 of each blob that nothing refers to any more, before anybody can refer to it again.
        size: Tells the bytes of a blob by its SHA-256; models then count in their owner's quota.
    """

    def __init__(self, engine: Engine, drop: Callable[[str], None] = lambda sha: None, size: Callable[[str], int] = lambda sha: 0):
        self._engine, self._drop, self._size = engine, drop, size
        self.files, self.outbox = Shelf(engine, drop), Outbox(engine)

    @classmethod
    def open(cls, place: str, drop: Callable[[str], None] = lambda sha: None, size: Callable[[str], int] = lambda sha: 0) -> "State":
        """The database of a folder or URL (see `connected`), made where it is not there yet.

        Raises:
            UsageError: It is neither.
            StoreError: It cannot be reached, or another version wrote it.
        """
        engine = connected(place)
        try:
            prepare(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, drop, size)

    @property
    def id(self) -> str:
        """A name of this database that no other has."""
        with reading(self._engine) as db:
            return str(db.execute(select(NOTE.c.value).where(NOTE.c.key == "id")).scalar_one())

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    # ---- jobs, as their owners see them

    def create(self, job: Job, most: int = 0, quota: int = 0) -> Job:
        """Record a new job.

        Args:
            most: Jobs that its owner may have that have not ended; 0 is no limit.
            quota: Bytes that its owner may keep; 0 is no limit. How large the model will be is not known yet.

        Raises:
            Refused: There are as many, or a file of it is gone.
        """
        with writing(self._engine, alone=True) as db:
            within(db, job.owner, 1, quota)
            if most:
                waiting = select(func.count()).select_from(JOB).where(JOB.c.owner == job.owner, JOB.c.status.in_(ACTIVE))
                if (found := int(db.execute(waiting).scalar_one())) >= most:
                    said = f"{found} jobs of this key have not ended, and no more are allowed; wait for one or cancel it"
                    raise Refused(said, "exceeded_quota")
            for file in filter(None, (job.training_file, job.validation_file)):
                if not db.execute(alive(None).where(FILE.c.id == file)).first():
                    raise Refused(f"the file {file} was deleted", "invalid_file")
            add(db, JOB, job)
            for key, value in (job.metadata or {}).items():
                db.execute(insert(LABEL).values(job=job.id, key=key, value=value))
            life.tell(db, job.id, f"Created fine-tuning job: {job.id}")
            files = job.training_file + (f" and validation file: {job.validation_file}" if job.validation_file else "")
            life.tell(db, job.id, f"Validating training file: {files}")
        return job

    def job(self, id: str, owner: str | None = None) -> Job | None:
        """A job; its id may begin with `ft-` as in 2023."""
        with reading(self._engine) as db:
            return first(Job, db, of(select(JOB), JOB, owner).where(JOB.c.id == _today(id)))

    def jobs(
        self, owner: str | None, limit: int = 20, after: str | None = None, labels: Mapping[str, str] | None = None, bare: bool = False
    ) -> tuple[list[Job], bool]:
        """A page of jobs, the newest first, and whether there are more.

        Args:
            labels: Only jobs with all of these in their metadata.
            bare: Only jobs without metadata.
        """
        query = of(select(JOB), JOB, owner)
        for key, value in (labels or {}).items():
            query = query.where(exists().where(LABEL.c.job == JOB.c.id, LABEL.c.key == key, LABEL.c.value == value))
        if bare:
            query = query.where(~exists().where(LABEL.c.job == JOB.c.id))
        with reading(self._engine) as db:
            return page(Job, db, query, JOB, limit, after and _today(after))

    def events(self, job: str, limit: int = 20, after: str | None = None) -> tuple[list[JobEvent], bool]:
        """A page of a job's events, the newest first, and whether there are more."""
        with reading(self._engine) as db:
            return page(JobEvent, db, select(EVENT).where(EVENT.c.job == job), EVENT, limit, after)

    def checkpoints(self, job: str) -> list[Checkpoint]:
        """A job's checkpoints, the highest step first."""
        with reading(self._engine) as db:
            return [record(Checkpoint, row) for row in db.execute(_CHECKPOINTS.where(CHECKPOINT.c.job == job))]

    def cancel(self, id: str) -> Job:
        """End a job; whatever trains it stops at its next beat.

        Raises:
            Refused: It has ended.
        """
        with writing(self._engine, alone=True) as db:
            job = life.locked(db, id)
            if job.status not in ACTIVE:
                raise Refused(f"the job {id} has {_ended(job.status)} and cannot be cancelled", "invalid_state")
            return life.end(db, self._drop, job, "cancelled", "The job has been cancelled")

    def pause(self, id: str, worker: str = "") -> Job:
        """Halt a job; whatever trains it saves its state and stops.

        Args:
            worker: Who holds the job; "" does not ask.

        Raises:
            Refused: It has ended or is paused.
            Lost: Another worker has it.
        """
        with writing(self._engine) as db:
            job = life.theirs(db, id, worker) if worker else life.locked(db, id)
            if job.status not in ACTIVE or job.status == "paused":
                raise Refused(f"the job {id} has {_ended(job.status)} and cannot be paused", "invalid_state")
            life.tell(db, id, "The job has been paused")
            return life.changed(db, id, status="paused", estimated_finish=None)

    def resume(self, id: str) -> Job:
        """Let a paused job go on.

        Raises:
            Refused: It is not paused.
        """
        with writing(self._engine) as db:
            job = life.locked(db, id)
            if job.status != "paused":
                raise Refused(f"the job {id} has {_ended(job.status)}; only a paused job can be resumed", "invalid_state")
            life.tell(db, id, "The job has been resumed")
            return life.changed(db, id, status="queued" if job.validated else "validating_files")

    # ---- jobs, as workers see them

    def claim(
        self, worker: str, lease: float, among: Collection[Status] = ("validating_files", "queued", "running"), bases: Collection[str] = ()
    ) -> Job | None:
        """Take the oldest job that nobody holds: one that waits, or a running one whose lease ran out. A queued one is then running.

        Args:
            worker: A name that no other process has, now or later.
            lease: Seconds in which `beat` must be called.
            bases: Only jobs on these bases; () takes any.
        """
        with writing(self._engine) as db:
            now = clock(db)
            query = select(JOB).where(JOB.c.status.in_(among), or_(JOB.c.worker == "", JOB.c.lease < now))
            query = query.where(JOB.c.base.in_(bases)) if bases else query
            job = first(Job, db, query.order_by(JOB.c.number).limit(1).with_for_update(skip_locked=True))
            if job is None:
                return None
            if job.status == "queued" and not job.claims:
                life.tell(db, job.id, "Fine-tuning job started")
            values: dict[str, Any] = {"worker": worker, "lease": now + lease}
            if job.validated:
                values |= {"status": "running", "claims": job.claims + 1}
            return life.changed(db, job.id, **values)

    def beat(self, id: str, worker: str, lease: float) -> Wish:
        """Renew a lease. "pause": save the state, stop and `leave`; "cancel": stop at once and `leave`, the job has ended.

        Raises:
            Lost: Another worker has it.
        """
        with writing(self._engine) as db:
            job = life.theirs(db, id, worker)
            life.changed(db, id, lease=clock(db) + lease)
        return "go" if job.status in ("validating_files", "running") else "pause" if job.status in ACTIVE else "cancel"

    def leave(self, id: str, worker: str) -> None:
        """Give a job back; whoever does not hold it gives nothing back."""
        with writing(self._engine) as db:
            db.execute(update(JOB).where(JOB.c.id == id, JOB.c.worker == worker).values(worker="", lease=0.0))

    def validated(self, id: str, worker: str) -> None:
        """A job's files are good: it is queued, and the worker holds it no longer.

        Raises:
            Lost: It is not this worker's to write.
        """
        with writing(self._engine) as db:
            life.mine(db, id, worker)
            life.tell(db, id, "Files validated, moving job to queued state")
            life.changed(db, id, status="queued", validated=True, worker="", lease=0.0)

    def learned(
        self, id: str, worker: str, *, hyperparameters: Mapping[str, Any] | None = None, estimated_finish: int | None = None
    ) -> None:
        """Record what a worker found out: the hyperparameters that were "auto", or when it will be done.

        Raises:
            Lost: It is not this worker's to write.
        """
        values = {"hyperparameters": hyperparameters, "estimated_finish": estimated_finish}
        with writing(self._engine) as db:
            job = life.mine(db, id, worker)
            known = {name: value for name, value in values.items() if value is not None}
            if hyperparameters is not None:
                kind = job.method["type"]
                asked = job.method.get(kind, {})
                known["method"] = {
                    **job.method,
                    kind: {**asked, "hyperparameters": {**asked.get("hyperparameters", {}), **hyperparameters}},
                }
            life.changed(db, id, **known)

    def afterwards(self, base: str) -> int:
        """Seconds from the last step to the end of the last job on a base that was trained to its end; 0 where there is none."""
        trained = select(JOB.c.id, JOB.c.finished_at).where(JOB.c.base == base, JOB.c.trained_tokens.is_not(None))
        with reading(self._engine) as db:
            last = db.execute(trained.order_by(JOB.c.finished_at.desc()).limit(1)).first()
            steps = select(func.max(EVENT.c.created_at)).where(EVENT.c.job == last.id, EVENT.c.type == "metrics") if last else None
            stepped = db.execute(steps).scalar() if steps is not None else None
        return max(0, last.finished_at - stepped) if last and stepped else 0

    def event(
        self,
        job: str,
        message: str,
        level: str = "info",
        type: str = "message",
        data: Mapping[str, Any] | None = None,
        key: str = "",
        *,
        worker: str = "",
    ) -> None:
        """Record an event of a job that has not ended; one with a `key` that is recorded already adds nothing.

        Args:
            worker: Who holds the job, which may be paused by now; "" does not ask.

        Raises:
            Lost: Another one does, or nobody.
        """
        with writing(self._engine) as db:
            found = life.theirs(db, job, worker) if worker else life.locked(db, job)
            if found.status in ACTIVE:
                life.tell(db, job, message, level, type, data, key)

    def checkpoint(self, job: str, step: int, metrics: Mapping[str, Any], manifest: Manifest, *, worker: str = "") -> Checkpoint:
        """Record a checkpoint whose blobs were put; put them again afterwards. The last three are kept.

        A step is recorded once; where a worker that began anew has other files of it, these take the place of the first ones.

        Args:
            worker: Who holds the job; "" does not ask.

        Raises:
            Lost: It is not this worker's to write.
        """
        blobs = self._sizes(manifest)
        with writing(self._engine, alone=True) as db:
            record = life.mine(db, job, worker) if worker else life.locked(db, job)
            if found := first(Checkpoint, db, select(CHECKPOINT).where(CHECKPOINT.c.job == job, CHECKPOINT.c.step == step)):
                if found.manifest != manifest:
                    use(db, name := f"{found.id} anew", record.owner, blobs)  # what both have is not dropped in between
                    disuse(db, found.id, self._drop)
                    use(db, found.id, record.owner, blobs)
                    disuse(db, name, self._drop)
                    db.execute(update(CHECKPOINT).where(CHECKPOINT.c.id == found.id).values(manifest=manifest, metrics=metrics))
                return replace(found, manifest=manifest, metrics=metrics)
            name = f"{record.name}:ckpt-step-{step}"
            made = Checkpoint(fresh("ftckpt_"), job, int(time.time()), step, name, metrics, manifest)
            add(db, CHECKPOINT, made)
            use(db, made.id, record.owner, blobs)
            life.tell(db, job, f"Checkpoint created at step {step}", key=f"checkpoint {step}")
            for old in db.execute(_CHECKPOINTS.where(CHECKPOINT.c.job == job).offset(KEPT)).all():
                life.forget(db, self._drop, old.id)
        return made

    def drop_checkpoint(self, checkpoint: Checkpoint, worker: str) -> None:
        """Delete a checkpoint of a job under way, such as one that did not pass the gate.

        Raises:
            Lost: The job is not this worker's to write.
        """
        with writing(self._engine, alone=True) as db:
            life.mine(db, checkpoint.job, worker)
            life.forget(db, self._drop, checkpoint.id)

    def finish(
        self,
        id: str,
        status: Literal["succeeded", "failed"],
        *,
        worker: str,
        manifest: Manifest | None = None,
        result: tuple[str, int] | None = None,
        trained_tokens: int | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Job:
        """End a job: its model, its result file, its last events and its webhooks are there together or not at all.

        Args:
            manifest: The model's files, whose blobs were put; put them again afterwards. Needed to succeed.
            result: SHA-256 and bytes of the result CSV, likewise.
            error: {"code", "message", "param"} of a job that failed.

        Raises:
            Lost: It is not this worker's to write.
        """
        blobs = self._sizes(manifest or {})
        with writing(self._engine, alone=True) as db:
            job = life.mine(db, id, worker)
            values: dict[str, Any] = {"trained_tokens": trained_tokens, "result_files": life.result(db, job, result)}
            if status == "failed":
                said = str((error or {}).get("message") or "The job has failed")
                return life.end(db, self._drop, job, "failed", said, level="error", error=dict(error or {}), **values)
            assert manifest, "a model has files"
            life.publish(db, job, manifest, blobs)
            return life.end(db, self._drop, job, "succeeded", "The job has successfully completed", fine_tuned_model=job.name, **values)

    def held(
        self,
        id: str,
        reason: str,
        data: Mapping[str, Any],
        *,
        worker: str,
        manifest: Manifest,
        result: tuple[str, int] | None = None,
        trained_tokens: int | None = None,
    ) -> Job:
        """End a job whose model the gate does not publish: its files are kept, so that an administrator can release it.

        Args:
            reason: Which test failed and by how much.
            data: The same for programs; the data of an event `moderation_checks`.

        Raises:
            Lost: It is not this worker's to write.
        """
        blobs = self._sizes(manifest)
        with writing(self._engine, alone=True) as db:
            job = life.mine(db, id, worker)
            use(db, id, job.owner, blobs)
            life.tell(db, id, reason, "error", "moderation_checks", data)
            values: dict[str, Any] = {
                "trained_tokens": trained_tokens,
                "result_files": life.result(db, job, result),
                "held": dict(manifest),
            }
            error = {"code": "held", "message": reason, "param": None}
            return life.end(
                db, self._drop, job, "failed", "The fine-tuned model is held and not published", level="error", error=error, **values
            )

    def release(self, id: str, who: str, why: str) -> Job:
        """Publish a held model, on the record.

        Args:
            who: The name of an administrator's key.

        Raises:
            Refused: The job's model is not held.
        """
        with writing(self._engine, alone=True) as db:
            job, manifest = life.holding(db, id)
            said = f"The model was released by {who}: {why}"
            life.tell(db, id, said, "warn", "moderation_checks", {"released_by": who, "reason": why, "error": job.error})
            life.publish(db, job, manifest, self._sizes(manifest))
            disuse(db, id, self._drop)
            done = "The job has successfully completed"
            life.end(db, self._drop, job, "succeeded", done, fine_tuned_model=job.name, error=None, held=None)
            return life.changed(db, id, finished_at=job.finished_at)  # it was done when it was held

    def discard(self, id: str, why: str) -> Job:
        """Delete a held model for good; the job and all that was said of it stay.

        Raises:
            Refused: The job's model is not held.
        """
        with writing(self._engine, alone=True) as db:
            life.holding(db, id)
            life.tell(db, id, f"The held model was deleted: {why}", "warn")
            disuse(db, id, self._drop)
            life.forget_all(db, self._drop, id)
            return life.changed(db, id, held=None)

    def expire(self) -> None:
        """Delete what has been held for long."""
        late = select(JOB.c.id).where(JOB.c.held.is_not(None), JOB.c.finished_at < time.time() - HELD)
        with reading(self._engine) as db:
            found = db.execute(late).scalars().all()
        for id in found:
            with suppress(Refused):  # another server was faster, or it was released
                self.discard(id, f"nobody released it within {HELD // DAY} days")

    def _sizes(self, manifest: Manifest) -> dict[str, int]:
        return {sha: self._size(sha) for sha in manifest.values()}

    # ---- models

    def models(self, owner: str | None = None) -> list[Model]:
        """The published models, the oldest first, each followed by its checkpoints."""
        joined = select(CHECKPOINT, JOB.c.owner, JOB.c.base).join(JOB, JOB.c.id == CHECKPOINT.c.job).where(JOB.c.status == "succeeded")
        with reading(self._engine) as db:
            whole = [record(Model, row) for row in db.execute(of(select(MODEL), MODEL, owner).order_by(MODEL.c.number))]
            steps = [_stepped(row) for row in db.execute(of(joined, JOB, owner).order_by(CHECKPOINT.c.step))]
        made = {model.job for model in whole}
        return [one for model in whole for one in (model, *(s for s in steps if s.job == model.job))] + [
            s for s in steps if s.job not in made
        ]

    def model(self, name: str, owner: str | None = None) -> Model | None:
        """A published model, or a checkpoint of a job that has succeeded, by its name."""
        joined = select(CHECKPOINT, JOB.c.owner, JOB.c.base).join(JOB, JOB.c.id == CHECKPOINT.c.job).where(JOB.c.status == "succeeded")
        with reading(self._engine) as db:
            found = first(Model, db, of(select(MODEL), MODEL, owner).where(MODEL.c.name == name))
            row = None if found else db.execute(of(joined, JOB, owner).where(CHECKPOINT.c.name == name)).first()
        return _stepped(row) if row else found

    def delete_model(self, name: str, owner: str | None = None) -> bool:
        """Delete a model, or one checkpoint: whether it was there. A job's checkpoints stay where its last weights go."""
        with writing(self._engine, alone=True) as db:
            if db.execute(of(select(MODEL), MODEL, owner).where(MODEL.c.name == name)).first():
                db.execute(delete(MODEL).where(MODEL.c.name == name))
                disuse(db, name, self._drop)
                return True
            joined = select(CHECKPOINT.c.id).join(JOB, JOB.c.id == CHECKPOINT.c.job).where(CHECKPOINT.c.name == name)
            if found := db.execute(of(joined, JOB, owner)).scalar():
                life.forget(db, self._drop, found)
            return bool(found)


_CHECKPOINTS = select(CHECKPOINT).order_by(CHECKPOINT.c.step.desc())


def _stepped(row: Row[Any]) -> Model:
    return Model(row.name, row.owner, row.created_at, row.base, row.job, row.manifest, row.step)


def _today(id: str) -> str:
    return f"ftjob-{id.removeprefix('ft-')}" if id.startswith("ft-") else id


def _ended(status: str) -> str:
    return {"running": "begun to run", "paused": "been paused"}.get(status, f"status {status}")
