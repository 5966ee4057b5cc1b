"""Any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, Ollama, hosted ones), asked through the official client.

A prefill is sent as a last assistant message with `continue_final_message` (the convention of vLLM and SGLang). A server
that refuses it gives error completions; one that ignores it may start a new turn instead, so try one by hand first.
A field that the server refuses is left out from then on: `max_tokens` (for `max_completion_tokens`) and `seed`, without
which equal queries may get different answers.
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from random import Random
from threading import Event
from time import time
from typing import Any, Literal

from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError
from openai import OpenAI as Client

from saddlepoint.errors import TargetError, UsageError
from saddlepoint.types import Completion, Query

_FORM = "http://HOST:PORT/v1#MODEL"
_NAME = re.compile(r"(https?://[^\s/?#@]+[^\s?#@]*)(?:#(.*))?")
_PASSING = (408, 409, 429, *range(500, 600))  # statuses that are worth another try
_GARBAGE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # what reading a broken answer raises
_FINISH: dict[Any, Literal["stop", "length", "filter"]] = {"length": "length", "content_filter": "filter"}


@dataclass(eq=False)
class OpenAI:
    """A model behind an endpoint. Implements `Target`. The key comes from the environment variable OPENAI_API_KEY."""

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
        if not re.fullmatch("[!-~]+", key):  # the client's own error would show it
            raise UsageError("OPENAI_API_KEY holds a space, a line break or a character that is not ASCII; copy the key again")
        try:
            self._client = Client(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=0)
        except Exception as wrong:  # the client's HTTP library has an error of its own for a broken address
            raise UsageError(f"no endpoint '{self.url}': {wrong}; write {_FORM}") from wrong
        self._pool = ThreadPoolExecutor(self.concurrency, "openai")
        self._refused: frozenset[str] = frozenset()  # request fields that this server does not take

    @classmethod
    def at(cls, name: str, **settings: Any) -> "OpenAI":
        """Open `http://HOST:PORT/v1#MODEL`; without `#MODEL`, the only model that the endpoint lists.

        Raises:
            UsageError: The name has another form, or names no model where the endpoint does not list exactly one.
            TargetError: Nothing answers there, or it refuses the key.
        """
        if not (form := _NAME.fullmatch(name)):
            raise UsageError(f"no endpoint '{name.rpartition('@')[2]}'; write {_FORM}, and a key into the variable OPENAI_API_KEY")
        target = cls(form[1].rstrip("/"), form[2] or "", **settings)
        served: list[str] = []
        try:
            served = [str(one.id) for one in target._client.models.list().data]
        except APIConnectionError as wrong:
            raise TargetError(f"nothing answers at {target.url}: {wrong.__cause__ or wrong}; start the server, or write {_FORM}") from wrong
        except APIStatusError as wrong:  # some endpoints have no list, and some keys may not see it
            if wrong.status_code in (401, 403) and not target.model:
                raise TargetError(f"{target.url}: {target._why(wrong)}") from wrong
        except _GARBAGE:
            pass
        if not target.model and len(served) != 1:
            raise UsageError(f"'{name}' names no model; write {_FORM}; the endpoint lists: {', '.join(served[:9]) or 'none'}")
        target.model = target.model or served[0]
        return target

    @property
    def name(self) -> str:
        return f"{self.url}#{self.model}"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """Answer each query, in order, up to `concurrency` at once. A query that fails is a Completion with `error`.

        Raises:
            TargetError: The endpoint refuses the key (401, 403) or has no such model (404), so that every query would fail.
        """
        stop = Event()
        try:
            return list(self._pool.map(lambda query: self._answer(query, stop), queries))
        finally:
            stop.set()  # after a TargetError or Ctrl-C, what is still under way does not try again

    def _answer(self, query: Query, stop: Event) -> Completion:
        if any(m.soft for m in query.chat):
            return Completion("", finish="error", error=f"{self.name}: soft embeddings cannot be sent to an endpoint; attack a local model")
        for attempt in range(self.retries + 1):
            try:
                return _read(self._send(self._request(query)))
            except (OpenAIError, *_GARBAGE) as error:
                wrong: Any = error
            status = getattr(wrong, "status_code", 0)
            if status in (401, 403, 404):
                raise TargetError(f"{self.name}: {self._why(wrong)}") from wrong
            if getattr(wrong, "code", "") == "content_filter":  # how Azure says that it filtered the prompt
                return Completion("", finish="filter")
            if attempt == self.retries or not (status in _PASSING or isinstance(wrong, APIConnectionError)):
                break
            wait = self.backoff * 2 ** min(attempt, 9) * Random(f"{query}{attempt}").uniform(0.5, 1)
            if stop.wait(min(_asked_wait(wrong.response.headers, wait) if status else wait, 60.0)):
                break
        why = " ".join(self._why(wrong).split())
        return Completion("", finish="error", error=f"{self.name}: {why} (tries: {attempt + 1})")

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
        if query.chat and query.chat[-1].role == "assistant":
            request["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
        return request

    def _send(self, request: dict[str, Any]) -> Any:
        """Send once; where the server refuses a field that it can do without, once more without that."""
        try:
            return self._client.chat.completions.create(**request)
        except APIStatusError as wrong:
            said, other = str(wrong.body), dict(request)
            if "max_tokens" in said and "max_tokens" in other:
                other["max_completion_tokens"] = other.pop("max_tokens")
            if "seed" in said:
                other.pop("seed", None)
            if wrong.status_code not in (400, 422) or other == request:
                raise
        answer = self._send(other)
        self._refused |= request.keys() - other.keys()  # only now is it known that the field was the trouble
        return answer

    def _why(self, wrong: Exception) -> str:
        match wrong:
            case APITimeoutError():
                return f"timeout, nothing came for {self.timeout:g} s; raise timeout or lower concurrency"
            case APIConnectionError():
                return f"connection failed, {wrong.__cause__ or wrong}; check that the server still runs"
            case APIStatusError(status_code=401 | 403):
                return f"{_said(wrong)}; put the right key into the environment variable OPENAI_API_KEY"
            case APIStatusError(status_code=404):
                return f"{_said(wrong)}; write {_FORM} with a model of {self.url}/models"
            case APIStatusError(status_code=status):
                return f"{_said(wrong)}; " + ("lower concurrency or see its log" if status in _PASSING else "change what the message names")
            case UnicodeEncodeError():
                return "not sent, the chat holds half a character (a lone surrogate); leave it out"
        return f"HTTP 200 without a usable answer, {wrong}; check that it is an OpenAI-compatible endpoint"


def _said(wrong: APIStatusError) -> str:
    body: Any = wrong.body
    said = (body.get("message") if isinstance(body, dict) else None) or body or "no reason given"
    return f"HTTP {wrong.status_code}: {' '.join(str(said).split())[:200]}"


def _read(answer: Any) -> Completion:
    if not getattr(answer, "choices", None):
        raise ValueError(f"no choices in {str(answer)[:100]!r}")
    choice = answer.choices[0]
    text, finish = choice.message.content, _FINISH.get(choice.finish_reason, "stop")
    text = "" if text is None and finish == "filter" else text
    if not isinstance(text, str):
        raise TypeError(f"content {repr(text)[:60]}, finish_reason {choice.finish_reason!r} (if the model thinks first, raise max_tokens)")
    tokens = [int(getattr(answer.usage, field, None) or 0) for field in ("prompt_tokens", "completion_tokens")]
    drawn = (choice.logprobs and choice.logprobs.content) or ()
    likeliest = tuple(tuple((str(one.token), float(one.logprob)) for one in token.top_logprobs) for token in drawn)
    # A lone surrogate would later break whoever writes the answer down.
    return Completion(text.encode("utf-8", "replace").decode(), tokens[0], tokens[1], finish, top_logprobs=likeliest)


def _asked_wait(headers: Mapping[str, str], otherwise: float) -> float:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` as seconds or as a date."""
    for asked, unit in ((headers.get("retry-after-ms", ""), 0.001), (headers.get("retry-after", ""), 1.0)):
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            return float(asked) * unit
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time())
    except (ValueError, OverflowError):
        return otherwise
