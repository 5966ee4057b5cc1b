"""What a request says of the words of its answer: penalties, biases, a JSON schema, a tool that must be called."""

import json
from typing import Any

from saddlepoint import tool_text
from saddlepoint.defenses._stack import layers
from saddlepoint.service.errors import ApiError
from saddlepoint.service.wire import ChatRequest, FunctionTool
from saddlepoint.types import Defense, InputGuard, OutputGuard, Rewriter, Shapes, Shaping, Target


def shaping(request: ChatRequest, target: Target) -> Shaping:
    """How the answers of a target are shaped for a request. A tool is forced by words alone where the target keeps no such grammar.

    Raises:
        ApiError: The target cannot answer so, or a schema is wrong.
    """
    bias = biases(request.logit_bias)
    try:
        schema, call = _schema(request), _calls(request.forced)
    except RecursionError:
        raise ApiError(400, "a schema is nested too deep", "invalid_value", "response_format") from None
    bent = Shaping(bias, request.presence_penalty or 0.0, request.frequency_penalty or 0.0, schema)
    if request.forced:
        *_, bare = layers(target)
        by_tool = Shaping(bias, bent.presence, bent.frequency, call)
        if isinstance(bare, Shapes) and _passes(target) and not bare.misshapen(Shaping(grammar="start: /a/")):
            return checked(by_tool, target, "tools")
    return checked(bent, target, "response_format")


def biases(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """The protocol's `logit_bias`, whose keys are token ids as texts.

    Raises:
        ApiError: A key is no token id.
    """
    if wrong := [key for key in given or () if not (key.isascii() and key.isdigit() and len(key) < 10)]:
        raise ApiError(400, f"the keys of 'logit_bias' are token ids, got {wrong[0]!r:.40}", "invalid_value", "logit_bias")
    return tuple((int(key), bias) for key, bias in (given or {}).items() if bias)


def checked(bent: Shaping, target: Target, grammar: str) -> Shaping:
    """The same, if answers of the target can be shaped so.

    Args:
        grammar: The field that the grammar comes from.

    Raises:
        ApiError: They cannot.
    """
    if bent == Shaping():
        return bent
    field = grammar if bent.grammar else "logit_bias" if bent.bias else "presence_penalty" if bent.presence else "frequency_penalty"
    *_, bare = layers(target)
    if not isinstance(bare, Shapes) or not _passes(target):
        said = f"'{field}' cannot be had from this model: " + (
            "a defense of it writes answers its own way" if isinstance(bare, Shapes) else "it takes none"
        )
        raise ApiError(400, f"{said}; leave it out", "unsupported_parameter", field)
    if wrong := bare.misshapen(Shaping(bent.bias)):
        raise ApiError(400, wrong, "invalid_value", "logit_bias")
    if wrong := bare.misshapen(bent):
        raise ApiError(400, f"the schema cannot be kept to: {wrong}", "invalid_value", grammar)
    return bent


def _passes(target: Target) -> bool:
    """Whether every defense leaves it to its inner target to write the answer."""
    *defenses, _ = layers(target)
    return all(isinstance(d, Defense) and sum(isinstance(d, kind) for kind in (InputGuard, Rewriter, OutputGuard)) == 1 for d in defenses)


def _schema(request: ChatRequest) -> str:
    form = request.response_format
    if form is None or form.type == "text":
        return ""
    schema: dict[str, Any] = (
        {"type": "object"} if form.json_schema is None or form.type == "json_object" else form.json_schema.schema_ or {}
    )
    if not request.offered:
        return json.dumps(schema)
    calls = [f.model_copy(update={"parameters": f.parameters or {"type": "object"}}) for f in request.offered]
    return f"start: answer | call\nanswer: %json {json.dumps(schema)}\n{_calls(calls).replace('start:', 'call:', 1)}"


def _calls(functions: list[FunctionTool]) -> str:
    """A grammar of one call of one of these functions, as `tool_text` writes them."""
    heads = " | ".join(f"call_{i}" for i in range(len(functions)))
    lines = [f'start: "{tool_text.OPENS}" ({heads}) "{tool_text.CLOSES}"']
    for i, function in enumerate(functions):
        schema = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
        schema |= {key: value for key, value in (function.parameters or {"type": "object"}).items() if key != "x-guidance"}
        lines += [
            f'call_{i}: "{{\\"name\\": \\"{function.name}\\", \\"arguments\\": " args_{i} "}}"',
            f"args_{i}: %json {json.dumps(schema)}",
        ]
    return "\n".join(lines)
