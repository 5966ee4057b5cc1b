"""What targets over the network do alike: one event loop in a thread of its own, in which their answers are under way at once."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Any, TypeVar

from saddlepoint.types import Completion, Query, Stream

T = TypeVar("T")
_under_way: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks only weakly


def begin(
    answer: Callable[[Query, Event], Awaitable[Completion]],
    queries: Sequence[Query],
    answered: Callable[[int, Completion | Exception], None],
    stop: Event,
) -> None:
    """Begin to answer every query, and return; tell the place and the answer of each as it comes, from the loop's thread."""

    async def one(place: int, query: Query) -> None:
        try:
            found: Completion | Exception = await answer(query, stop)
        except Exception as wrong:  # whoever waits for the answer must get something
            found = wrong
        answered(place, found)

    def start() -> None:
        for place, query in enumerate(queries):
            task = _loop().create_task(one(place, query))
            _under_way.add(task)
            task.add_done_callback(_under_way.discard)

    _loop().call_soon_threadsafe(start)


def generate(target: Stream, queries: Sequence[Query]) -> list[Completion]:
    """Answer each query, in order. An exception in place of an answer is raised."""
    stop, inbox = Event(), SimpleQueue[tuple[int, Completion | Exception]]()
    answers: dict[int, Completion] = {}
    try:
        target.begin(queries, lambda place, found: inbox.put((place, found)), stop)
        while len(answers) < len(queries):
            place, found = inbox.get()
            if isinstance(found, Exception):
                raise found
            answers[place] = found
    finally:
        stop.set()  # after a TargetError or Ctrl-C, what is still under way does not try again
    return [answers[place] for place in range(len(queries))]


def start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Do something in the loop; whoever cancels the future ends it."""
    return asyncio.run_coroutine_threadsafe(work, _loop())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do something in the loop, and wait for it."""
    return start(work).result()


def close(closing: Coroutine[Any, Any, None]) -> None:
    """Close what belongs to the loop, when nobody needs it any more."""
    done: Future[None] = asyncio.run_coroutine_threadsafe(closing, _loop())
    if current_thread().name != "network":  # there it would wait for itself
        done.result(5)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """A target's connections belong to the loop that they began in, so there is one for all."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="network", daemon=True).start()
    return loop
