"""Rows to records and back, and who still needs which blob."""

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Row, Select, Table, delete, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from saddlepoint.errors import UsageError
from saddlepoint.service.records import Checkpoint, Delivery, File, Job, JobEvent, Model, Part, Upload
from saddlepoint.service.schema import USE

BASE62 = string.digits + string.ascii_letters
Record = TypeVar("Record", File, Upload, Part, Job, JobEvent, Checkpoint, Model, Delivery)


class Refused(UsageError):
    """What cannot be done now: over a quota, or not in this state.

    Args:
        code: The protocol's word for it.
        param: The field that is wrong.
    """

    def __init__(self, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


def fresh(prefix: str, length: int = 24) -> str:
    """A new id."""
    return prefix + "".join(secrets.choice(BASE62) for _ in range(length))


def of(query: Select[Any], table: Table, owner: str | None) -> Select[Any]:
    """Only what a key made; None leaves everybody's."""
    return query if owner is None else query.where(table.c.owner == owner)


def record(cls: type[Record], row: Row[Any]) -> Record:
    """The record of a row."""
    found: dict[str, Any] = {field.name: getattr(row, field.name) for field in fields(cls)}
    made: Record = cast("Any", cls)(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
    return made


def first(cls: type[Record], db: Connection, query: Select[Any]) -> Record | None:
    """The first record that a query finds."""
    row = db.execute(query).first()
    return None if row is None else record(cls, row)


def page(
    cls: type[Record], db: Connection, query: Select[Any], table: Table, limit: int, after: str | None, newest: bool = True
) -> tuple[list[Record], bool]:
    """Up to `limit` records behind the one with the id `after`, and whether there are more.

    Raises:
        Refused: There is no such id among them.
    """
    if after:
        at = db.execute(query.with_only_columns(table.c.number).where(table.c.id == after)).scalar()  # what others have does not exist
        if at is None:
            raise Refused(f"'after' names '{after}', which does not exist", "invalid_value", "after")
        query = query.where(table.c.number < at if newest else table.c.number > at)
    rows: Sequence[Row[Any]] = db.execute(query.order_by(table.c.number.desc() if newest else table.c.number).limit(limit + 1)).all()
    return [record(cls, row) for row in rows[:limit]], len(rows) > limit


def add(db: Connection, table: Table, new: Any) -> None:
    """Insert a record."""
    db.execute(insert(table).values(**asdict(new)))


def put(db: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert rows that are not there yet."""
    dialect = postgresql if db.dialect.name == "postgresql" else sqlite
    if rows:
        db.execute(cast("Any", dialect).insert(table).on_conflict_do_nothing(), rows)


def use(db: Connection, holder: str, owner: str, blobs: Mapping[str, int]) -> None:
    """Write down that a holder needs blobs, whose SHA-256 and bytes are given, and on whose account."""
    put(db, USE, [{"holder": holder, "sha": sha, "owner": owner, "bytes": size} for sha, size in blobs.items()])


def stored(db: Connection, owner: str) -> int:
    """Bytes of all that an owner keeps: files, parts of uploads, models and checkpoints; what several of them hold is there once."""
    mine = select(USE.c.sha, USE.c.bytes).where(USE.c.owner == owner).distinct().subquery()
    return int(db.execute(select(func.coalesce(func.sum(mine.c.bytes), 0))).scalar_one())


def within(db: Connection, owner: str, more: int, quota: int) -> None:
    """Check that an owner may keep more.

    Args:
        more: Bytes that the owner wants to keep besides.
        quota: Bytes that it may; 0 is no limit.

    Raises:
        Refused: That is less.
    """
    if quota and (kept := stored(db, owner)) + more > quota:
        said = f"{kept} bytes are stored under this key and {more} more would exceed its quota of {quota}; delete files or models"
        raise Refused(said, "exceeded_quota")


def disuse(db: Connection, holder: str, drop: Callable[[str], None]) -> None:
    """Drop the blobs that only this holder needed. In a transaction `alone`, so that nobody else refers to them meanwhile."""
    shas = db.execute(select(USE.c.sha).where(USE.c.holder == holder)).scalars().all()
    db.execute(delete(USE).where(USE.c.holder == holder))
    for sha in shas:
        if not db.execute(select(USE.c.sha).where(USE.c.sha == sha)).first():
            drop(sha)
