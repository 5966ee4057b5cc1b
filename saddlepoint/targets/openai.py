"""Any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, Ollama, hosted ones), many requests at once.

Requests go over aiohttp from one event loop in a thread of its own. The official client costs six times the processor time
for each request, even over the same transport, which on a fast endpoint is more than the network: see docs/MEASURED.md.

A prefill is sent as a last assistant message with `continue_final_message` (the convention of vLLM and SGLang). A server
that refuses it gives error completions; one that ignores it may start a new turn instead, so try one by hand first.
A field that the server refuses is left out from then on: `max_tokens` (for `max_completion_tokens`) and `seed`, without
which equal queries may get different answers.
"""

import asyncio
import json
import os
import re
import weakref
from asyncio import sleep
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from queue import SimpleQueue
from random import Random
from threading import Event
from time import time
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from saddlepoint.errors import TargetError, UsageError
from saddlepoint.targets import _network
from saddlepoint.types import Chat, Completion, Query, Shaping

_FORM = "http://HOST:PORT/v1#MODEL"
_NAME = re.compile(r"(https?://[^\s/?#@]+[^\s?#@]*)(?:\?([^\s#]*))?(?:#(.*))?")
_SETTINGS: dict[str, type] = {"concurrency": int, "timeout": float, "retries": int, "backoff": float}
_PASSING = (408, 409, 429, *range(500, 600))  # statuses that are worth another try
_GARBAGE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # what reading a broken answer raises
_NETWORK = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
_FINISH: dict[Any, Literal["stop", "length", "filter"]] = {"length": "length", "content_filter": "filter"}


class _Refused(Exception):
    """An answer with a status other than 2xx. `said` is its JSON, without the envelope that most wrap an error in, or its text."""

    def __init__(self, status: int, raw: bytes, headers: Mapping[str, str]):
        self.status, self.headers = status, headers
        try:
            said = json.loads(raw)
        except (ValueError, RecursionError):
            said = raw.decode("utf-8", "replace")
        self.said: Any = said.get("error", said) if isinstance(said, dict) else said

    def __str__(self) -> str:
        said = (self.said.get("message") if isinstance(self.said, dict) else None) or self.said or "no reason given"
        return f"HTTP {self.status}: {' '.join(str(said).split())[:200]}"


class _CutShort(Exception):
    """An answer that begins as JSON and breaks off: worth another try, unlike one that is something else altogether."""


@dataclass(eq=False)
class OpenAI:
    """A model behind an endpoint. Implements `Stream`, `Streaming` and `Shapes`. The key comes from the environment variable OPENAI_API_KEY."""

    url: str  # up to the version, such as http://127.0.0.1:8000/v1
    model: str
    concurrency: int = 8  # most requests in flight, over all threads, >= 1
    timeout: float = 60.0  # longest silence of the server, seconds, > 0
    retries: int = 4  # most further tries of one query, >= 0
    backoff: float = 1.0  # wait before the first retry, seconds, >= 0; doubled each time; `retry-after` wins; at most 60 s

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0 or self.backoff < 0:
            raise UsageError(f"concurrency must be >= 1, timeout > 0, retries and backoff >= 0; got {self!r}")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        if not re.fullmatch("[!-~]+", key):  # the HTTP library's own error would show it
            raise UsageError("OPENAI_API_KEY holds a space, a line break or a character that is not ASCII; copy the key again")
        self._proxy = _checked(self.url)
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(self.concurrency)
        self._refused: frozenset[str] = frozenset()  # request fields that this server does not take

    @classmethod
    def at(cls, name: str, **settings: Any) -> "OpenAI":
        """Open `http://HOST:PORT/v1#MODEL`; without `#MODEL`, the only model that the endpoint lists.

        `http://HOST:PORT/v1?concurrency=64&timeout=120#MODEL` sets concurrency, timeout, retries or backoff.

        Raises:
            UsageError: The name has another form, or names no model where the endpoint does not list exactly one.
            TargetError: Nothing answers there, or it refuses the key.
        """
        if not (form := _NAME.fullmatch(name)):
            raise UsageError(f"no endpoint '{name.rpartition('@')[2]}'; write {_FORM}, and a key into the variable OPENAI_API_KEY")
        try:
            settings |= {key: _SETTINGS[key](value) for key, value in parse_qsl(form[2] or "", keep_blank_values=True)}
        except (KeyError, ValueError) as wrong:
            raise UsageError(f"'{name}': {wrong}; allowed after ?: {', '.join(_SETTINGS)}, each a number; write {_FORM}") from None
        target = cls(form[1].rstrip("/"), form[3] or "", **settings)
        served: list[str] = []
        try:
            answer = _network.run(target._http("GET", "models"))
            served = [str(one["id"]) for one in answer["data"]]
        except _NETWORK as wrong:
            raise TargetError(f"nothing answers at {target.url}: {_cause(wrong)}; start the server, or write {_FORM}") from wrong
        except _Refused as wrong:  # some endpoints have no list, and some keys may not see it
            if wrong.status in (401, 403) and not target.model:
                raise TargetError(f"{target.url}: {target._why(wrong)}") from wrong
        except (_CutShort, *_GARBAGE):
            pass
        if not target.model and len(served) != 1:
            raise UsageError(f"'{name}' names no model; write {_FORM}; the endpoint lists: {', '.join(served[:9]) or 'none'}")
        target.model = target.model or served[0]
        return target

    @property
    def name(self) -> str:
        return f"{self.url}#{self.model}"

    def begin(self, queries: Sequence[Query], answered: Callable[[int, Completion | Exception], None], stop: Event) -> None:
        """Ask, up to `concurrency` at once, and return; tell the place and the answer of each query as it comes, from another thread.

        A query that fails is a Completion with `error`; a TargetError means that every query would fail. Once `stop` is
        set, nothing more is sent.
        """

        _network.begin(self._answer, queries, answered, stop)

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """Answer each query, in order, up to `concurrency` at once. A query that fails is a Completion with `error`.

        Raises:
            TargetError: The endpoint refuses the key (401, 403) or has no such model (404), so that every query would fail.
        """
        return _network.generate(self, queries)

    def stream(self, query: Query) -> Generator[Completion, None, None]:
        """The answer to a query in pieces, as the endpoint sends them. Closing the iterator closes the connection.

        Only what fails before the first piece is tried again. An endpoint that does not stream gives one piece.

        Raises:
            TargetError: As `generate`.
        """
        inbox = SimpleQueue[Completion | Future[Completion]]()
        last = _network.start(self._answer(query, Event(), inbox.put))
        last.add_done_callback(inbox.put)
        try:
            while isinstance(piece := inbox.get(), Completion):
                yield piece
            yield last.result()
        finally:
            last.cancel()

    def room(self, chat: Chat) -> int:
        """No bound: only the endpoint knows its context."""
        return 1 << 30

    def misshapen(self, shaping: Shaping) -> str:
        """Endpoints take JSON schemas and no other grammar; whether one takes this schema, it says when it is asked."""
        return "" if shaping.grammar[:1] in ("", "{") else "an endpoint takes a JSON schema and no other grammar"

    def post(self, path: str, body: dict[str, Any]) -> str:
        """What the endpoint answers to JSON that is sent to a route of its own, such as vLLM's `load_lora_adapter`.

        Raises:
            TargetError: It answers with an error, or not at all.
        """
        try:
            return str(_network.run(self._http("POST", path, body, lambda answer: answer.text())))
        except (_Refused, *_NETWORK) as wrong:
            raise TargetError(f"{self.url}/{path}: {wrong if isinstance(wrong, _Refused) else self._why(wrong)}") from wrong

    async def _answer(self, query: Query, stop: Event, listen: Callable[[Completion], None] | None = None) -> Completion:
        """The answer; where somebody listens to its pieces, only the last of them, which says how it ended."""
        if query.bare or any(m.soft or m.ids for m in query.chat):
            said = f"{self.name}: texts without a chat, soft embeddings and token ids cannot be sent to an endpoint; take a local model"
            return Completion("", finish="error", error=said)
        faults: list[str] = []
        for attempt in range(self.retries + 1):
            try:
                async with self._slots:  # not held while waiting to try again
                    if stop.is_set():
                        return Completion("", finish="error", error="not sent, the run has stopped")
                    found = await self._send(self._request(query), listen)
                return replace(found, faults=tuple(faults)) if faults else found
            except (_Refused, _CutShort, *_NETWORK, *_GARBAGE) as error:
                wrong: Any = error
            status = wrong.status if isinstance(wrong, _Refused) else 0
            if status in (401, 403, 404):
                raise TargetError(f"{self.name}: {self._why(wrong)}") from wrong
            if status and isinstance(wrong.said, dict) and wrong.said.get("code") == "content_filter":  # how Azure filters a prompt
                return Completion("", finish="filter", faults=tuple(faults))
            why = " ".join(self._why(wrong).split())
            faults.append(why.partition(";")[0])
            if attempt == self.retries or not (status in _PASSING or isinstance(wrong, (_CutShort, *_NETWORK))):
                break
            wait = self.backoff * 2 ** min(attempt, 9) * Random(f"{query}{attempt}").uniform(0.5, 1)
            await sleep(min(_asked_wait(wrong.headers, wait) if status else wait, 60.0))
            if stop.is_set():
                break
        return Completion("", finish="error", error=f"{self.name}: {why} (tries: {attempt + 1})", faults=tuple(faults))

    def _request(self, query: Query) -> dict[str, Any]:
        draw = query.sampling
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.text} for message in query.chat],
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens": draw.max_tokens,
        }
        if "seed" not in self._refused:
            request["seed"] = draw.seed
        if draw.top_logprobs > 0:
            request |= {"logprobs": True, "top_logprobs": draw.top_logprobs}
        shaping = query.shaping
        if shaping.bias:
            request["logit_bias"] = {str(token): bias for token, bias in shaping.bias}
        request |= {f"{name}_penalty": p for name in ("presence", "frequency") if (p := getattr(shaping, name))}
        if shaping.grammar:
            schema = {"name": "answer", "schema": json.loads(shaping.grammar), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        if query.chat and query.chat[-1].role == "assistant":
            request |= {"continue_final_message": True, "add_generation_prompt": False}
        return request

    async def _send(self, request: dict[str, Any], listen: Callable[[Completion], None] | None) -> Completion:
        """Send once; where the server refuses a field that it can do without, once more without that."""
        try:
            if listen is None:
                return _read(await self._http("POST", "chat/completions", request))
            streamed: Completion = await self._http(
                "POST",
                "chat/completions",
                request | {"stream": True, "stream_options": {"include_usage": True}},
                lambda answer: self._pieces(answer, listen),
            )
            return streamed
        except _Refused as wrong:
            said, other = str(wrong.said), dict(request)
            if "max_tokens" in said and "max_tokens" in other:
                other["max_completion_tokens"] = other.pop("max_tokens")
            if "seed" in said:
                other.pop("seed", None)
            if wrong.status not in (400, 422) or other == request:
                raise
        answer = await self._send(other, listen)
        self._refused |= request.keys() - other.keys()  # only now is it known that the field was the trouble
        return answer

    async def _pieces(self, answer: aiohttp.ClientResponse, listen: Callable[[Completion], None]) -> Completion:
        """Tell each piece of a stream of events; the last one, with what it cost, is returned."""
        if answer.content_type != "text/event-stream":
            return _read(await _json(answer))
        begun, last = False, Completion("", finish="error")
        try:
            async for line in answer.content:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                chunk = json.loads(line[5:])
                if "error" in chunk:
                    raise _Refused(500, line[5:], {})
                piece = _chunk(chunk)
                last = (
                    replace(last, prompt_tokens=piece.prompt_tokens, completion_tokens=piece.completion_tokens)
                    if chunk.get("usage")
                    else last
                )
                if reason := next((c.get("finish_reason") for c in chunk.get("choices") or ()), None):
                    last = replace(last, finish=_FINISH.get(reason, "stop"))
                if piece.text or piece.drawn:
                    begun = True
                    listen(replace(piece, prompt_tokens=0, completion_tokens=0))
            if last.finish == "error":
                raise _CutShort("the stream ended without a finish_reason")
        except (_Refused, _CutShort, *_NETWORK, *_GARBAGE) as wrong:
            if not begun:
                raise
            return replace(last, finish="error", error=f"{self.name}: {self._why(wrong)}")
        return last

    async def _http(
        self, method: str, path: str, body: Any = None, read: Callable[[aiohttp.ClientResponse], Awaitable[Any]] | None = None
    ) -> Any:
        """What `read` makes of one answer; its JSON if not given."""
        if self._session is None:
            silence = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout)
            connector = aiohttp.TCPConnector(limit=0)  # the slots are the limit
            self._session = aiohttp.ClientSession(connector=connector, timeout=silence, headers=self._headers)
            weakref.finalize(self, lambda session: _network.close(session.close()), self._session)
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        async with self._session.request(method, f"{self.url}/{path}", data=data, proxy=self._proxy) as answer:
            if not 200 <= answer.status < 300:
                raise _Refused(answer.status, await answer.read(), answer.headers)
            return await (read or _json)(answer)

    def _why(self, wrong: Exception) -> str:
        """What went wrong, in words of which those before the first colon or comma name its kind; then what to do."""
        match wrong:
            case _Refused(status=401 | 403):
                return f"{wrong}; put the right key into the environment variable OPENAI_API_KEY"
            case _Refused(status=404):
                return f"{wrong}; write {_FORM} with a model of {self.url}/models"
            case _Refused(status=status):
                return f"{wrong}; " + ("lower concurrency or see its log" if status in _PASSING else "change what the message names")
            case asyncio.TimeoutError():
                return f"timeout, nothing came for {self.timeout:g} s; raise timeout or lower concurrency"
            case aiohttp.ClientError() | OSError():
                return f"connection failed, {_cause(wrong)}; check that the server still runs"
            case _CutShort():
                return f"broken JSON, {wrong}; check that the server still runs"
            case UnicodeEncodeError():
                return "not sent, the chat holds half a character (a lone surrogate); leave it out"
        return f"HTTP 200 without a usable answer, {wrong}; check that it is an OpenAI-compatible endpoint"


async def _json(answer: aiohttp.ClientResponse) -> Any:
    raw = await answer.read()
    try:
        return json.loads(raw)
    except json.JSONDecodeError as wrong:
        if raw.lstrip()[:1] in (b"{", b"["):
            raise _CutShort(str(wrong)) from wrong
        raise ValueError(f"{wrong} in {raw[:60]!r}") from wrong


def _checked(url: str) -> str | None:
    """The proxy that the environment names for `url`, if any.

    Raises:
        UsageError: It has no valid host or port.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        if not host:
            raise ValueError("it has no host")
        if re.fullmatch(r"[\d.]+", host):
            ip_address(host)
    except ValueError as wrong:
        raise UsageError(f"no endpoint '{url}': {wrong}; write {_FORM}") from None
    found = getproxies()
    return None if proxy_bypass(host) else found.get(parts.scheme) or found.get("all")


def _cause(wrong: BaseException) -> str:
    if isinstance(wrong, asyncio.TimeoutError):
        return "timed out"
    if isinstance(wrong, aiohttp.TooManyRedirects):
        return f"redirected {len(wrong.history)} times"
    number = getattr(wrong, "errno", None)
    return os.strerror(number) if isinstance(number, int) else str(getattr(wrong, "message", "") or wrong or type(wrong).__name__)


def _read(answer: Any) -> Completion:
    if not isinstance(answer, dict) or not answer.get("choices"):
        raise ValueError(f"no choices in {str(answer)[:100]!r}")
    choice = answer["choices"][0]
    text, reason = choice["message"].get("content"), choice.get("finish_reason")
    finish = _FINISH.get(reason, "stop")
    text = "" if text is None and finish == "filter" else text
    if not isinstance(text, str):
        raise TypeError(f"content {repr(text)[:60]}, finish_reason {reason!r} (if the model thinks first, raise max_tokens)")
    return _completion(text, finish, choice, answer)


def _chunk(chunk: Any) -> Completion:
    """One event of a stream, which may hold text, or only what the answer cost."""
    choice = (chunk.get("choices") or [{}])[0]
    return _completion((choice.get("delta") or {}).get("content") or "", "stop", choice, chunk)


def _completion(text: str, finish: Literal["stop", "length", "filter"], choice: Any, answer: Any) -> Completion:
    usage = answer.get("usage") or {}
    tokens = [int(usage.get(field) or 0) for field in ("prompt_tokens", "completion_tokens")]
    spread = (choice.get("logprobs") or {}).get("content") or ()
    likeliest = tuple(tuple((str(one["token"]), float(one["logprob"])) for one in token["top_logprobs"]) for token in spread)
    own = tuple((str(token["token"]), float(token["logprob"])) for token in spread if "logprob" in token)
    # A lone surrogate would later break whoever writes the answer down.
    return Completion(text.encode("utf-8", "replace").decode(), tokens[0], tokens[1], finish, top_logprobs=likeliest, drawn=own)


def _asked_wait(headers: Mapping[str, str], otherwise: float) -> float:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` as seconds or as a date."""
    for asked, unit in ((headers.get("retry-after-ms", ""), 0.001), (headers.get("retry-after", ""), 1.0)):
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            return float(asked) * unit
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time())
    except (ValueError, OverflowError):
        return otherwise
