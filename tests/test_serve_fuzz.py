"""A fuzzed server: whatever its own OpenAPI document allows, and much that it does not, is answered, and never by a 5xx."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("prometheus_client")
schemathesis = pytest.importorskip("schemathesis")
# ruff: noqa: E402
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from test_serve import KEY, running

from saddlepoint.defenses.detection.perplexity_filter import PerplexityFilter
from saddlepoint.service.app import Service, create
from saddlepoint.service.chat import Served
from saddlepoint.service.completions import CompletionRequest
from saddlepoint.service.embeddings import EmbeddingRequest
from saddlepoint.service.gate import Keys
from saddlepoint.service.wire import ChatRequest, ModerationRequest

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF


CHECKS = (not_a_server_error, status_code_conformance, response_schema_conformance)
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
DOCUMENT = schemathesis.openapi.from_dict(create(Service.of([])).openapi())
OPERATIONS = {operation.ok().label: operation.ok() for operation in DOCUMENT.get_all_operations()}
FEW = settings(deadline=None, phases=[Phase.generate], derandomize=True, database=None, suppress_health_check=list(HealthCheck))
RARE = {"tool_choice", "function_call", "functions", "top_logprobs", "stream_options", "logit_bias", "best_of", "suffix", "dimensions"}
FIELDS = {f for body in (ChatRequest, ModerationRequest, CompletionRequest, EmbeddingRequest) for f in body.model_fields} - RARE
BODIES = [name for name in OPERATIONS if name.startswith("POST")]


@pytest.fixture(scope="module")
def at(tiny: "HF") -> Iterator[str]:
    service = Service.of([Served("tiny", PerplexityFilter(tiny, tiny, threshold=6.0), longest=4)])
    with running(service, keys=Keys.of({"me": KEY})) as url:
        yield url.removesuffix("/v1")


def test_the_document_has_every_route() -> None:
    want = ["GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{model}", "POST /v1/chat/completions", "POST /v1/completions"]
    want += ["POST /v1/embeddings", "POST /v1/fine_tuning/alpha/graders/run", "POST /v1/fine_tuning/alpha/graders/validate"]
    assert [*want, "POST /v1/moderations"] == sorted(OPERATIONS)
    for operation in OPERATIONS.values():  # it promises no 422, which FastAPI would put there, and tells the shape of errors
        assert set(operation.definition.raw["responses"]) == {"200", "default"}


@pytest.mark.parametrize("mode", MODES, ids=["as allowed", "as not allowed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_sent_is_answered(name: str, mode: Any, at: str) -> None:
    if mode is MODES[1] and name not in BODIES:
        pytest.skip("takes nothing that could be wrong")
    seen: Counter[int] = Counter()

    @given(OPERATIONS[name].as_strategy(generation_mode=mode))
    @settings(FEW, max_examples=40 if name in BODIES else 10)
    def fuzz(case: Any) -> None:
        if isinstance(case.body, dict):
            if seen.total() % 3:  # else nearly all would end at an unknown model, or at an unknown parameter
                case.body = {field: value for field, value in case.body.items() if field in FIELDS} | {"model": "tiny"}
            for most in ("max_tokens", "max_completion_tokens"):
                if isinstance(case.body.get(most), int) and case.body[most] > 8:
                    case.body[most] = 8
        answer = case.call(base_url=at, headers={"authorization": f"Bearer {KEY}"})
        case.validate_response(answer, checks=CHECKS)
        assert answer.status_code not in (409, 422) and answer.headers["x-request-id"]
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert {"message", "type", "param", "code"} == set(error) and error["message"]
        seen[answer.status_code] += 1

    fuzz()
    free = "{" in name or "graders" in name  # what it takes is said in no schema, so that nearly all that is made is wrong
    assert seen[200] > 0 if mode is MODES[0] and not free else sum(seen.values()) > 0
    if name == "POST /v1/chat/completions":
        assert seen[400] > 0
