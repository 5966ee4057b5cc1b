"""The routes of graders: run one on a sample, or see whether it can be had. A grader's models are any that the service serves."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from saddlepoint.defenses._stream import joined, stream
from saddlepoint.errors import UsageError
from saddlepoint.finetuning import grader_types
from saddlepoint.finetuning.graders import Ask, Error, Graded, grade
from saddlepoint.service.chat import Served
from saddlepoint.service.errors import ApiError
from saddlepoint.service.meters import Meters
from saddlepoint.service.routing import Body
from saddlepoint.types import Chat, Completion, Query, Sampling, Shaping

# The protocol's flags, and what sets each here; those without are of graders that this service does not have.
FLAGS: Mapping[str, Error | None] = {
    "formula_parse_error": "formula",
    "sample_parse_error": "sample_parse",
    "truncated_observation_error": "truncated",
    "unresponsive_reward_error": None,
    "invalid_variable_error": "invalid_variable",
    "other_error": "other",
    "python_grader_server_error": None,
    "python_grader_runtime_error": None,
    "model_grader_server_error": "model_server",
    "model_grader_refusal_error": "model_refusal",
    "model_grader_parse_error": "model_parse",
}


class GraderValidation(Body):
    """The body of POST /v1/fine_tuning/alpha/graders/validate."""

    grader: dict[str, Any]


class GraderRun(GraderValidation):
    """The body of POST /v1/fine_tuning/alpha/graders/run; `reference_answer` is the older place of an item's field of that name."""

    model_sample: Annotated[str, Field(max_length=1 << 20)]
    item: dict[str, Any] | None = None
    reference_answer: Any = None


def routes(served: Callable[[str, Request], Served], meters: Meters) -> APIRouter:
    """The routes under /v1/fine_tuning/alpha/graders.

    Args:
        served: A model by its name, as whoever asks may use it; raises ApiError where there is none.
    """
    made = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"])

    @made.post("/validate")
    def validate_grader(body: GraderValidation, request: Request) -> dict[str, Any]:
        """Whether a grader can be had here: it is given back, or what is wrong with it is told."""
        _read(body.grader, served, request)
        return {"grader": body.grader}

    @made.post("/run")
    def run_grader(body: GraderRun, request: Request) -> dict[str, Any]:
        """Grade one sample."""
        grader, models = _read(body.grader, served, request)
        older = {} if body.reference_answer is None else {"reference_answer": body.reference_answer}
        began = time.monotonic()
        return _shown(
            grader, grade(grader, body.model_sample, older | (body.item or {}), _asking(models, meters)), time.monotonic() - began
        )

    return made


def _read(
    given: dict[str, Any], served: Callable[[str, Request], Served], request: Request
) -> tuple[grader_types.Grader, dict[str, Served]]:
    """A grader and its models."""
    try:
        json.dumps(given, allow_nan=False, ensure_ascii=False).encode()  # it is given back
        grader = grader_types.read(given)
    except (ValueError, RecursionError) as wrong:
        said = str(wrong) if isinstance(wrong, UsageError) else "the grader holds what JSON or UTF-8 cannot have, or is too deep"
        raise ApiError(400, said, "invalid_grader", "grader") from None
    return grader, {name: served(name, request) for name in grader_types.models(grader)}


def _asking(models: Mapping[str, Served], meters: Meters) -> Ask:
    """Asks served models behind their guards, in the batch of the chats that are under way."""

    def ask(name: str, chat: Chat, sampling: Sampling, shape: Mapping[str, Any]) -> Completion:
        said = joined(list(stream(models[name].target, Query(chat, sampling, shaping=Shaping(grammar=json.dumps(shape))))))
        spent = {"prompt": said.prompt_tokens, "completion": said.completion_tokens, "defense": said.extra_tokens}
        for kind, tokens in spent.items():
            meters.tokens.labels(kind).inc(tokens)
        return said

    return ask


def _shown(grader: grader_types.Grader, graded: Graded, seconds: float) -> dict[str, Any]:
    """What came of it, in the protocol's words."""
    scores = dict(graded.sub_rewards) or {grader.name or grader.type: graded.reward}
    why = graded.errors.get("model_server")
    told: dict[str, str | None] = {"python_grader_server_error_type": None, "python_grader_runtime_error_details": None}
    told["model_grader_server_error_details"] = why and why.encode("utf-8", "replace").decode()
    metadata = {
        "name": grader.name,
        "type": grader.type,
        "errors": {flag: kind in graded.errors for flag, kind in FLAGS.items()} | told,
        "execution_time": seconds,
        "scores": scores,
        "token_usage": sum(graded.tokens.values()) if graded.tokens else None,
        "sampled_model_name": getattr(grader, "model", None),
    }
    return {
        "reward": graded.reward,
        "metadata": metadata,
        "sub_rewards": dict(graded.sub_rewards),
        "model_grader_token_usage_per_model": dict(graded.tokens),
    }
