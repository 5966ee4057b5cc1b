"""The application: routes over the models that are served. Blocking work runs in threads, so that the loop is always free."""

import asyncio
import logging
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from saddlepoint import __version__
from saddlepoint.errors import SaddlepointError, StoreError
from saddlepoint.service import completions, embeddings, files, graders, jobs, models, uploads
from saddlepoint.service.adapters import Adapters
from saddlepoint.service.answering import Answering, as_error
from saddlepoint.service.background import living
from saddlepoint.service.blocks import BlockLog
from saddlepoint.service.chat import Answer, Choice, Served, moderated, read
from saddlepoint.service.errors import TOLD, ApiError
from saddlepoint.service.gate import Gate, Keys
from saddlepoint.service.meters import Meters
from saddlepoint.service.routing import EVERYONE, Tuning, sees
from saddlepoint.service.rows import Refused
from saddlepoint.service.wire import ChatRequest, ModerationRequest
from saddlepoint.types import Query

THREADS = 128  # choices that are written at once


@dataclass(eq=False)
class Service:
    """What a server knows. Models may be added and taken away while it runs.

    Args:
        models: By the names under which they are asked.
        adapters: The fine-tuned ones.
    """

    models: dict[str, Served]
    adapters: Adapters | None = None
    log: BlockLog = field(default_factory=BlockLog)
    meters: Meters = field(default_factory=Meters)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="chats"))
    chats: int = 0

    @classmethod
    def of(cls, models: Iterable[Served], **more: Any) -> "Service":
        return cls({served.name: served for served in models}, **more)

    def model(self, name: str, owner: str | None = EVERYONE) -> Served:
        """A model by its name: a base, or a fine-tuned one that `owner` may see (None sees all).

        Raises:
            ApiError: There is none.
        """
        if name not in self.models:
            if self.adapters and (found := self.adapters.served(name, owner)):
                return found
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
    about: dict[str, Any] = {"title": "Saddlepoint", "version": __version__, "responses": {"default": TOLD}}
    app = FastAPI(**about, docs_url=None, redoc_url=None, openapi_url="/openapi.json", lifespan=lifespan)
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
    async def invalid(request: Request, wrong: RequestValidationError) -> Response:
        first, *others = wrong.errors()
        where = _field(first["loc"])
        if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
            return ApiError(400, "send the body as JSON, with the header content-type: application/json", "invalid_content_type").response
        if first["type"] == "extra_forbidden":
            return ApiError(400, f"no such parameter: '{where}'", "unknown_parameter", where).response
        said = dict.fromkeys(one["msg"] for one in (first, *others) if _field(one["loc"]) == where)
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        return ApiError(400, f"{where or 'the body'}: {' or '.join(said)}", code, where or None).response

    @app.exception_handler(Refused)
    async def refused(_: Request, wrong: Refused) -> Response:
        return ApiError(400, str(wrong), wrong.code, wrong.param).response

    @app.exception_handler(SaddlepointError)
    async def failed(_: Request, wrong: SaddlepointError) -> Response:
        return as_error(wrong).response

    @app.exception_handler(StoreError)
    async def unreachable(_: Request, wrong: StoreError) -> Response:
        logging.getLogger("saddlepoint").error("%s", wrong)
        said = "the server's database or files cannot be had just now; try again"
        return ApiError(503, said, "server_unavailable", headers={"retry-after": "1"}).response

    @app.exception_handler(HTTPException)
    async def http(request: Request, wrong: HTTPException) -> Response:
        said = {404: f"Unknown request URL: {request.method} {request.url.path}", 405: f"{request.method} is not allowed here"}
        code = "unknown_url" if wrong.status_code == 404 else None
        status = 400 if wrong.status_code in (409, 422) else wrong.status_code
        return ApiError(status, said.get(wrong.status_code, str(wrong.detail)), code, headers=dict(wrong.headers or {})).response

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server runs; needs no key."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Meters in Prometheus' format."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(models.routes(service.models, tuning))
    app.include_router(completions.routes(service))
    app.include_router(embeddings.routes(service))
    app.include_router(graders.routes(lambda name, request: service.model(name, sees(request)), service.meters))
    if tuning:
        for part in (files, uploads, jobs):
            app.include_router(part.routes(tuning))

    @app.post("/v1/moderations")
    async def create_moderation(body: ModerationRequest, request: Request) -> dict[str, Any]:
        """What the guards say of a text: of the stack of the served or fine-tuned model that `model` names, else of the first base's."""
        texts = [body.input] if isinstance(body.input, str) else [one if isinstance(one, str) else one.text for one in body.input]
        if any(text is None for text in texts):
            raise ApiError(400, "this server reads text; leave images out", "invalid_value", "input")
        spent = lambda tokens: service.meters.tokens.labels("defense").inc(tokens)
        tuned = (body.model or "").startswith("ft:")
        named = body.model if body.model and (tuned or body.model in service.models) else next(iter(service.models))

        def ask() -> dict[str, Any]:
            served = service.model(named, sees(request))
            if not served.guarding("input") + served.guarding("output"):
                raise ApiError(400, "no guard of this server says something of a text; serve with --defense", "no_guard")
            return {"model": served.name, "results": [moderated(served, text or "", spent) for text in texts]}

        return {"id": f"modr-{int(time.time() * 1e6):x}", **await asyncio.get_running_loop().run_in_executor(service.pool, ask)}

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a chat, whole or as a stream."""

        def begin(served: Served) -> tuple[list[Query], Answer]:
            queries = read(body, served)
            return queries, Answer(body, served, [Choice(i, body) for i in range(len(queries))])

        return await Answering(service, request, body.model, bool(body.stream), begin).respond()

    return app


def _field(loc: tuple[int | str, ...]) -> str:
    """The field that a mistake is in, without what pydantic calls the alternatives of a union."""
    names = (str(part) for part in loc[loc[0] in ("body", "query", "path") :])
    return ".".join(takewhile(re.compile(r"(?!(?:str|int|float)$)\w+").fullmatch, names))
