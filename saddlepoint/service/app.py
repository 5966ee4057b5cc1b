"""The application: routes over the models that are served. Blocking work runs in threads, so that the loop is always free."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from threading import Event
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from saddlepoint import __version__
from saddlepoint.errors import SaddlepointError, UsageError
from saddlepoint.service import files, graders, jobs, models, uploads
from saddlepoint.service.background import living
from saddlepoint.service.blocks import BlockLog
from saddlepoint.service.chat import Answer, Choice, Served, moderated, read
from saddlepoint.service.errors import ApiError
from saddlepoint.service.gate import Gate, Keys
from saddlepoint.service.meters import Meters
from saddlepoint.service.routing import Tuning
from saddlepoint.service.rows import Refused
from saddlepoint.service.wire import ChatRequest, ModerationRequest

IN_FLIGHT = 64  # chats that are answered at once; more are told to come again
THREADS = 128  # choices that are written at once
LOOK = 0.2  # seconds between two looks whether the client is still there


@dataclass(eq=False)
class Service:
    """What a server knows. Models may be added and taken away while it runs.

    Args:
        models: By the names under which they are asked.
    """

    models: dict[str, Served]
    log: BlockLog = field(default_factory=BlockLog)
    meters: Meters = field(default_factory=Meters)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="chats"))
    chats: int = 0

    @classmethod
    def of(cls, models: Iterable[Served], **more: Any) -> "Service":
        return cls({served.name: served for served in models}, **more)

    def model(self, name: str) -> Served:
        """A model by its name.

        Raises:
            ApiError: There is none.
        """
        if name not in self.models:
            said = f"The model '{name}' does not exist; there are: {', '.join(sorted(self.models))}"
            raise ApiError(404, said, "model_not_found", "model")
        return self.models[name]


def create(
    service: Service,
    keys: Keys | None = None,
    rate: float = 0.0,
    max_body: int = 1 << 20,
    upload_seconds: float = 30.0,
    open_hosts: frozenset[str] = frozenset(),
    tuning: Tuning | None = None,
) -> FastAPI:
    """The application of a service; see `Gate` for who may ask what.

    Args:
        tuning: Files, fine-tuning jobs and their models; None leaves those routes out.
    """
    lifespan = living(tuning) if tuning else None
    app = FastAPI(title="Saddlepoint", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json", lifespan=lifespan)
    app.state.service = service
    limits: dict[str, Any] = {
        "rate": rate,
        "max_body": max_body,
        "max_file": tuning.max_file if tuning else 0,
        "upload_seconds": upload_seconds,
    }
    app.add_middleware(Gate, meters=service.meters, keys=keys, open_hosts=open_hosts, **limits)

    @app.exception_handler(ApiError)
    async def told(_: Request, wrong: ApiError) -> Response:
        return wrong.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, wrong: RequestValidationError) -> Response:
        first, *others = wrong.errors()
        where = _field(first["loc"])
        if first["type"] == "extra_forbidden":
            return ApiError(400, f"no such parameter: '{where}'", "unknown_parameter", where).response
        said = dict.fromkeys(one["msg"] for one in (first, *others) if _field(one["loc"]) == where)
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        return ApiError(400, f"{where or 'the body'}: {' or '.join(said)}", code, where or None).response

    @app.exception_handler(Refused)
    async def refused(_: Request, wrong: Refused) -> Response:
        return ApiError(400, str(wrong), wrong.code, wrong.param).response

    @app.exception_handler(HTTPException)
    async def http(request: Request, wrong: HTTPException) -> Response:
        said = {404: f"Unknown request URL: {request.method} {request.url.path}", 405: f"{request.method} is not allowed here"}
        code = "unknown_url" if wrong.status_code == 404 else None
        status = 400 if wrong.status_code in (409, 422) else wrong.status_code
        return ApiError(status, said.get(wrong.status_code, str(wrong.detail)), code, headers=dict(wrong.headers or {})).response

    @app.exception_handler(Exception)
    async def broken(_: Request, wrong: Exception) -> Response:
        return ApiError(500, "the server failed; its log says why", "internal_error").response

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server runs; needs no key."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Meters in Prometheus' format."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(models.routes(service.models, tuning))
    app.include_router(graders.routes(lambda name, request: service.model(name), service.meters))
    if tuning:
        for part in (files, uploads, jobs):
            app.include_router(part.routes(tuning))

    @app.post("/v1/moderations")
    async def create_moderation(body: ModerationRequest) -> dict[str, Any]:
        """What the guards say of a text; `model` may name a served model, whose stack is then asked."""
        served = service.models.get(body.model or "", next(iter(service.models.values())))
        if not served.guarding("input") + served.guarding("output"):
            raise ApiError(400, "no guard of this server says something of a text; serve with --defense", "no_guard")
        texts = [body.input] if isinstance(body.input, str) else [one if isinstance(one, str) else one.text for one in body.input]
        if any(text is None for text in texts):
            raise ApiError(400, "this server reads text; leave images out", "invalid_value", "input")
        spent = lambda tokens: service.meters.tokens.labels("defense").inc(tokens)
        ask = lambda: [moderated(served, text or "", spent) for text in texts]
        results = await asyncio.get_running_loop().run_in_executor(service.pool, ask)
        return {"id": f"modr-{int(time.time() * 1e6):x}", "model": served.name, "results": results}

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a chat, whole or as a stream."""
        return await _Chat(service, body, request).respond()

    return app


@dataclass(eq=False)
class _Chat:
    """One chat request under way."""

    service: Service
    body: ChatRequest
    request: Request
    stop: Event = field(default_factory=Event)

    async def respond(self) -> Response:
        served = self.service.model(self.body.model)
        if self.service.chats >= IN_FLIGHT:
            raise ApiError(429, f"{IN_FLIGHT} chats are being answered; try again", "rate_limit_exceeded", headers={"retry-after": "1"})
        self._count(1)
        self.request.state.endings.append(self._end)
        try:
            loop = asyncio.get_running_loop()
            queries = await loop.run_in_executor(self.service.pool, read, self.body, served)
            answer = Answer(self.body, served, [Choice(i, self.body) for i in range(len(queries))])
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

            for choice in answer.choices:
                self.service.pool.submit(write, choice)
            events = self._events(inbox, len(queries))
            if not self.body.stream:
                async for _ in events:
                    pass
                self._settle(answer, queries[0].chat)
                return JSONResponse(answer.whole)
            first = await anext(events)  # what fails at once is an error with its own status, not the beginning of a stream
        except BaseException:
            self.stop.set()
            raise
        lines = self._lines(answer, first, events, queries[0].chat)
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
                raise _told(event)
            if event and not told and (event["delta"].get("content") or event["delta"].get("tool_calls")):
                told = True
                self.service.meters.first_token.observe(time.monotonic() - self.request.state.began)
            left -= event is None
            yield index, event

    async def _lines(self, answer: Answer, first: Any, events: AsyncIterator[Any], chat: Any) -> AsyncIterator[str]:
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
            self._settle(answer, chat)

    def _settle(self, answer: Answer, chat: Any) -> None:
        """Count what it cost and record what guards said."""
        meters, state = self.service.meters, self.request.state
        meters.tokens.labels("prompt").inc(answer.usage["prompt_tokens"])
        meters.tokens.labels("completion").inc(answer.usage["completion_tokens"])
        meters.tokens.labels("defense").inc(sum(c.extra_tokens for c in answer.choices))
        said = [s for c in answer.choices for s in c.said]
        for defense, direction, withheld in {(s.defense, s.direction, s.withheld) for s in said if s.check.reason}:
            (meters.blocks if withheld else meters.flagged).labels(defense, direction).inc()
        if any(s.check.reason for s in said):
            self.service.log.write(state.request_id, state.key, answer.served.name, chat, said)

    def _end(self) -> None:
        self.stop.set()
        self._count(-1)

    def _count(self, by: int) -> None:
        self.service.chats += by
        self.service.meters.in_flight.inc(by)


def _field(loc: tuple[int | str, ...]) -> str:
    """The field that a mistake is in, without what pydantic calls the alternatives of a union."""
    names = (str(part) for part in loc[loc[0] in ("body", "query", "path") :])
    return ".".join(takewhile(re.compile(r"\w+").fullmatch, names))


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


def _told(wrong: Exception) -> ApiError:
    """An exception of the work as an error of the protocol."""
    if isinstance(wrong, ApiError):
        return wrong
    if isinstance(wrong, UsageError):
        return ApiError(400, str(wrong), "invalid_value")
    if isinstance(wrong, SaddlepointError):
        return ApiError(502, str(wrong), "upstream_error")
    logging.getLogger("saddlepoint").error("a chat failed", exc_info=wrong)
    return ApiError(500, "the server failed; its log says why", "internal_error")
