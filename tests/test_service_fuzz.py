"""The fine-tuning routes, fuzzed by their own OpenAPI document: no 5xx, no 409 or 422, and every error in the four-key shape."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("multipart"), pytest.importorskip("fsspec")
schemathesis = pytest.importorskip("schemathesis")
# ruff: noqa: E402
from hypothesis import HealthCheck, Phase, given, settings
from postgres import fresh_database, postgres
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from test_service_api import BASE, KEYS, LINE, begun, client_of, serving, succeeded, tuned, uploaded

from saddlepoint.service.app import Service, create
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.routing import Tuning
from saddlepoint.service.state import State

CHECKS = (not_a_server_error, status_code_conformance, response_schema_conformance)
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
PREFIXES = ("/v1/files", "/v1/uploads", "/v1/fine_tuning", "/v1/models", "/v1/saddlepoint")
FEW = settings(deadline=None, phases=[Phase.generate], derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def _document(folder: Path) -> Any:
    made = tuned(folder)
    document = create(Service.of([]), tuning=made).openapi()
    made.state.close()
    return schemathesis.openapi.from_dict(document)


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    """PostgreSQL: it is the stricter of the two about what text may hold."""
    with postgres() as server:
        yield fresh_database(server)


@pytest.fixture(scope="module")
def tuning(place: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    blobs = Blobs(tmp_path_factory.mktemp("files"))
    made = Tuning(State.open(place, blobs.remove), blobs, {BASE: BASE}, max_file=1 << 20, most_jobs=0)
    yield made
    made.state.close()


@pytest.fixture(scope="module")
def at(tuning: Tuning) -> Iterator[str]:
    with serving(tuning) as url:
        yield url


OPERATIONS = (
    "GET /v1/files",
    "POST /v1/files",
    "GET /v1/files/{id}",
    "DELETE /v1/files/{id}",
    "GET /v1/files/{id}/content",
    "POST /v1/uploads",
    "POST /v1/uploads/{id}/parts",
    "POST /v1/uploads/{id}/complete",
    "POST /v1/uploads/{id}/cancel",
    "GET /v1/fine_tuning/jobs",
    "POST /v1/fine_tuning/jobs",
    "GET /v1/fine_tuning/jobs/{id}",
    "POST /v1/fine_tuning/jobs/{id}/cancel",
    "POST /v1/fine_tuning/jobs/{id}/pause",
    "POST /v1/fine_tuning/jobs/{id}/resume",
    "GET /v1/fine_tuning/jobs/{id}/events",
    "GET /v1/fine_tuning/jobs/{id}/checkpoints",
    "POST /v1/fine_tuning/alpha/graders/run",
    "POST /v1/fine_tuning/alpha/graders/validate",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "DELETE /v1/models/{model}",
    "POST /v1/saddlepoint/jobs/{id}/release",
)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    every = [operation.ok() for operation in _document(tmp_path_factory.mktemp("document")).get_all_operations()]
    return {operation.label: operation for operation in every if operation.path.startswith(PREFIXES)}


def test_the_document_has_every_route(operations: dict[str, Any]) -> None:
    assert sorted(OPERATIONS) == sorted(operations)


@pytest.mark.parametrize("mode", MODES, ids=["as allowed", "as not allowed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_sent_is_answered(name: str, mode: Any, at: str, tuning: Tuning, operations: dict[str, Any]) -> None:
    operation = operations[name]
    if mode is MODES[1] and not (operation.body or operation.query or "multipart" in str(operation.definition.raw)):
        pytest.skip("takes nothing that could be wrong")
    seen: Counter[int] = Counter()
    known = _known(name, at, tuning)

    @given(operation.as_strategy(generation_mode=mode))
    @settings(FEW, max_examples=20)
    def fuzz(case: Any) -> None:
        if seen.total() % 2:  # else nearly all would end at an id that does not exist
            case.path_parameters = {**(case.path_parameters or {}), **known}
        if name == "POST /v1/fine_tuning/jobs" and isinstance(case.body, dict) and seen.total() % 3:
            case.body = case.body | {"model": BASE, "training_file": known["training_file"]} | {"integrations": None}
        answer = case.call(base_url=at.removesuffix("/v1"), headers={"authorization": f"Bearer {KEYS['admin-ann']}"})
        case.validate_response(answer, checks=CHECKS)
        assert answer.status_code < 500 and answer.status_code not in (409, 422) and answer.headers["x-request-id"], answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert {"message", "type", "param", "code"} == set(error) and error["message"]
        seen[answer.status_code] += 1

    fuzz()
    if (
        mode is MODES[0]
        and name not in ("POST /v1/uploads/{id}/complete", "POST /v1/saddlepoint/jobs/{id}/release")
        and "graders" not in name
    ):
        assert seen[200] > 0, seen


def _known(name: str, at: str, tuning: Tuning) -> dict[str, str]:
    """Ids that are there."""
    with client_of(at, "admin-ann") as client:
        if "/files" in name:
            return {"id": uploaded(client).id}
        if "/uploads" in name:
            return {"id": client.uploads.create(bytes=1 << 19, filename="f", mime_type="text/plain", purpose="fine-tune").id}
        if name == "POST /v1/fine_tuning/jobs":
            return {"training_file": uploaded(client, LINE * 12).id}
        job = begun(client).id
        if "/models" in name:
            return {"model": succeeded(tuning, job).name}
        if name.endswith("resume"):
            client.fine_tuning.jobs.pause(job)
        return {"id": job}


def test_it_is_still_well(at: str) -> None:
    with client_of(at) as client:
        began = time.monotonic()
        assert begun(client).status == "validating_files" and time.monotonic() - began < 5
