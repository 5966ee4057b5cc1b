"""One request that a model answers, from the model's threads to the response: whole, or as server-sent events."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from saddlepoint.errors import SaddlepointError, UsageError
from saddlepoint.service.chat import Choice, Served
from saddlepoint.service.errors import ApiError
from saddlepoint.service.routing import sees
from saddlepoint.types import Chat, Query

if TYPE_CHECKING:
    from saddlepoint.service.app import Service

IN_FLIGHT = 64  # requests that are answered at once; more are told to come again
LOOK = 0.2  # seconds between two looks whether the client is still there


class Framed(Protocol):
    """The response to one request: what its choices stand in."""

    served: Served
    choices: list[Choice]

    @property
    def usage(self) -> dict[str, Any]: ...

    @property
    def whole(self) -> dict[str, Any]: ...

    def chunk(self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]: ...

    @property
    def ending(self) -> Iterator[dict[str, Any]]: ...


@dataclass(eq=False)
class Answering:
    """One request under way that a model answers.

    Args:
        begin: From the model to a query for each choice that is to be written, and what the choices stand in. Called in a thread.
    """

    service: "Service"
    request: Request
    model: str
    stream: bool
    begin: Callable[[Served], tuple[list[Query], Framed]]
    stop: Event = field(default_factory=Event)

    async def respond(self) -> Response:
        """The response, whole or as a stream of events."""
        if self.service.chats >= IN_FLIGHT:
            raise ApiError(429, f"{IN_FLIGHT} chats are being answered; try again", "rate_limit_exceeded", headers={"retry-after": "1"})
        self._count(1)
        self.request.state.endings.append(self._end)
        try:
            loop = asyncio.get_running_loop()
            served = await loop.run_in_executor(self.service.pool, self.service.model, self.model, sees(self.request))
            queries, answer = await loop.run_in_executor(self.service.pool, self.begin, served)
            inbox: asyncio.Queue[tuple[int, dict[str, Any] | Exception | None]] = asyncio.Queue()

            def write(choice: Choice) -> None:
                found: Exception | None = None
                pieces = choice.deltas(served, queries[choice.index])
                try:
                    for delta in pieces:
                        if self.stop.is_set():
                            break
                        loop.call_soon_threadsafe(inbox.put_nowait, (choice.index, delta))
                except Exception as wrong:  # whoever waits for it must get something
                    found = wrong
                finally:
                    pieces.close()  # type: ignore[attr-defined]
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(inbox.put_nowait, (choice.index, found))

            for choice in answer.choices[: len(queries)]:
                self.service.pool.submit(write, choice)
            events = self._events(inbox, len(queries))
            if not self.stream:
                async for _ in events:
                    pass
                self._settle(answer, queries)
                return JSONResponse(answer.whole)
            first = await anext(events)  # what fails at once is an error with its own status, not the beginning of a stream
        except BaseException:
            self.stop.set()
            raise
        lines = self._lines(answer, first, events, queries)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def _events(self, inbox: "asyncio.Queue[Any]", left: int) -> AsyncIterator[tuple[int, dict[str, Any] | None]]:
        """What comes of the choices; None ends one. Looks now and then whether the client is still there."""
        told, looked = False, time.monotonic()
        while left:
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                if await self.request.is_disconnected():
                    raise ApiError(400, "the client has gone", "broken_off")
            try:
                index, event = await asyncio.wait_for(inbox.get(), LOOK)
            except TimeoutError:
                continue
            if isinstance(event, Exception):
                self.stop.set()
                raise as_error(event)
            if event and not told and (event["delta"].get("content") or event["delta"].get("tool_calls")):
                told = True
                self.service.meters.first_token.observe(time.monotonic() - self.request.state.began)
            left -= event is None
            yield index, event

    async def _lines(self, answer: Framed, first: Any, events: AsyncIterator[Any], queries: list[Query]) -> AsyncIterator[str]:
        """The stream, as server-sent events."""
        begun: set[int] = set()
        try:
            index, event = first
            while True:
                choice = answer.choices[index]
                if index not in begun:
                    begun.add(index)
                    yield _line(answer.chunk(index, {"role": "assistant", "content": "", "refusal": None}))
                if event is None:
                    yield _line(answer.chunk(index, {}, finish=choice.finish))
                else:
                    yield _line(answer.chunk(index, event["delta"], event["logprobs"]))
                try:
                    index, event = await anext(events)
                except StopAsyncIteration:
                    break
            for chunk in answer.ending:
                yield _line(chunk)
            yield "data: [DONE]\n\n"
        except ApiError as wrong:
            yield _line(wrong.body)
        finally:
            self.stop.set()
            self._settle(answer, queries)

    def _settle(self, answer: Framed, queries: list[Query]) -> None:
        """Count what it cost and record what guards said."""
        meters, state = self.service.meters, self.request.state
        meters.tokens.labels("prompt").inc(answer.usage["prompt_tokens"])
        meters.tokens.labels("completion").inc(answer.usage["completion_tokens"])
        meters.tokens.labels("defense").inc(sum(c.extra_tokens for c in answer.choices))
        said = [s for c in answer.choices for s in c.said]
        for defense, direction, withheld in {(s.defense, s.direction, s.withheld) for s in said if s.check.reason}:
            (meters.blocks if withheld else meters.flagged).labels(defense, direction).inc()
        written: set[Chat] = set()
        for choice, query in zip(answer.choices, queries, strict=False):
            found = [s for s in choice.said if s.direction == "output" or query.chat not in written]  # the choices of one prompt share it
            self.service.log.write(state.request_id, state.key, answer.served.name, query.chat, found)
            written.add(query.chat)

    def _end(self) -> None:
        self.stop.set()
        self._count(-1)

    def _count(self, by: int) -> None:
        self.service.chats += by
        self.service.meters.in_flight.inc(by)


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


def as_error(wrong: Exception) -> ApiError:
    """An exception of the work as an error of the protocol."""
    if isinstance(wrong, ApiError):
        return wrong
    if isinstance(wrong, UsageError):
        return ApiError(400, str(wrong), "invalid_value")
    if isinstance(wrong, SaddlepointError):
        return ApiError(502, str(wrong), "upstream_error")
    logging.getLogger("saddlepoint").error("a chat failed", exc_info=wrong)
    return ApiError(500, "the server failed; its log says why", "internal_error")
