"""Files and uploads in the service's database. What they hold lies in the blob store."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Select, delete, exists, func, or_, select, update

from saddlepoint.service.records import ACTIVE, File, Part, Upload
from saddlepoint.service.rows import Refused, add, disuse, first, of, page, record, use, within
from saddlepoint.service.schema import FILE, JOB, PART, UPLOAD, USE, reading, writing

DAY = 24 * 3600  # seconds


class Shelf:
    """Files and uploads. `owner` is the name of a key; None sees everybody's."""

    def __init__(self, engine: Engine, drop: Callable[[str], None]):
        self._engine, self._drop = engine, drop

    def add(self, file: File, quota: int = 0) -> File:
        """Record a file whose blob was put. Put it again, then call `ready`.

        Args:
            quota: Bytes that its owner may keep; 0 is no limit.

        Raises:
            Refused: Over the quota.
        """
        with self._forgetting(file.sha), writing(self._engine, alone=True) as db:
            within(db, file.owner, file.bytes, quota)
            add(db, FILE, file)
            use(db, file.id, file.owner, {file.sha: file.bytes})
        return file

    def ready(self, file: str) -> None:
        """A file's blob is there."""
        with writing(self._engine) as db:
            db.execute(update(FILE).where(FILE.c.id == file).values(status="processed"))

    def get(self, id: str, owner: str | None = None) -> File | None:
        """A file."""
        with reading(self._engine) as db:
            return first(File, db, alive(owner).where(FILE.c.id == id))

    def page(
        self, owner: str | None, purpose: str | None = None, limit: int = 10000, after: str | None = None, newest: bool = True
    ) -> tuple[list[File], bool]:
        """A page of files, and whether there are more."""
        query = alive(owner)
        with reading(self._engine) as db:
            return page(File, db, query.where(FILE.c.purpose == purpose) if purpose else query, FILE, limit, after, newest)

    def delete(self, id: str, owner: str | None = None) -> bool:
        """Delete a file: whether it was there.

        Raises:
            Refused: A job that has not ended needs it.
        """
        with writing(self._engine, alone=True) as db:
            if not db.execute(alive(owner).where(FILE.c.id == id)).first():
                return False
            if job := db.execute(select(JOB.c.id).where(_needed(id))).scalar():
                raise Refused(f"the file {id} is needed by the job {job}; cancel that first", "file_in_use", "file_id")
            self._remove(db, id)
        return True

    def _remove(self, db: Connection, id: str) -> None:
        db.execute(delete(FILE).where(FILE.c.id == id))
        disuse(db, id, self._drop)

    # ---- uploads

    def add_upload(self, upload: Upload) -> Upload:
        """Record an upload."""
        with writing(self._engine) as db:
            add(db, UPLOAD, upload)
        return upload

    def upload(self, id: str, owner: str | None = None) -> Upload | None:
        """An upload."""
        with reading(self._engine) as db:
            return first(Upload, db, of(select(UPLOAD), UPLOAD, owner).where(UPLOAD.c.id == id))

    def add_part(self, part: Part, quota: int = 0) -> Part:
        """Record a part whose blob was put; put it again afterwards.

        Raises:
            Refused: The upload is not pending, holds more than was announced, or its owner is over the quota.
        """
        with self._forgetting(part.sha), writing(self._engine, alone=True) as db:
            upload = _pending(db, part.upload)
            had = int(db.execute(select(func.coalesce(func.sum(PART.c.bytes), 0)).where(PART.c.upload == upload.id)).scalar_one())
            if had + part.bytes > upload.bytes:
                said = f"the upload was announced with {upload.bytes} bytes and would hold {had + part.bytes}"
                raise Refused(said, "invalid_value", "data")
            within(db, upload.owner, part.bytes, quota)
            add(db, PART, part)
            use(db, part.id, upload.owner, {part.sha: part.bytes})
        return part

    def parts(self, upload: str) -> dict[str, Part]:
        """The parts of an upload by their ids."""
        with reading(self._engine) as db:
            rows = db.execute(select(PART).where(PART.c.upload == upload))
            return {part.id: part for part in (record(Part, row) for row in rows)}

    def pending(self, id: str) -> Upload:
        """An upload that can still be completed.

        Raises:
            Refused: It is not pending.
        """
        with reading(self._engine) as db:
            return _pending(db, id)

    def complete(self, upload: str, file: File) -> File:
        """End an upload with its file, whose blob was put. Put it again, then call `settle`.

        Raises:
            Refused: It is not pending.
        """
        with self._forgetting(file.sha), writing(self._engine, alone=True) as db:
            _pending(db, upload)
            add(db, FILE, file)
            use(db, file.id, file.owner, {file.sha: file.bytes})
            db.execute(update(UPLOAD).where(UPLOAD.c.id == upload).values(status="completed", file=file.id))
        return file

    def settle(self, upload: str, file: str) -> None:
        """The blob of an upload's file is there; its parts are dropped."""
        with writing(self._engine, alone=True) as db:
            db.execute(update(FILE).where(FILE.c.id == file).values(status="processed"))
            self._drop_parts(db, upload)

    def cancel_upload(self, upload: str) -> None:
        """End an upload without a file.

        Raises:
            Refused: It is not pending.
        """
        with writing(self._engine, alone=True) as db:
            _pending(db, upload)
            db.execute(update(UPLOAD).where(UPLOAD.c.id == upload).values(status="cancelled"))
            self._drop_parts(db, upload)

    def sweep(self) -> None:
        """Remove what has expired."""
        with writing(self._engine, alone=True) as db:
            now = int(time.time())
            broken_off = (FILE.c.status == "uploaded") & (FILE.c.created_at < now - DAY)  # whoever put it was killed
            late = select(FILE.c.id).where((FILE.c.expires_at <= now) | broken_off, ~exists().where(_needed(FILE.c.id)))
            for file in db.execute(late).scalars().all():
                self._remove(db, file)
            db.execute(update(UPLOAD).where(UPLOAD.c.status == "pending", UPLOAD.c.expires_at <= now).values(status="expired"))
            over = select(PART.c.upload).join(UPLOAD, UPLOAD.c.id == PART.c.upload).where(UPLOAD.c.expires_at <= now).distinct()
            for upload in db.execute(over).scalars().all():
                self._drop_parts(db, upload)

    def forget(self, sha: str) -> None:
        """Drop a blob that was put and that nothing came to refer to."""
        used = select(USE.c.sha).where(USE.c.sha == sha)
        with reading(self._engine) as db:  # most are, and this holds up nobody
            if db.execute(used).first():
                return
        with writing(self._engine, alone=True) as db:
            if not db.execute(used).first():
                self._drop(sha)

    @contextmanager
    def _forgetting(self, sha: str) -> Iterator[None]:
        try:
            yield
        except Refused:
            self.forget(sha)
            raise

    def _drop_parts(self, db: Connection, upload: str) -> None:
        for part in db.execute(select(PART.c.id).where(PART.c.upload == upload)).scalars().all():
            disuse(db, part, self._drop)
        db.execute(delete(PART).where(PART.c.upload == upload))


def alive(owner: str | None) -> Select[Any]:
    """Files that have not expired, or that a job still needs."""
    now = int(time.time())
    return of(select(FILE), FILE, owner).where(
        or_(FILE.c.expires_at.is_(None), FILE.c.expires_at > now, exists().where(_needed(FILE.c.id)))
    )


def _pending(db: Connection, id: str) -> Upload:
    found = first(Upload, db, select(UPLOAD).where(UPLOAD.c.id == id).with_for_update())
    if found is None or found.status != "pending" or found.expires_at <= time.time():
        now = "gone" if found is None else "expired" if found.status == "pending" else found.status
        raise Refused(f"the upload {id} is {now}; only a pending one takes parts and can be completed or cancelled", "invalid_state")
    return found


def _needed(file: Any) -> Any:
    """A job that has not ended needs a file."""
    return JOB.c.status.in_(ACTIVE) & ((JOB.c.training_file == file) | (JOB.c.validation_file == file))
