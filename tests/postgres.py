"""A PostgreSQL of our own for a test: on a free loopback port, from the system's package, gone afterwards."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

USER, WAITS = "saddlepoint", 30.0


@contextmanager
def postgres() -> Iterator[str]:
    """Its URL up to the database's name, which is to be added; every name is a database that `fresh_database` made."""
    initdb, server = _program("initdb"), _program("postgres")
    pytest.importorskip("pg8000")
    if not initdb or not server:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    before: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="saddlepoint-postgres-"))
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            other = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
        os.chown(folder, other.pw_uid, other.pw_gid)
        before = ["setpriv", f"--reuid={other.pw_uid}", f"--regid={other.pw_gid}", "--clear-groups"]
    password = secrets.token_hex(16)
    note = folder / "password"
    note.write_text(password)
    note.chmod(0o644)
    data, port = folder / "data", _free()
    quiet = {"check": True, "capture_output": True, "cwd": folder}
    subprocess.run(
        [
            *before,
            initdb,
            "-D",
            str(data),
            "-U",
            USER,
            "--pwfile",
            str(note),
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ],
        **quiet,  # type: ignore[call-overload]
    )
    options = [
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        f"unix_socket_directories={folder}",
        "-c",
        "max_connections=200",
        "-c",
        "fsync=off",
    ]
    runs = subprocess.Popen(
        [*before, server, "-D", str(data), "-p", str(port), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        url = f"postgresql+pg8000://{USER}:{password}@127.0.0.1:{port}/"
        _wait(port, password, runs)
        yield url
    finally:
        runs.send_signal(signal.SIGINT)  # its fast end, without waiting for clients
        with suppress(subprocess.TimeoutExpired):
            runs.wait(10)
        runs.kill()
        runs.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def fresh_database(url: str) -> str:
    """A new, empty database of that server: its URL."""
    from sqlalchemy import create_engine, text

    name = f"t{secrets.token_hex(6)}"
    engine = create_engine(url + "postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.execute(text(f"create database {name}"))
    engine.dispose()
    return url + name


def _program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


def _free() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait(port: int, password: str, runs: subprocess.Popen[bytes]) -> None:
    import pg8000

    until = time.monotonic() + WAITS
    while True:
        try:
            pg8000.connect(USER, host="127.0.0.1", port=port, password=password, database="postgres").close()
            return
        except (pg8000.Error, OSError):
            assert runs.poll() is None and time.monotonic() < until, "PostgreSQL does not start"
            time.sleep(0.1)
