"""The tables of the service's records, and connections to SQLite or PostgreSQL.

Several servers and workers may use one database at a time. Times are seconds since 1970; those of leases are the database's own clock.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    ExceptionContext,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from saddlepoint.errors import StoreError, UsageError

VERSION = 2
LOCK = 0x5ADD1E  # of PostgreSQL's advisory lock

_NUMBER = BigInteger().with_variant(Integer, "sqlite")
SCHEMA = MetaData()


def _numbered() -> Column[int]:
    """Counts rows in the order of writing: more than one may be written in a second."""
    return Column("number", _NUMBER, primary_key=True, autoincrement=True)


NOTE = Table("note", SCHEMA, Column("key", String, primary_key=True), Column("value", JSON, nullable=False))
FILE = Table(
    "file",
    SCHEMA,
    _numbered(),
    Column("id", String, nullable=False, unique=True),
    Column("owner", String, nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("filename", String, nullable=False),
    Column("purpose", String, nullable=False),
    Column("sha", String, nullable=False),
    Column("status", String, nullable=False),
    Column("expires_at", BigInteger),
)
UPLOAD = Table(
    "upload",
    SCHEMA,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("filename", String, nullable=False),
    Column("purpose", String, nullable=False),
    Column("mime_type", String, nullable=False),
    Column("lifetime", BigInteger),
    Column("status", String, nullable=False),
    Column("file", String),
)
PART = Table(
    "part",
    SCHEMA,
    Column("id", String, primary_key=True),
    Column("upload", String, nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("sha", String, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)
JOB = Table(
    "job",
    SCHEMA,
    _numbered(),
    Column("id", String, nullable=False, unique=True),
    Column("owner", String, nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("model", String, nullable=False),
    Column("base", String, nullable=False),
    Column("name", String, nullable=False, unique=True),
    Column("training_file", String, nullable=False),
    Column("method", JSON, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("status", String, nullable=False, index=True),
    Column("validation_file", String),
    Column("suffix", String),
    Column("metadata", JSON(none_as_null=True)),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("fine_tuned_model", String),
    Column("result_files", JSON, nullable=False),
    Column("trained_tokens", BigInteger),
    Column("error", JSON(none_as_null=True)),
    Column("validated", Boolean, nullable=False),
    Column("worker", String, nullable=False),
    Column("lease", Float(53), nullable=False),
    Column("claims", Integer, nullable=False),
    Column("held", JSON(none_as_null=True)),
)
LABEL = Table(  # a job's metadata, to find it by
    "label",
    SCHEMA,
    Column("job", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)
EVENT = Table(
    "event",
    SCHEMA,
    _numbered(),
    Column("id", String, nullable=False, unique=True),
    Column("job", String, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("level", String, nullable=False),
    Column("message", Text, nullable=False),
    Column("type", String, nullable=False),
    Column("data", JSON(none_as_null=True)),
    Column("key", String),  # None is never equal to None
    UniqueConstraint("job", "key"),
    Index("event_of_job", "job", "number"),
)
CHECKPOINT = Table(
    "checkpoint",
    SCHEMA,
    Column("id", String, primary_key=True),
    Column("job", String, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("step", Integer, nullable=False),
    Column("name", String, nullable=False, unique=True),
    Column("metrics", JSON, nullable=False),
    Column("manifest", JSON, nullable=False),
    UniqueConstraint("job", "step"),
)
MODEL = Table(
    "model",
    SCHEMA,
    _numbered(),
    Column("name", String, nullable=False, unique=True),
    Column("owner", String, nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("base", String, nullable=False),
    Column("job", String, nullable=False, index=True),
    Column("manifest", JSON, nullable=False),
    Column("step", Integer),
)
USE = Table(  # who still needs a blob; what nobody needs is removed
    "use",
    SCHEMA,
    Column("holder", String, primary_key=True),
    Column("sha", String, primary_key=True, index=True),
    Column("owner", String, nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
)
HOOK = Table("hook", SCHEMA, Column("url", String, primary_key=True), Column("secret", String, nullable=False))
DELIVERY = Table(
    "delivery",
    SCHEMA,
    Column("id", String, primary_key=True),
    Column("url", String, primary_key=True),
    Column("body", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("due", Float(53), nullable=False, index=True),
)


def connected(place: str) -> Engine:
    """An engine for a folder, which then holds `state.db`, or for a URL `postgresql+pg8000://...` or `sqlite:///...`.

    Raises:
        UsageError: It is neither, or the driver is not installed.
    """
    if "://" not in place:
        folder = Path(place)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as wrong:
            raise UsageError(f"{place} cannot be made a folder: {wrong.strerror}; give another --state") from None
        place = f"sqlite:///{folder / 'state.db'}"
    try:
        url = make_url(place)
        sqlite = url.get_backend_name() == "sqlite"
        if sqlite and url.database:
            with suppress(OSError):  # what is wrong is told when it is opened
                os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))  # what users sent is for the operator's eyes only
        if not sqlite and url.password is None:  # PostgreSQL's own programs read it there too: a command line can be read by others
            url = url.set(password=os.environ.get("PGPASSWORD"))
        engine = create_engine(url, pool_size=8, max_overflow=24, pool_pre_ping=not sqlite, connect_args={"timeout": 30} if sqlite else {})
    except (ArgumentError, ModuleNotFoundError) as wrong:
        said = f"{wrong}; give a folder or postgresql+pg8000://USER:PASSWORD@HOST:PORT/NAME (pip install 'saddlepoint[postgres]')"
        raise UsageError(f"--state: {said}") from None
    if sqlite:
        event.listen(engine, "connect", _durable)
        event.listen(engine, "begin", lambda db: db.exec_driver_sql(db.get_execution_options().get("begins", "BEGIN")))
    else:
        engine.dialect.do_ping = partial(_pinged, engine.dialect.do_ping, engine.dialect.loaded_dbapi)  # type: ignore[method-assign]
        event.listen(engine, "handle_error", _cut)
    return engine


def _pinged(ping: Callable[[Any], bool], driver: Any, connection: Any) -> bool:
    """A ping that fails as pg8000's own errors do: of a connection that was reset it lets the socket's error through."""
    try:
        return ping(connection)
    except ConnectionError as wrong:
        raise driver.InterfaceError("network error") from wrong


def _cut(about: ExceptionContext) -> None:
    """A connection whose socket failed is not used again."""
    if isinstance(about.original_exception, ConnectionError):
        about.is_disconnect = True


def _durable(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so, not where the driver thinks
    # A write-ahead log flushed at each commit: a kill or a power cut loses nothing that was committed.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that reads."""
    with _plainly(), engine.connect() as db, db.begin():
        yield db


@contextmanager
def writing(engine: Engine, alone: bool = False) -> Iterator[Connection]:
    """A transaction that writes. On SQLite it is the only one; on PostgreSQL with `alone` the only one of these."""
    with _plainly(), engine.connect().execution_options(begins="BEGIN IMMEDIATE") as db, db.begin():
        if alone and engine.dialect.name == "postgresql":
            db.execute(select(func.pg_advisory_xact_lock(LOCK)))
        yield db


@contextmanager
def _plainly() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, ConnectionError) as wrong:
        orig = getattr(wrong, "orig", None)
        fields = orig.args[0] if orig is not None and orig.args else None  # PostgreSQL's, by letters
        said = fields["M"] if isinstance(fields, dict) and "M" in fields else str(orig or wrong).splitlines()[0]
        raise StoreError(
            f"the service's database: {said}; see that it runs, has space and is yours; nothing that was written is lost"
        ) from wrong


def prepare(engine: Engine) -> None:
    """Make the tables where they are not there yet.

    Raises:
        StoreError: The database was written by another version.
    """
    with writing(engine, alone=True) as db:
        if not inspect(db).has_table("note"):
            SCHEMA.create_all(db)
            db.execute(insert(NOTE).values(key="version", value=VERSION))
        if not db.execute(select(NOTE.c.key).where(NOTE.c.key == "id")).first():
            db.execute(insert(NOTE).values(key="id", value=uuid4().hex))
        found = db.execute(select(NOTE.c.value).where(NOTE.c.key == "version")).scalar_one_or_none()
    if found != VERSION:
        raise StoreError(f"the service's database has schema {found}, this version of Saddlepoint has {VERSION}; give a new --state")


def clock(db: Connection) -> float:
    """The database's own clock, which its users share."""
    if db.dialect.name != "postgresql":
        return time.time()
    return float(db.execute(text("select extract(epoch from clock_timestamp())")).scalar_one())
