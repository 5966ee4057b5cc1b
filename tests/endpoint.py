"""An OpenAI-compatible endpoint on 127.0.0.1 that plays a script: right answers, wrong ones, slow ones, and none at all.

with Endpoint(says("hello")) as endpoint:                    # every request gets this answer
with Endpoint(fails(500), cuts(), says("hello")) as endpoint:  # in turn; the last one is repeated
with Endpoint(lambda asked: says(asked["messages"][-1]["content"])) as endpoint:  # by what is asked
    OpenAI.at(endpoint.name).generate([...])
    endpoint.asked, endpoint.times, endpoint.most_at_once
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Answer:
    """What one request gets. `seconds` pass first; `cut` then closes the connection without a byte."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cut: bool = False


def says(
    text: str | None, finish: str | None = "stop", seconds: float = 0.0, usage: Any = (7, 3), logprobs: Any = None, **message: Any
) -> Answer:
    """A right answer. `usage` is (prompt tokens, completion tokens), or what else to send in its place."""
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": 0}
    choice = {"index": 0, "finish_reason": finish, "logprobs": logprobs, "message": {"role": "assistant", "content": text, **message}}
    return sends({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}, seconds=seconds)


def sends(body: Any, status: int = 200, seconds: float = 0.0, **headers: str) -> Answer:
    """Any JSON, or bytes as they are. `retry_after="3"` sends the header `retry-after: 3`."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Answer(status, raw, {"content-type": "application/json"} | named, seconds)


def fails(status: int, message: str = "no luck", code: str | None = None, **headers: str) -> Answer:
    """An error as OpenAI words it."""
    return sends({"error": {"message": message, "type": "error", "param": None, "code": code}}, status, **headers)


def hangs(seconds: float = 30.0) -> Answer:
    """Silence, longer than the client's patience."""
    return Answer(seconds=seconds, cut=True)


def cuts() -> Answer:
    """The connection closes at once."""
    return Answer(cut=True)


Script = Callable[[dict[str, Any]], Answer]


class Endpoint:
    """The server; a context manager. It answers POST /v1/chat/completions by its script and GET /v1/models with `models`.

    Args:
        script: Answers in turn, of which the last is repeated, or one function from a request's JSON to its answer.
        models: The names that GET /v1/models lists, or the answer that it gives.

    Attributes:
        asked: The JSON of every chat request, in the order of arrival; `headers` and `times` (seconds) go with it.
        most_at_once: Most chat requests that were ever open together.
    """

    def __init__(self, *script: Answer | Script, models: tuple[str, ...] | Answer = ("m",)):
        self.play(*script)
        self._models = models if isinstance(models, Answer) else sends({"object": "list", "data": [{"id": name} for name in models]})
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"endpoint": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def name(self) -> str:
        return f"{self.url}#m"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def play(self, *script: Answer | Script) -> None:
        """Play this script from now on, and forget what was asked before."""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._open = 0
        self._script = script or (says("ok"),)

    def waits(self) -> list[float]:
        """Seconds between each request and the one before it."""
        return [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]

    def chat(self, handler: "_Handler", asked: dict[str, Any]) -> None:
        with self._lock:
            turn = self._script[min(len(self.asked), len(self._script) - 1)]
            self.asked.append(asked)
            self.headers.append({key.lower(): value for key, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        answer = turn if isinstance(turn, Answer) else turn(asked)
        self._closing.wait(answer.seconds)
        with self._lock:  # before the answer, so that the client's next request cannot overlap this one
            self._open -= 1
        handler.give(answer)

    def list_models(self, handler: "_Handler") -> None:
        self._closing.wait(self._models.seconds)
        handler.give(self._models)


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/chat/completions":
            self.endpoint.chat(self, asked)
        else:
            self.give(fails(404, "no such path"))

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.endpoint.list_models(self)
        else:
            self.give(fails(404, "no such path"))

    def give(self, answer: Answer) -> None:
        self.close_connection = answer.cut
        if answer.cut:
            return
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
