"""POST /v1/completions: a text is gone on with under no template, and scored where that is asked.

A prompt of text begins with the token that begins a text, as in training on prompts and completions; one of token ids is taken as it is.
Special tokens that a prompt spells are such, because it is all the client's own. Guards read it as a user's message.
"""

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from saddlepoint.defenses._stack import label, layers
from saddlepoint.service.answering import Answering
from saddlepoint.service.chat import Choice, Served, sampling
from saddlepoint.service.errors import ApiError
from saddlepoint.service.shape import biases, checked
from saddlepoint.service.wire import Bias, ChatRequest, Penalty, StreamOptions
from saddlepoint.types import InputGuard, Message, OutputGuard, Query, Shaping

if TYPE_CHECKING:
    from saddlepoint.service.app import Service
    from saddlepoint.targets.hf import HF

MOST = 64  # texts that one request may have written
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST)]
        | None
    ) = None
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=MOST)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: str | None = None

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Each prompt by itself."""
        return each(self.prompt or "")

    @property
    def tries(self) -> int:
        """Texts that are written for a prompt."""
        return self.best_of or self.n or 1

    def check(self) -> None:
        """What the fields' own types cannot say.

        Raises:
            ApiError: A field that cannot be had, or that does not fit another.
        """

        def wrong(said: str, field: str) -> ApiError:
            return ApiError(400, said, "invalid_value", field)

        if self.suffix:
            raise wrong("'suffix' is not supported: the models here write on and do not fill in; leave it out", "suffix")
        if self.tries < (self.n or 1):
            raise wrong(f"'best_of' must be at least 'n', which is {self.n}; got {self.best_of}", "best_of")
        if self.stream and self.tries > (self.n or 1):
            raise wrong("which is the best is known at the end only, so 'best_of' cannot be streamed; leave 'stream' out", "best_of")
        if len(self.prompts) * self.tries > MOST:
            raise wrong(f"prompts times texts must be at most {MOST}; got {len(self.prompts)} * {self.tries}", "prompt")
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise wrong("'max_tokens': 0 writes nothing, so it needs 'echo': true and no 'stream'", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise wrong("'stream_options' is only allowed with 'stream': true", "stream_options")

    @property
    def as_chat(self) -> ChatRequest:
        """What a `Choice` asks of a request."""
        ranked = self.tries > (self.n or 1)
        return ChatRequest.model_construct(
            model=self.model,
            messages=[],
            stop=self.stop,
            logprobs=ranked or self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
        )


def begin(request: CompletionRequest, served: Served) -> tuple[list[Query], "TextAnswer"]:
    """The queries of a request and the frame of their answers.

    Raises:
        ApiError: Something in it cannot be had here.
    """
    request.check()
    model = weights(served, "a text without a chat")
    bent = Shaping(biases(request.logit_bias), request.presence_penalty or 0.0, request.frequency_penalty or 0.0)
    checked(bent, served.target, "logit_bias")
    *defenses, _ = layers(served.target)
    others = [label(d) for d in defenses if not isinstance(d, InputGuard | OutputGuard)]
    if request.echo and request.logprobs is not None and others:
        said = f"the log-probabilities of a prompt are those of the model without '{others[0]}'; leave 'echo' or 'logprobs' out"
        raise ApiError(400, said, "unsupported_parameter", "logprobs")
    # What a model holds to be likely behind each token of a text is an answer to it. Guards are asked of answers that are written, so
    # behind them one token is, which is not shown.
    most = (16 if request.max_tokens is None else request.max_tokens) or int(bool(defenses))
    draws = sampling(request, most, max(1, request.logprobs or 0) if request.as_chat.logprobs else 0, request.tries)
    prompts = [Prompt.of(prompt, model, request) for prompt in request.prompts]
    queries = [
        Query((Message("user", prompt.text, ids=prompt.given),), draw, shaping=bent, bare=True)
        for prompt in prompts
        for draw in draws
        if most
    ]
    choices = [Choice(i, request.as_chat) for i in range(len(prompts) * request.tries)]
    if not most:
        for i, choice in enumerate(choices):
            choice.finish, choice.prompt_tokens = "length", prompts[i // request.tries].length
    return queries, TextAnswer(request, served, choices, prompts)


def each(given: Any) -> Sequence[str | Sequence[int]]:
    """The texts or rows of token ids of a field that may hold one of them or a list."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given  # type: ignore[no-any-return]


def weights(served: Served, what: str) -> "HF":
    """The bare model of a stack.

    Raises:
        ApiError: It has no weights here.
    """
    from saddlepoint.targets.hf import HF

    *_, bare = layers(served.target)
    if not isinstance(bare, HF):
        raise ApiError(
            400, f"'{served.name}' has no weights on this server, which {what} needs; ask another model", "invalid_value", "model"
        )
    return bare


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        text: As guards read it and as it is echoed.
        given: Its token ids where the client gave those.
        length: Its tokens, with the one that begins a text.
        scores: Its tokens as log-probabilities are told, where that was asked; the first has none.
    """

    text: str
    given: tuple[int, ...]
    length: int
    scores: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: str | Sequence[int], model: "HF", request: CompletionRequest) -> "Prompt":
        """A prompt as a model reads it.

        Raises:
            ApiError: It has tokens that are none of the model's, or more than its context.
        """
        from saddlepoint.targets._reading import likelihoods

        given = () if isinstance(prompt, str) else tuple(prompt)
        width, room = len(model.embedding), model.context
        if wrong := [token for token in given if token >= width]:
            raise ApiError(400, f"token ids lie in 0..{width - 1}, got {wrong[0]}", "invalid_value", "prompt")
        try:
            shown = list(given) or model.ids(str(prompt))
        except (ValueError, TypeError) as broken:  # half a character
            raise ApiError(400, f"the prompt cannot be written as tokens: {broken}", "invalid_value", "prompt") from None
        whole = shown if given else [*model.prompt_ids(()), *shown]
        if len(whole) + (request.max_tokens or 0) > room:
            said = f"the prompt has {len(whole)} tokens, with {request.max_tokens} to write; the model's context has room for {room}"
            raise ApiError(400, said, "context_length_exceeded", "prompt")
        text = str(prompt) if isinstance(prompt, str) else str(model.tokenizer.decode(shown))
        scores: list[dict[str, Any]] = []
        if request.echo and request.logprobs is not None and shown:

            def told(token: int, logprob: float | None) -> dict[str, Any]:
                return {"token": str(model.tokenizer.decode([token])), "logprob": logprob, "bytes": list(model.spelled(token))}

            found = likelihoods(model, whole, request.logprobs) if len(whole) > 1 else []
            scores = [{**told(shown[0], None), "top_logprobs": None}]
            scores += [
                {**told(token, p), "top_logprobs": [told(*one) for one in likely]}
                for token, (p, likely) in zip(shown[1:], found[len(found) - len(shown) + 1 :], strict=True)
            ]
        return cls(text, given, len(whole), scores)


@dataclass(eq=False)
class TextAnswer:
    """The response to one request: the frame that its choices stand in."""

    request: CompletionRequest
    served: Served
    choices: list[Choice]
    prompts: list[Prompt]
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._offsets = [_Offsets(0 if self.request.echo else len(self._prompt(i).text)) for i in range(len(self.choices))]

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.request.tries]

    def _frame(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}
        return {**head, "system_fingerprint": f"fp_{self.served.created:x}", "choices": choices, **more}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens; a prompt is counted once, however many texts were written for it."""
        tries = self.request.tries
        prompt = sum(max(c.prompt_tokens for c in self.choices[i : i + tries]) for i in range(0, len(self.choices), tries))
        made = sum(c.completion_tokens for c in self.choices) if self.request.max_tokens != 0 else 0
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    @property
    def whole(self) -> dict[str, Any]:
        tries, n = self.request.tries, self.request.n or 1
        best: list[Choice] = []
        for start in range(0, len(self.choices), tries):
            mine = self.choices[start : start + tries]
            best += sorted(mine, key=_mean, reverse=True)[:n] if n < tries else mine
        return self._frame([self._whole(choice, i) for i, choice in enumerate(best)], usage=self.usage)

    def _whole(self, choice: Choice, place: int) -> dict[str, Any]:
        text, entries = (choice.text, choice.logprobs) if self.request.max_tokens != 0 else ("", [])
        begun = self._prompt(choice.index).text if self.request.echo else ""
        logprobs = self._logprobs(choice.index, [*self._scores(choice), *entries])
        finish = "length" if self.request.max_tokens == 0 and choice.refusal is None else choice.finish
        return {"text": begun + text, "index": place, "logprobs": logprobs, "finish_reason": finish}

    def _scores(self, choice: Choice) -> list[dict[str, Any]]:
        """The prompt's own tokens, where they are asked for and no guard has withheld what follows them."""
        return self._prompt(choice.index).scores if choice.refusal is None else []

    def chunk(self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        """One chunk of a stream for one choice; the first holds the prompt where it is echoed."""
        begun = "role" in delta and self.request.echo
        text = self._prompt(index).text if begun else delta.get("content") or ""
        entries = self._scores(self.choices[index]) if begun else (logprobs or {}).get("content") or []
        told = self._logprobs(index, entries) if entries else None
        usage = {"usage": None} if self._tells_usage else {}
        return self._frame([{"text": text, "index": index, "logprobs": told, "finish_reason": finish}], **usage)

    @property
    def _tells_usage(self) -> bool:
        return bool(self.request.stream_options and self.request.stream_options.include_usage)

    @property
    def ending(self) -> Iterator[dict[str, Any]]:
        """The chunk that stands behind the choices'."""
        if self._tells_usage:
            yield self._frame([], usage=self.usage)

    def _logprobs(self, index: int, entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Tokens in the form of this endpoint; offsets count characters from the prompt's beginning, echoed or not."""
        if self.request.logprobs is None:
            return None
        tops = []
        for entry in entries:
            listed = entry["top_logprobs"]
            likely = {_name(one): one["logprob"] for one in reversed(listed or ())}  # of several of one text, the likeliest
            tops.append(None if listed is None or not self.request.logprobs else {**likely, _name(entry): entry["logprob"]})
        return {
            "tokens": [_name(entry) for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": tops if self.request.logprobs else None,
            "text_offset": [self._offsets[index].take(entry) for entry in entries],
        }


class _Offsets:
    """Where tokens begin in a text, in characters; a token within a character begins where the character does."""

    def __init__(self, start: int):
        self._at = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, entry: dict[str, Any]) -> int:
        token, began = entry["token"], self._at
        self._at += len(token if entry["bytes"] is None else self._decoder.decode(bytes(entry["bytes"])))
        # What stood before it may have been the beginning of a character that never came, and is a sign of its own then.
        return began if "\ufffd" in token else self._at - len(token)


def _name(entry: dict[str, Any]) -> str:
    """A token's text; the bytes of one that is a part of a character."""
    if "\ufffd" in entry["token"] and entry["bytes"] is not None:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
    return str(entry["token"])


def _mean(choice: Choice) -> float:
    """The mean log-probability of a text's tokens."""
    return sum(entry["logprob"] for entry in choice.logprobs) / len(choice.logprobs) if choice.logprobs else float("-inf")


def routes(service: "Service") -> APIRouter:
    """POST /v1/completions."""
    made = APIRouter(tags=["completions"])

    @made.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Go on with texts, or score them."""
        return await Answering(service, request, body.model, bool(body.stream), lambda served: begin(body, served)).respond()

    return made
