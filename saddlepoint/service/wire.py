"""The protocol's requests as types, as far as this server reads them. What it answers is written in `chat.py`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from saddlepoint.service.errors import ApiError

# Taken and without effect here, as the protocol allows: bookkeeping, caching, and hints that a model may ignore.
WITHOUT_EFFECT = frozenset(
    "user safety_identifier metadata store service_tier prompt_cache_key prompt_cache_retention prompt_cache_options "
    "parallel_tool_calls reasoning_effort verbosity prediction continue_final_message add_generation_prompt".split()
)
# (field, the values that ask for nothing): what would change the answer and cannot be had is an error and not ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
}


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Part(_Wire):
    """One part of a message; only text can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Function(_Wire):
    name: str
    arguments: str = "{}"


class ToolCall(_Wire):
    id: str
    type: Literal["function"] = "function"
    function: Function


class WireMessage(_Wire):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Function | None = None
    tool_call_id: str | None = None


class FunctionTool(_Wire):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Wire):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(_Wire):
    name: str


class NamedTool(_Wire):
    type: Literal["function"]
    function: NamedFunction


class Schema(_Wire):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Wire):
    """What an answer must be: `json_object` is any JSON object, `json_schema` what its schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class StreamOptions(_Wire):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Mode(_Wire):
    mode: Literal["score", "block"]


class Policy(_Wire):
    input: Mode | None = None
    output: Mode | None = None


class Moderation(_Wire):
    """Asks for the guards' verdicts beside the answer; `model` is taken as it comes: the verdicts are those of this server's stack."""

    model: str
    policy: Policy | None = None


Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class ChatRequest(_Wire):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    messages: Annotated[list[WireMessage], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    functions: Annotated[list[FunctionTool], Field(min_length=1, max_length=128)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    moderation: Moderation | None = None

    def check(self) -> None:
        """What the fields' own types cannot say.

        Raises:
            ApiError: A field that cannot be had here, or that does not fit another.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in WITHOUT_EFFECT or value in NEUTRAL.get(name, ()):
                continue
            known = name in NEUTRAL or name in ("audio", "web_search_options")
            said = f"'{name}' is not supported by this server; leave it out" if known else f"no such parameter: '{name}'"
            raise ApiError(400, said, "unsupported_parameter" if known else "unknown_parameter", name)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true", "invalid_value", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' is only allowed with 'stream': true", "invalid_value", "stream_options")
        if self.tools and self.functions:
            raise ApiError(400, "'tools' and 'functions' are given; give 'tools' alone", "invalid_value", "functions")
        for choice, tools in (("tool_choice", "tools"), ("function_call", "functions")):
            chosen, named = getattr(self, choice), [f.name for f in self._listed]
            if chosen not in (None, "none") and not getattr(self, tools):
                raise ApiError(400, f"'{choice}' needs '{tools}'", "invalid_value", choice)
            if isinstance(chosen, NamedTool | NamedFunction) and _name(chosen) not in named:
                raise ApiError(400, f"'{choice}' names none of '{tools}': {_name(chosen)}", "invalid_value", choice)
        if (form := self.response_format) and form.type == "json_schema" and (form.json_schema is None or form.json_schema.schema_ is None):
            said = "a json_schema needs its schema: {'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}}"
            raise ApiError(400, said, "invalid_value", "response_format")

    @property
    def _listed(self) -> list[FunctionTool]:
        return [tool.function for tool in self.tools or ()] or list(self.functions or ())

    @property
    def offered(self) -> list[FunctionTool]:
        """The functions that may be called."""
        return [] if "none" in (self.tool_choice, self.function_call) else self._listed

    @property
    def forced(self) -> list[FunctionTool]:
        """Those of which one must be called."""
        chosen = self.tool_choice or self.function_call
        if isinstance(chosen, NamedTool | NamedFunction):
            return [f for f in self.offered if f.name == _name(chosen)]
        return self.offered if chosen == "required" else []

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which the answer ends."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text)


def _name(chosen: NamedTool | NamedFunction) -> str:
    return chosen.function.name if isinstance(chosen, NamedTool) else chosen.name


class ModerationPart(_Wire):
    type: Literal["text", "image_url"]
    text: str | None = None


class ModerationRequest(_Wire):
    """The body of POST /v1/moderations."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=256)]
        | Annotated[list[ModerationPart], Field(min_length=1, max_length=256)]
    )
    model: str | None = None
