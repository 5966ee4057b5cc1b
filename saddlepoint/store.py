"""A run on disk: every ask, reply, verdict and resolved parameter, in one SQLite file.

A row is there wholly or not at all, and once `record` returns it survives a kill. So a run that was broken off at any
point goes on from what is recorded: the attacks are deterministic, so replaying them against the recorded replies
brings each back to where it was.
"""

import fcntl
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json
from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    create_engine,
    event,
    exists,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from saddlepoint.errors import StoreError
from saddlepoint.types import Ask, Completion, Finding, Verdict

_SCHEMA = MetaData()
_NOTE = Table(
    "note",
    _SCHEMA,
    Column("key", String, primary_key=True),  # "config", "version", "training:<phase>", ...
    Column("value", JSON, nullable=False),
)
_CELL = Table(
    "cell",
    _SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("phase", String, nullable=False),
    Column("attack", String, nullable=False),  # with its parameters, as typed
    Column("params", JSON, nullable=False),  # all of them, resolved
    Column("behavior", String, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("finding", Text),  # JSON, as are those below; None while the attack is under way
    UniqueConstraint("phase", "attack", "behavior"),
)
_QUERY = Table(
    "query",
    _SCHEMA,
    Column("cell", Integer, primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("ask", Text, nullable=False),
    Column("sampling", Text, nullable=False),
    Column("completion", Text, nullable=False),
    Column("search", Text),  # the search judge's verdict
    Column("final", Text),  # the final judge's
    Column("seconds", Float, nullable=False),  # this query's share of its batch
)
_FINAL = (
    update(_QUERY)
    .where(_QUERY.c.cell == bindparam("c"), _QUERY.c.step == bindparam("s"), _QUERY.c.place == bindparam("p"))
    .values(final=bindparam("v"))
)
_DONE = update(_CELL).where(_CELL.c.id == bindparam("c")).values(finding=bindparam("v"))
_ASK, _COMPLETION, _VERDICT, _FINDING = TypeAdapter(Ask), TypeAdapter(Completion), TypeAdapter(Verdict), TypeAdapter(Finding)


@dataclass(frozen=True)
class Recorded:
    """One query of a run: `step` counts the attack's batches, `place` the asks in one."""

    cell: int
    step: int
    place: int
    ask: Ask
    sampling: dict[str, Any]
    completion: Completion
    search: Verdict | None
    seconds: float
    final: Verdict | None = None


class Store:
    """A run in the folder `path`. One process writes at a time; any number may read."""

    def __init__(self, path: Path, engine: Engine):
        self.path = path
        self._engine = engine

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> "Store":
        """Begin a run in a new or empty folder.

        Raises:
            StoreError: There is a run already, or the folder cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; give a folder: --out FOLDER")
        if (path / "run.db").exists():
            raise StoreError(f"{path} holds a run already; go on with it: saddlepoint run --resume {path}; or give another --out")
        with _plainly(path):
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise StoreError(f"{path} holds other files; give a new or empty folder: --out FOLDER")
            store = cls(path, _engine(path))
            _SCHEMA.create_all(store._engine)
            store.note("config", config)
        return store

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a run.

        Raises:
            StoreError: There is none, or it is not readable as one.
        """
        if not (path / "run.db").is_file():
            raise StoreError(f"{path} holds no run; start one: saddlepoint attack --out {path}")
        store = cls(path, _engine(path))
        with _plainly(path):
            if not inspect(store._engine).has_table("note") or store.read("config") is None:
                raise StoreError(f"{path}/run.db was broken off before its first record, or is no run; start one in another folder")
        return store

    def close(self) -> None:
        """Let go of its file, so that the folder can be moved."""
        self._engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends, however it ends.

        Raises:
            StoreError: Another process is at it.
        """
        with _plainly(self.path):
            lock = (self.path / "run.lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"another process is writing {self.path}; wait for it, or stop it first") from None
            yield

    def note(self, key: str, value: Any) -> None:
        """Write a named JSON value, replacing what was there."""
        with _plainly(self.path), self._engine.begin() as db:
            db.execute(_NOTE.delete().where(_NOTE.c.key == key))
            db.execute(insert(_NOTE).values(key=key, value=value))

    def read(self, key: str) -> Any:
        """A named JSON value, or None."""
        with _plainly(self.path), self._engine.connect() as db:
            return db.execute(select(_NOTE.c.value).where(_NOTE.c.key == key)).scalar_one_or_none()

    def notes(self, prefix: str) -> dict[str, Any]:
        """All named values whose key begins with `prefix`, by the rest of the key, in the order of writing."""
        with _plainly(self.path), self._engine.connect() as db:
            rows = db.execute(select(_NOTE.c.key, _NOTE.c.value).where(_NOTE.c.key.startswith(prefix)).order_by(text("rowid")))
            return {key.removeprefix(prefix): value for key, value in rows}

    def cells(self, phase: str, wanted: Iterable[tuple[str, dict[str, Any], str, int]]) -> dict[tuple[str, str], int]:
        """The ids of the cells (attack, params, behavior, seed) of a phase, made where they are not there yet."""
        with _plainly(self.path), self._engine.begin() as db:
            there = {(a, b) for a, b in db.execute(select(_CELL.c.attack, _CELL.c.behavior).where(_CELL.c.phase == phase))}
            new = [
                {"phase": phase, "attack": a, "params": p, "behavior": b, "seed": s, "finding": None}
                for a, p, b, s in wanted
                if (a, b) not in there
            ]
            if new:
                db.execute(insert(_CELL), new)
            rows = db.execute(select(_CELL.c.attack, _CELL.c.behavior, _CELL.c.id).where(_CELL.c.phase == phase))
            return {(a, b): i for a, b, i in rows}

    def record(self, rows: Iterable[Recorded]) -> None:
        """Write queries; when this returns they are on disk."""
        values = [
            {
                "cell": r.cell,
                "step": r.step,
                "place": r.place,
                "ask": _json(r.ask),
                "sampling": _json(r.sampling),
                "completion": _json(r.completion),
                "search": r.search and _json(r.search),
                "final": r.final and _json(r.final),
                "seconds": r.seconds,
            }
            for r in rows
        ]
        if values:
            with _plainly(self.path), self._engine.begin() as db:
                db.execute(insert(_QUERY), values)

    def started(self, phase: str) -> set[int]:
        """The cells of a phase that have queries and no finding yet."""
        left = select(_CELL.c.id).where(_CELL.c.phase == phase, _CELL.c.finding.is_(None))
        with _plainly(self.path), self._engine.connect() as db:
            return set(db.execute(left.where(exists().where(_QUERY.c.cell == _CELL.c.id))).scalars())

    def recorded(self, cell: int) -> dict[tuple[int, int], Recorded]:
        """The queries of a cell by (step, place)."""
        with _plainly(self.path), self._engine.connect() as db:
            rows = db.execute(select(_QUERY).where(_QUERY.c.cell == cell).order_by(_QUERY.c.step, _QUERY.c.place)).mappings()
            return {(row["step"], row["place"]): _recorded(row) for row in rows}

    def finish(self, done: Iterable[tuple[int, Finding, Mapping[tuple[int, int], Verdict]]]) -> None:
        """Write the findings of cells, with the final judge's verdict on each answer by (step, place)."""
        done = list(done)
        finals = [{"c": cell, "s": s, "p": p, "v": _json(verdict)} for cell, _, each in done for (s, p), verdict in each.items()]
        with _plainly(self.path), self._engine.connect() as db, db.begin():
            if finals:
                db.execute(_FINAL, finals)
            if done:
                db.execute(_DONE, [{"c": cell, "v": _json(finding)} for cell, finding, _ in done])

    def findings(self, phase: str | None = None) -> list[Finding]:
        """The findings so far, of one phase or all, in the order in which their cells were made."""
        chosen = select(_CELL.c.finding).where(_CELL.c.finding.is_not(None)).order_by(_CELL.c.id)
        with _plainly(self.path), self._engine.connect() as db:
            return [_FINDING.validate_json(f) for (f,) in db.execute(chosen if phase is None else chosen.where(_CELL.c.phase == phase))]

    def queries(self) -> Iterator[tuple[str, str, str, Recorded]]:
        """Every query of the run as (phase, attack, behavior, query)."""
        joined = select(_CELL.c.phase, _CELL.c.attack, _CELL.c.behavior, _QUERY).join(_QUERY, _QUERY.c.cell == _CELL.c.id)
        with _plainly(self.path), self._engine.connect() as db:
            for row in db.execute(joined.order_by(_QUERY.c.cell, _QUERY.c.step, _QUERY.c.place)).mappings():
                yield row["phase"], row["attack"], row["behavior"], _recorded(row)

    def faults(self) -> dict[str, dict[str, int]]:
        """How many tries of queries failed in each phase, by kind ("HTTP 500", "timeout", ...); those that another try mended too."""
        some = select(_CELL.c.phase, _QUERY.c.completion).join(_QUERY, _QUERY.c.cell == _CELL.c.id)
        found: dict[str, Counter[str]] = {}
        with _plainly(self.path), self._engine.connect() as db:
            for phase, completion in db.execute(some.where(_QUERY.c.completion.contains('"faults":["'))):
                faults = _COMPLETION.validate_json(completion).faults
                found.setdefault(phase, Counter()).update(f.partition(":")[0].partition(",")[0] for f in faults)
        return {phase: dict(counts.most_common()) for phase, counts in found.items()}


def _json(value: Any) -> str:
    return to_json(value, inf_nan_mode="constants").decode()


def _recorded(row: Any) -> Recorded:
    def verdict(name: str) -> Verdict | None:
        return _VERDICT.validate_json(row[name]) if row[name] else None

    ask, completion = _ASK.validate_json(row["ask"]), _COMPLETION.validate_json(row["completion"])
    place = (row["cell"], row["step"], row["place"])
    return Recorded(*place, ask, from_json(row["sampling"]), completion, verdict("search"), row["seconds"], verdict("final"))


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path / 'run.db'}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def durable(connection: Any, _: Any) -> None:
        # A write-ahead log flushed at each commit: a kill or a power cut loses nothing that was committed.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return engine


@contextmanager
def _plainly(path: Path) -> Iterator[None]:
    """Turn what the database or the disk says into one line with a next step."""
    try:
        yield
    except (SQLAlchemyError, OSError, ValueError) as wrong:  # ValueError: what was written does not read as what we write
        said = str(getattr(wrong, "orig", None) or wrong).splitlines()[0]
        if isinstance(wrong, ValueError) or any(w in said for w in ("malformed", "not a database", "no such")):
            raise StoreError(f"{path}/run.db is damaged: {said}; put a whole copy in its place, or start a new run") from wrong
        advice = (
            "free some space"
            if any(w in said for w in ("full", "I/O", "No space", "too large"))
            else "check that the folder is yours and whole"
        )
        raise StoreError(f"{path}/run.db: {said}; nothing recorded is lost; {advice}, then: saddlepoint run --resume {path}") from wrong


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """While this is entered, no other process is in it with the same file; the system lets go of it when a process ends, however it ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def whole(file: Path, text: str) -> None:
    """Write a file, whole or not at all, in place of what is there."""
    partial = file.with_name(f".partial-{file.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
