"""Processes that end with the one that started them.

A child's standard input is its lifeline: nothing is ever written to it. When it closes, because the parent closes it or has
died in whatever way, the child is to save what it has and end. So one mechanism asks a child to stop and leaves no orphan behind.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

GRACE = 10.0  # seconds in which a child that was asked to end does so by itself
AGAIN = 1.0  # seconds before a child that died is started again

log = logging.getLogger("saddlepoint")


def start(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start `python -m MODULE ARGUMENTS` on a lifeline of its own, apart from this terminal's signals."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, start_new_session=True)


def ask_to_end(child: "subprocess.Popen[bytes]") -> None:
    """Close a child's lifeline; it saves its state and ends within `GRACE` seconds."""
    assert child.stdin
    with suppress(OSError):
        child.stdin.close()


def kill(child: "subprocess.Popen[bytes]") -> None:
    """End a child at once, and wait until it is gone."""
    ask_to_end(child)
    child.kill()
    child.wait()


def on_lifeline(ended: Callable[[], None]) -> None:
    """In a child: call `ended` from a thread once the lifeline closes."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 1024):
                pass
        ended()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


@contextmanager
def kept_running(module: str, *arguments: str) -> Iterator[None]:
    """While this is entered, `python -m MODULE ARGUMENTS` runs; it is started again when it dies."""
    over, child = threading.Event(), start(module, *arguments)

    def keep() -> None:
        nonlocal child
        while not over.wait(AGAIN):
            if child.poll() is not None:
                log.warning("%s ended (%s); it is started again", module, how(child.returncode))
                child = start(module, *arguments)

    keeper = threading.Thread(target=keep, name=f"keeps {module}", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        ask_to_end(child)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE + 5)  # a little longer than it gives its own children
        kill(child)


def how(status: int) -> str:
    """How a process ended, in words: `exit status 1`, `killed by SIGKILL`."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
