"""One chat request from its JSON to the pieces of its answers, and those as the protocol's objects."""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from saddlepoint.defenses._stack import label, layers
from saddlepoint.defenses._stream import Direction, Said, stream
from saddlepoint.errors import UsageError
from saddlepoint.service import tools
from saddlepoint.service.errors import ApiError
from saddlepoint.service.shape import shaping
from saddlepoint.service.wire import ChatRequest, Part, WireMessage
from saddlepoint.types import Completion, InputGuard, Message, OutputGuard, Query, Role, Sampling, Streaming, Target, WhiteBox

ROLES: dict[str, Role] = {"developer": "system", "function": "tool"}
FINISH = {"stop": "stop", "length": "length", "filter": "content_filter"}


@dataclass(frozen=True)
class Served:
    """A model that is served under a name.

    Args:
        target: With its defenses around it.
        enforced: Guards withhold whatever the request's `moderation` says; else its mode "score" is followed.
        longest: Tokens of an answer where the request does not say.
        prefill: A last message by the assistant may be gone on with (`continue_final_message`), which breaks many models.
    """

    name: str
    target: Target
    enforced: bool = True
    longest: int = 512
    prefill: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def guards(self) -> list[str]:
        """The stack's defenses from the outermost."""
        *defenses, _ = layers(self.target)
        return [label(defense) for defense in defenses]

    def guarding(self, direction: Direction) -> list[str]:
        """The guards that say something of requests, or of answers."""
        kind = InputGuard if direction == "input" else OutputGuard
        return [label(layer) for layer in layers(self.target) if isinstance(layer, kind)]

    @property
    def card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "saddlepoint"}


def read(request: ChatRequest, served: Served) -> list[Query]:
    """The queries of a request, one for each choice; equal but for their seeds.

    Raises:
        ApiError: Something in it cannot be had here, or the context is too short.
    """
    request.check()
    chat = tools.told(tuple(_message(m, i) for i, m in enumerate(request.messages)), request)
    if chat[-1].role == "assistant":
        if not (request.model_extra or {}).get("continue_final_message"):
            chat = (*chat, Message("assistant", ""))  # the model's next turn begins after it
        elif not served.prefill:
            raise ApiError(400, "this server does not go on with an assistant's message", "unsupported_parameter", "continue_final_message")
    most = request.max_completion_tokens or request.max_tokens
    *_, bare = layers(served.target)
    if isinstance(bare, Streaming):
        try:
            room = bare.room(chat)
        except UsageError as wrong:
            raise ApiError(400, str(wrong), "invalid_value", "messages") from None
        if room < (most or 1):
            said = f"the messages leave room for {max(room, 0)} tokens in this model's context, and {most or 1} are asked for; shorten them"
            raise ApiError(400, said, "context_length_exceeded", "messages")
        most = most or min(room, served.longest)
    bent = shaping(request, served.target)
    top = max(1, request.top_logprobs or 0) if request.logprobs else 0
    return [Query(chat, draw, shaping=bent) for draw in sampling(request, most or served.longest, top, request.n or 1)]


class Drawn(Protocol):
    """What requests that are answered by sampling have in common."""

    temperature: float | None
    top_p: float | None
    seed: int | None


def sampling(request: Drawn, most: int, top: int, n: int) -> list[Sampling]:
    """How each of n answers is drawn, equal but for their seeds; what the request leaves out is the protocol's default, or chance.

    Args:
        most: Tokens of an answer.
        top: How many of the likeliest tokens are told.
    """
    temperature = 1.0 if request.temperature is None else request.temperature
    seed = secrets.randbits(48) if request.seed is None else request.seed % 2**48
    top_p = 1.0 if request.top_p is None else max(request.top_p, 1e-6)  # a nucleus holds at least the likeliest token
    return [Sampling(most, temperature, top_p, seed + i, top) for i in range(n)]


def _message(message: WireMessage, place: int) -> Message:
    parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content or []
    for part in parts:
        if part.type not in ("text", "refusal"):
            raise ApiError(
                400, f"messages[{place}] holds a part of type '{part.type}'; this server reads text", "invalid_value", "messages"
            )
    text = "".join(part.text or part.refusal or "" for part in parts) or message.refusal or ""
    if calls := [call.function for call in message.tool_calls or ()] or [call for call in (message.function_call,) if call]:
        text = "\n".join(filter(None, (text, tools.written(calls))))
    if message.content is None and not text and message.role != "assistant":
        raise ApiError(400, f"messages[{place}] has no content", "invalid_value", "messages")
    return Message(ROLES.get(message.role, message.role), text)  # type: ignore[arg-type]


@dataclass(eq=False)
class Choice:
    """One answer under way: what has come of it, what guards said, and how it ends."""

    index: int
    request: ChatRequest
    said: list[Said] = field(default_factory=list)
    text: str = ""
    refusal: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    extra_tokens: int = 0

    def deltas(self, served: Served, query: Query) -> Iterator[dict[str, Any]]:
        """Generate it: what each piece adds, as `{"delta": ..., "logprobs": ...}`. Text that may begin a stop or a call is held back.

        Raises:
            ApiError: The target gave no answer.
        """
        only_told: list[Direction] = []
        policy = self.request.moderation.policy if self.request.moderation else None
        if policy and not served.enforced:
            only_told += ["input"] if policy.input and policy.input.mode == "score" else []
            only_told += ["output"] if policy.output and policy.output.mode == "score" else []
        stops, held, spread = self.request.stops, "", list[dict[str, Any]]()
        with closing(stream(served.target, query, self.said.append, only_told)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                self.prompt_tokens += piece.prompt_tokens
                self.completion_tokens += piece.completion_tokens
                self.extra_tokens += piece.extra_tokens
                self.finish = FINISH.get(piece.finish, "error")
                if piece.finish == "error":
                    raise failed(piece, served)
                if piece.finish == "filter":
                    self.refusal = piece.text  # stands in place of what was not released yet
                    yield {"delta": {"refusal": piece.text}, "logprobs": None}
                    return
                if not piece.text and not piece.drawn:  # what a guard cost
                    continue
                held += piece.text
                spread += _spread(piece, self.request.top_logprobs or 0)
                if found := [at for at in (held.find(stop) for stop in stops) if at >= 0]:
                    cut = min(found)
                    spread = spread[: max(0, len(spread) - _tokens_in(spread, len(held) - cut))]
                    held, self.finish = held[:cut], "stop"
                    break
                if not self._waits(held, stops):
                    yield self._out(held, spread)
                    held, spread = "", []
        if self.calls_may_come and (calls := tools.called(self.text + held, self.request)):
            self.calls, self.logprobs = calls, self.logprobs + spread
            self.finish = "function_call" if self.request.functions else "tool_calls"
            listed = [{"index": i, **call} for i, call in enumerate(calls)]
            told = {"function_call": calls[0]["function"]} if self.request.functions else {"tool_calls": listed}
            yield {"delta": told, "logprobs": _content(spread)}
        elif held or spread:
            yield self._out(held, spread)

    @property
    def calls_may_come(self) -> bool:
        return bool(self.request.offered)

    def _waits(self, held: str, stops: Sequence[str]) -> bool:
        """Whether text must be held back: its end may begin a stop, or all of it may be a call."""
        if any(held.endswith(stop[:n]) for stop in stops for n in range(1, len(stop))):
            return True
        begun = (self.text + held).lstrip()
        return self.calls_may_come and (begun.startswith(tools.OPENS) or tools.OPENS.startswith(begun))

    def _out(self, text: str, spread: list[dict[str, Any]]) -> dict[str, Any]:
        self.text += text
        self.logprobs += spread
        return {"delta": {"content": text}, "logprobs": _content(spread) if self.request.logprobs else None}

    @property
    def whole(self) -> dict[str, Any]:
        """The choice as an object of a response that is not streamed."""
        withheld = self.refusal is not None
        message: dict[str, Any] = {"role": "assistant", "content": None if withheld or self.calls else self.text, "refusal": self.refusal}
        if self.calls:
            message |= {"function_call": self.calls[0]["function"]} if self.request.functions else {"tool_calls": self.calls}
        logprobs = _content(self.logprobs) if self.request.logprobs and not withheld else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


def _content(spread: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": spread, "refusal": None} if spread else None


def _tokens_in(spread: list[dict[str, Any]], characters: int) -> int:
    """How many of the last tokens it takes to write so many characters."""
    taken = 0
    while characters > 0 and taken < len(spread):
        taken += 1
        characters -= len(spread[-taken]["token"])
    return taken


def _spread(piece: Completion, top: int) -> list[dict[str, Any]]:
    """A piece's tokens with their log-probabilities; the token that ends an answer is none of its content."""
    found = []
    for i, (token, logprob) in enumerate(piece.drawn):
        likely = piece.top_logprobs[i] if i < len(piece.top_logprobs) else ()
        own, *others = piece.spelled[i] if i < len(piece.spelled) else (None,)
        if token:
            alternatives = [_token(*one, others[k] if k < len(others) else None) for k, one in enumerate(likely[:top])]
            found.append({**_token(token, logprob, own), "top_logprobs": alternatives})
    return found


def _token(token: str, logprob: float, spelled: bytes | None) -> dict[str, Any]:
    """A token. One that is a part of a character has no text of its own, and its bytes are told where the target knows them."""
    known = spelled if spelled is not None or "\ufffd" in token else token.encode("utf-8", "replace")
    return {"token": token, "logprob": max(logprob, -9999.0), "bytes": None if known is None else list(known)}


def failed(answer: Completion, served: Served) -> ApiError:
    """Why there is no answer: what a local model says is wrong with the request, or what failed behind this server."""
    *_, bare = layers(served.target)
    if isinstance(bare, WhiteBox):
        code = "context_length_exceeded" if "context" in answer.error else "invalid_value"
        return ApiError(400, answer.error, code, "messages")
    return ApiError(502, f"the model behind this server gave no answer: {answer.error}", "upstream_error")


@dataclass(eq=False)
class Answer:
    """The response to one request: the frame that its choices stand in."""

    request: ChatRequest
    served: Served
    choices: list[Choice]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _frame(self, kind: str, **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}
        return {**head, "service_tier": "default", "system_fingerprint": f"fp_{self.served.created:x}", **more}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens; a prompt of several choices is counted once. What defenses spent is not the client's and is in the metrics."""
        prompt = max((c.prompt_tokens for c in self.choices), default=0)
        made = sum(c.completion_tokens for c in self.choices)
        parts = {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        details = {"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, "completion_tokens_details": parts}
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made, **details}

    @property
    def moderation(self) -> dict[str, Any] | None:
        """The guards' verdicts, where they were asked for or something was withheld."""
        if self.request.moderation is None and not any(s.withheld for c in self.choices for s in c.said):
            return None
        # The choices share one input.
        found = {"input": [verdicts(self.served, "input", [s for c in self.choices for s in c.said])]}
        found["output"] = [verdicts(self.served, "output", c.said) for c in self.choices]
        return {side: _results(self.served, results, side) for side, results in found.items()}  # type: ignore[arg-type]

    @property
    def whole(self) -> dict[str, Any]:
        more = {"moderation": self.moderation} if self.moderation else {}
        return self._frame("chat.completion", choices=[c.whole for c in self.choices], usage=self.usage, **more)

    def chunk(self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        """One chunk of a stream for one choice."""
        return self.chunks([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def chunks(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self.request.stream_options and self.request.stream_options.include_usage else {}
        return self._frame("chat.completion.chunk", choices=choices, **(usage | more))

    @property
    def ending(self) -> Iterator[dict[str, Any]]:
        """The chunks that stand behind the choices': the guards' verdicts, and what it cost."""
        if self.moderation:
            yield self.chunks([], moderation=self.moderation)
        if self.request.stream_options and self.request.stream_options.include_usage:
            yield self.chunks([], usage=self.usage)


def verdicts(served: Served, direction: Direction, said: Sequence[Said]) -> dict[str, Any]:
    """One result in the protocol's words: each guard is a category."""
    asked = [s for s in said if s.direction == direction]
    flagged = {s.defense for s in asked if s.check.reason}
    guards = sorted({s.defense for s in asked})
    return {
        "type": "moderation_result",
        "model": _stack(served),
        "flagged": bool(flagged),
        "categories": {guard: guard in flagged for guard in guards},
        "category_scores": {guard: float(guard in flagged) for guard in guards},  # a guard says yes or no
        "category_applied_input_types": {guard: ["text"] for guard in guards},
    }


def _results(served: Served, results: list[dict[str, Any]], direction: Direction) -> dict[str, Any]:
    if not any(r["categories"] for r in results):
        return {"type": "error", "code": "not_read", "message": f"no guard of this server has read the {direction}"}
    return {"type": "moderation_results", "model": _stack(served), "results": results}


def _stack(served: Served) -> str:
    return f"saddlepoint: {', '.join(reversed(served.guards))}"


CATEGORIES = (
    "harassment harassment/threatening hate hate/threatening illicit illicit/violent self-harm self-harm/intent "
    "self-harm/instructions sexual sexual/minors violence violence/graphic"
).split()


def moderated(served: Served, text: str, tell: Callable[[int], None]) -> dict[str, Any]:
    """What each guard of a stack says of a text, as a request and as an answer, in the words of /v1/moderations.

    The protocol's own categories are there because its clients read them; these guards do not tell them apart, so they are false.

    Args:
        tell: Is told the tokens that the guards spent.
    """
    asked = Query((Message("user", text),))
    flagged: dict[str, bool] = {}
    for layer in layers(served.target):
        checks = layer.admitted([asked]) if isinstance(layer, InputGuard) else []
        checks += layer.released([asked], [Completion(text)]) if isinstance(layer, OutputGuard) else []
        if checks:
            flagged[label(layer)] = any(c.reason for c in checks)
            tell(sum(c.tokens for c in checks))
    all_of = dict.fromkeys(CATEGORIES, False) | flagged
    return {
        "flagged": any(flagged.values()),
        "categories": all_of,
        "category_scores": {name: float(yes) for name, yes in all_of.items()},
        "category_applied_input_types": {name: ["text"] if name in flagged else [] for name in all_of},
    }
