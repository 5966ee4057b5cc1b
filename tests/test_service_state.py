"""The service's database as several servers and workers use it at once, on SQLite and on a real PostgreSQL."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
# ruff: noqa: E402
from postgres import fresh_database, postgres

from saddlepoint.service.records import File, Job, Part, Upload
from saddlepoint.service.rows import Refused, fresh
from saddlepoint.service.state import Lost, State

SHA = "a" * 64


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "state") if request.param == "sqlite" else fresh_database(request.getfixturevalue("server"))


@pytest.fixture
def dropped() -> list[str]:
    return []


@pytest.fixture
def state(place: str, dropped: list[str]) -> Iterator[State]:
    made = State.open(place, dropped.append)
    yield made
    made.close()


def file(state: State, sha: str = SHA, owner: str = "me", size: int = 10, **more: Any) -> File:
    made = state.files.add(File(fresh("file-"), owner, size, int(time.time()), "some.jsonl", "fine-tune", sha, **more))
    state.files.ready(made.id)
    return made


def job(state: State, owner: str = "me", training: str = "", most: int = 0, **more: Any) -> Job:
    training = training or file(state, owner=owner).id
    id = fresh("ftjob-")
    name = f"ft:tiny:local::{fresh('', 8)}"
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
    return state.create(Job(id, owner, int(time.time()), "tiny", "tiny", name, training, method, {"n_epochs": "auto"}, 7, **more), most)


def running(state: State, worker: str = "w", **more: Any) -> Job:
    made = job(state, **more)
    assert state.claim(worker, 60)
    state.validated(made.id, worker)
    claimed = state.claim(worker, 60)
    assert claimed and claimed.id == made.id and claimed.status == "running" and claimed.claims == 1
    return claimed


def said(state: State, id: str) -> list[str]:
    return [event.message for event in reversed(state.events(id, 1000)[0])]


# ---- a job's life


def test_a_job_that_succeeds(state: State) -> None:
    state.outbox.subscribe({"http://localhost:1/hook": "whsec_"})
    made = running(state, metadata={"k": "v"}, suffix="some")
    state.learned(made.id, "w", hyperparameters={"n_epochs": 3}, estimated_finish=99)
    assert state.job(made.id).method == {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}  # type: ignore[union-attr]
    for _ in range(2):  # replayed steps add nothing
        state.event(made.id, "Step 1/2: training loss=0.10", type="metrics", data={"step": 1}, key="step 1")
    checkpoint = state.checkpoint(made.id, 1, {"step": 1}, {"adapter.safetensors": SHA}, worker="w")
    assert state.model(checkpoint.name) is None and state.model(made.name) is None
    done = state.finish(made.id, "succeeded", worker="w", manifest={"a": SHA}, result=("b" * 64, 5), trained_tokens=12)
    assert (done.status, done.fine_tuned_model, done.trained_tokens, done.worker) == ("succeeded", made.name, 12, "")
    assert done.finished_at and done.error is None and done.hyperparameters == {"n_epochs": 3} and len(done.result_files) == 1
    assert state.files.get(done.result_files[0], "me").purpose == "fine-tune-results"  # type: ignore[union-attr]
    model = state.model(made.name, "me")
    assert model and model.base == "tiny" and model.manifest == {"a": SHA} and model.step is None
    assert state.model(checkpoint.name, "me").step == 1 and state.model(made.name, "other") is None  # type: ignore[union-attr]
    assert [m.name for m in state.models("me")] == [made.name, checkpoint.name] and state.models("other") == []
    assert said(state, made.id) == [
        f"Created fine-tuning job: {made.id}",
        f"Validating training file: {made.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/2: training loss=0.10",
        "Checkpoint created at step 1",
        f"New fine-tuned model created: {made.name}",
        "The job has successfully completed",
    ]
    sent = state.outbox.due(60)
    assert sent and json.loads(sent.body)["data"] == {"id": made.id} and json.loads(sent.body)["type"] == "fine_tuning.job.succeeded"
    assert state.outbox.due(60) is None
    with pytest.raises(Lost):
        state.finish(made.id, "failed", worker="w", error={"code": "x", "message": "y", "param": None})
    with pytest.raises(Refused, match="cannot be cancelled"):
        state.cancel(made.id)
