"""The service's database as several servers and workers use it at once, on SQLite and on a real PostgreSQL."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fsspec")
from postgres import fresh_database, postgres
from sqlalchemy import update

from saddlepoint.errors import StoreError, UsageError
from saddlepoint.finetuning.plan import Step
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.records import File, Job
from saddlepoint.service.rows import Refused, fresh, stored
from saddlepoint.service.schema import NOTE, reading, writing
from saddlepoint.service.setting import Setting
from saddlepoint.service.state import Lost, State
from saddlepoint.service.task import Task
from saddlepoint.service.telling import Teller

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


def bytes_of(state: State, owner: str) -> int:
    with reading(state._engine) as db:
        return stored(db, owner)


def job(state: State, owner: str = "me", training: str = "", most: int = 0, quota: int = 0, **more: Any) -> Job:
    training = training or file(state, owner=owner).id
    id = fresh("ftjob-")
    name = f"ft:tiny:local::{fresh('', 8)}"
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
    return state.create(
        Job(id, owner, int(time.time()), "tiny", "tiny", name, training, method, {"n_epochs": "auto"}, 7, **more), most, quota
    )


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
    state.outbox.subscribe(["http://localhost:1/hook"])
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


def test_pause_and_cancel_reach_the_worker_at_its_next_beat(state: State) -> None:
    made = running(state)
    assert state.beat(made.id, "w", 60) == "go"
    assert state.pause(made.id).status == "paused" and state.beat(made.id, "w", 60) == "pause"
    with pytest.raises(Lost):
        state.finish(made.id, "succeeded", worker="w", manifest={"a": SHA})
    assert state.resume(made.id).status == "queued"
    assert state.beat(made.id, "w", 60) == "pause" and state.claim("v", 60) is None  # it has to stop first
    state.leave(made.id, "v"), state.leave(made.id, "w")
    again = state.claim("v", 60)
    assert again and again.status == "running" and again.claims == 2
    with pytest.raises(Lost):
        state.beat(made.id, "w", 60)
    assert state.cancel(made.id).status == "cancelled" and state.beat(made.id, "v", 60) == "cancel"
    state.leave(made.id, "v")
    assert state.claim("u", 60) is None
    assert said(state, made.id)[-3:] == ["The job has been paused", "The job has been resumed", "The job has been cancelled"]
    state.event(made.id, "too late")
    assert said(state, made.id)[-1] == "The job has been cancelled"


def test_a_job_whose_worker_fell_silent_is_anothers(state: State) -> None:
    made = running(state)
    state.beat(made.id, "w", 0.2)
    assert state.claim("v", 60) is None
    time.sleep(0.3)
    kept = state.checkpoint(made.id, 1, {}, {"a": SHA}, worker="w")  # the lease ran out, but nobody took the job yet
    taken = state.claim("v", 60)
    assert taken and taken.id == made.id and taken.claims == 2 and taken.status == "running"
    told = said(state, made.id)
    for act in (
        lambda: state.beat(made.id, "w", 60),
        lambda: state.learned(made.id, "w", estimated_finish=1),
        lambda: state.checkpoint(made.id, 1, {}, {"a": SHA}, worker="w"),
        lambda: state.finish(made.id, "succeeded", worker="w", manifest={"a": SHA}),
        lambda: state.held(made.id, "no", {}, worker="w", manifest={"a": SHA}),
        lambda: state.event(made.id, "Step 9/9", worker="w"),
        lambda: state.pause(made.id, "w"),
        lambda: state.drop_checkpoint(kept, "w"),
    ):
        with pytest.raises(Lost):
            act()
    assert said(state, made.id) == told and state.checkpoints(made.id) == [kept] and state.job(made.id).status == "running"  # type: ignore[union-attr]
    state.drop_checkpoint(kept, "v")
    assert state.checkpoints(made.id) == []
    assert state.finish(made.id, "succeeded", worker="v", manifest={"a": SHA}).status == "succeeded"
    assert said(state, made.id).count("Fine-tuning job started") == 1


def test_a_worker_takes_what_it_is_for_and_the_oldest_first(state: State) -> None:
    first, second = job(state), job(state)
    assert state.claim("w", 60, ("queued", "running")) is None and state.claim("w", 60, bases=["other"]) is None
    assert [state.claim("w", 60).id, state.claim("w", 60, bases=["tiny"]).id] == [first.id, second.id]  # type: ignore[union-attr]
    assert state.claim("w", 60) is None


def test_many_workers_get_every_job_once(place: str) -> None:
    """Each through connections of its own, as processes have them."""
    states = [State.open(place) for _ in range(4)]
    training = file(states[0]).id
    made = {job(states[0], training=training).id for _ in range(24)}
    taken: list[str] = []
    wrong: list[BaseException] = []

    def work(state: State, name: str) -> None:
        try:
            while claimed := state.claim(name, 60):
                taken.append(claimed.id)
                if claimed.status == "validating_files":
                    state.validated(claimed.id, name)
                else:
                    state.event(claimed.id, "working", key="working")
                    state.finish(claimed.id, "succeeded", worker=name, manifest={"a": SHA})
        except BaseException as error:
            wrong.append(error)

    _together([lambda state=state, i=i, k=k: work(state, f"w{i}.{k}") for i, state in enumerate(states) for k in range(2)])
    assert wrong == [] and sorted(taken) == sorted([*made, *made])  # once to be checked, once to be trained
    for id in made:
        assert states[0].job(id).status == "succeeded" and said(states[0], id).count("working") == 1  # type: ignore[union-attr]
    for state in states:
        state.close()


def test_an_end_comes_once_though_many_want_it(place: str) -> None:
    states = [State.open(place) for _ in range(3)]
    states[0].outbox.subscribe(["http://localhost:1/hook"])
    for _ in range(8):
        made = running(states[0])
        ends: list[str] = []

        def attempt(act: Any, name: str, ends: list[str] = ends) -> None:
            try:
                act()
                ends.append(name)
            except (Lost, Refused):
                pass

        _together(
            [
                lambda id=made.id: attempt(lambda: states[0].finish(id, "succeeded", worker="w", manifest={"a": SHA}), "succeeded"),
                lambda id=made.id: attempt(lambda: states[1].cancel(id), "cancelled"),
                lambda id=made.id: attempt(
                    lambda: states[2].finish(id, "failed", worker="w", error={"code": "x", "message": "m", "param": None}), "failed"
                ),
            ]
        )
        assert len(ends) == 1 and states[0].job(made.id).status == ends[0]  # type: ignore[union-attr]
        sent = states[0].outbox.due(60)
        assert sent and json.loads(sent.body)["type"] == f"fine_tuning.job.{ends[0]}" and states[1].outbox.due(60) is None
        assert (states[0].model(made.name) is not None) == (ends[0] == "succeeded")
        states[0].leave(made.id, "w")
    for state in states:
        state.close()


def test_quotas_hold_though_many_ask_at_once(place: str) -> None:
    states = [State.open(place) for _ in range(4)]
    training = file(states[0], size=0).id
    kept: list[str] = []

    def store(state: State, n: int) -> None:
        for i in range(5):
            try:
                state.files.add(File(fresh("file-"), "me", 100, 1, "f", "batch", f"{n}{i}".ljust(64, "0")), quota=1000)
                kept.append("file")
            except Refused as wrong:
                assert wrong.code == "exceeded_quota"
            try:
                job(state, training=training, most=7)
                kept.append("job")
            except Refused as wrong:
                assert wrong.code == "exceeded_quota"

    _together([lambda state=state, n=n: store(state, n) for n, state in enumerate(states)])
    assert (kept.count("file"), kept.count("job")) == (10, 7) and bytes_of(states[0], "me") == 1000
    for state in states:
        state.close()


def test_a_job_is_done_when_what_comes_after_its_training_is(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = running(state)
    state.event(earlier.id, "Step 1/1", type="metrics", worker="w")
    with monkeypatch.context() as patch:
        patch.setattr("saddlepoint.service.life.time", type("late", (), {"time": staticmethod(lambda: time.time() + 90)}))
        state.finish(earlier.id, "succeeded", worker="w", manifest={"a": SHA}, trained_tokens=3)
    assert 89 <= state.afterwards("tiny") <= 91 and state.afterwards("other") == 0
    made = running(state)
    setting = Setting("", "", tmp_path)
    teller = Teller(Task(made, "w", setting, state, Blobs(tmp_path), threading.Event(), threading.Event()))
    began = time.time()
    for step in range(1, 8):
        teller(Step(step, 7, 1.0, 0.5))
    assert 88 <= (state.job(made.id).estimated_finish or 0) - began < 100  # type: ignore[union-attr]
    (speed,) = [e for e in state.events(made.id)[0] if e.data and "steps_left" in e.data]
    assert speed.data and speed.data["steps_left"] == 1 and speed.message.startswith("A step takes ")
    assert state.pause(made.id).estimated_finish is None


def test_models_and_checkpoints_count_in_their_owners_quota(place: str) -> None:
    state = State.open(place, size={"c" * 64: 7, "1" * 64: 100, "2" * 64: 100}.__getitem__)
    made = running(state, training=file(state, size=10).id)
    for step in (1, 2):
        state.checkpoint(made.id, step, {}, {"config": "c" * 64, "weights": str(step) * 64}, worker="w")
    state.finish(made.id, "succeeded", worker="w", manifest={"config": "c" * 64, "weights": "2" * 64}, result=("b" * 64, 5))
    assert bytes_of(state, "me") == 10 + 7 + 100 + 100 + 5 and bytes_of(state, "other") == 0  # what they share is there once
    more = File(fresh("file-"), "me", 50, 1, "f", "batch", "e" * 64)
    with pytest.raises(
        Refused, match="222 bytes are stored under this key and 50 more would exceed its quota of 250; delete files or models"
    ):
        state.files.add(more, quota=250)
    with pytest.raises(Refused, match="exceed its quota"):
        job(state, training=made.training_file, quota=222)
    assert state.delete_model(f"{made.name}:ckpt-step-1") and state.delete_model(made.name) and bytes_of(state, "me") == 122
    assert state.files.add(more, quota=250) and job(state, training=made.training_file, quota=222)
    state.close()


def test_blobs_are_dropped_with_the_last_that_needs_them(state: State, dropped: list[str]) -> None:
    shared, own = "c" * 64, "d" * 64
    first, second = file(state, shared), file(state, shared)
    assert state.files.delete(first.id, "me") and dropped == []
    made = running(state, training=second.id)
    with pytest.raises(Refused, match="needed by the job"):
        state.files.delete(second.id)
    for step in range(1, 6):
        state.checkpoint(made.id, step, {}, {"config": shared, "weights": str(step) * 64}, worker="w")
        state.checkpoint(made.id, step, {}, {"config": shared, "weights": str(step) * 64}, worker="w")  # told again: nothing new
    state.checkpoint(made.id, 4, {"loss": 1}, {"config": "7" * 64, "weights": "9" * 64}, worker="w")  # by one that began anew
    state.checkpoint(made.id, 4, {"loss": 2}, {"config": "7" * 64, "weights": "4" * 64}, worker="w")  # and again: what both have stays
    state.checkpoint(made.id, 4, {"loss": 2}, {"config": shared, "weights": "4" * 64}, worker="w")
    assert dropped[2:] == ["4" * 64, "9" * 64, "7" * 64] and state.checkpoints(made.id)[1].metrics == {"loss": 2}
    del dropped[2:]
    assert [c.step for c in state.checkpoints(made.id)] == [5, 4, 3] and sorted(dropped) == ["1" * 64, "2" * 64]
    state.finish(made.id, "succeeded", worker="w", manifest={"config": shared, "weights": own})
    assert state.files.delete(second.id) and not state.files.delete(second.id) and shared not in dropped
    for checkpoint in state.checkpoints(made.id):
        assert state.delete_model(checkpoint.name, "me")
    assert sorted(dropped) == [str(step) * 64 for step in range(1, 6)]
    assert not state.delete_model(made.name, "other") and state.delete_model(made.name, "me") and not state.delete_model(made.name)
    assert sorted(dropped)[5:] == [shared, own]
    with pytest.raises(Refused):
        state.files.add(File(fresh("file-"), "me", 100, 1, "f", "batch", "e" * 64), quota=1)
    assert dropped[-1] == "e" * 64  # it was put and is not needed
    given_up = running(state)
    state.checkpoint(given_up.id, 1, {}, {"weights": "8" * 64}, worker="w")
    state.cancel(given_up.id)
    assert dropped[-1] == "8" * 64 and state.checkpoints(given_up.id) == []


def test_what_is_held_is_kept_until_it_is_released(state: State, dropped: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = running(state)
    held = state.held(made.id, "ASR rose", {"asr": 0.4}, worker="w", manifest={"a": "f" * 64}, trained_tokens=3)
    assert held.status == "failed" and held.error == {"code": "held", "message": "ASR rose", "param": None} and held.trained_tokens == 3
    assert state.model(made.name) is None and dropped == []
    with monkeypatch.context() as patch:
        patch.setattr("saddlepoint.service.life.time", type("late", (), {"time": staticmethod(lambda: time.time() + 900)}))
        released = state.release(made.id, "admin", "looked at")
    assert (
        released.finished_at == held.finished_at
        and released.status == "succeeded"
        and released.error is None
        and released.held is None
        and dropped == []
    )
    assert state.model(made.name).manifest == {"a": "f" * 64}  # type: ignore[union-attr]
    with pytest.raises(Refused, match="holds no model back"):
        state.release(made.id, "admin", "again")


def test_what_is_held_goes_when_it_is_deleted_or_nobody_releases_it(
    state: State, dropped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [running(state) for _ in range(2)]
    for n, made in enumerate(both):
        state.checkpoint(made.id, 1, {}, {"a": f"{n}e" * 32}, worker="w")
        state.held(made.id, "ASR rose", {}, worker="w", manifest={"a": f"{n}f" * 32})
    state.expire()
    assert dropped == [] and state.discard(both[0].id, "by me").held is None
    assert sorted(dropped) == ["0e" * 32, "0f" * 32] and said(state, both[0].id)[-1] == "The held model was deleted: by me"
    for act in (lambda: state.discard(both[0].id, "again"), lambda: state.release(both[0].id, "admin", "late")):
        with pytest.raises(Refused, match="holds no model back"):
            act()
    monkeypatch.setattr("saddlepoint.service.state.HELD", -1)
    state.expire()
    assert sorted(dropped) == ["0e" * 32, "0f" * 32, "1e" * 32, "1f" * 32] and state.job(both[1].id).held is None  # type: ignore[union-attr]
    assert state.job(both[1].id).error["code"] == "held"  # type: ignore[index, union-attr]


def test_webhooks_wait_until_they_are_received(state: State) -> None:
    secrets = state.outbox.subscribe(["http://localhost:1/a", "http://localhost:1/b"])
    assert state.outbox.subscribe(list(secrets)) == secrets and all(s.startswith("whsec_") for s in secrets.values())
    state.cancel(job(state).id)
    one, two = state.outbox.due(60), state.outbox.due(60)
    assert one and two and one.url != two.url and one.id == two.id and one.secret == secrets[one.url] and state.outbox.due(60) is None
    state.outbox.delivered(one)
    state.outbox.again(two, -1)
    again = state.outbox.due(0)
    assert again and again.url == two.url and again.tries == 2  # whoever had it fell silent, so it is due at once
    assert state.outbox.due(60).tries == 3  # type: ignore[union-attr]
    state.outbox.again(two, -1)
    state.outbox.subscribe([])
    assert state.outbox.due(60) is None
    with pytest.raises(UsageError, match="--webhook"):
        state.outbox.subscribe(["file:///etc/passwd"])


def test_a_database_has_a_name_of_its_own(place: str, tmp_path: Path) -> None:
    first, again, other = (State.open(at) for at in (place, place, str(tmp_path / "other")))
    assert first.id == again.id != other.id
    for state in (first, again, other):
        state.close()


def test_a_database_is_made_once_and_of_one_version(place: str) -> None:
    made: list[State] = []
    _together([lambda: made.append(State.open(place))] * 6)
    assert len(made) == 6
    id = job(made[0]).id
    assert all(state.job(id) for state in made)
    with writing(made[0]._engine) as db:
        db.execute(update(NOTE).values(value=99))
    with pytest.raises(StoreError, match="schema 99"):
        State.open(place)
    for state in made:
        state.close()


def test_a_place_that_cannot_be_had_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for wrong, kind in (
        (str(tmp_path / "file"), UsageError),
        ("nosuchdialect://x", UsageError),
        ("postgresql+pg8000://u:p@127.0.0.1:1/x", StoreError),
    ):
        with pytest.raises(kind):
            State.open(wrong)
    (tmp_path / "state.db").write_bytes(b"this is no database, but long enough to be read as one" * 100)
    with pytest.raises(StoreError):
        State.open(str(tmp_path))


def test_what_postgresql_says_is_told_in_words(server: str) -> None:
    with pytest.raises(StoreError, match='database: database "none" does not exist; see'):
        State.open(server + "none")


def _together(acts: list[Any]) -> None:
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_a_file_whose_upload_was_killed_is_swept(state: State, dropped: list[str]) -> None:
    def put(at: float, sha: str) -> str:
        return state.files.add(File(fresh("file-"), "me", 1, int(at), "f", "batch", sha, "uploaded")).id

    new, old, done = put(time.time(), "1" * 64), put(time.time() - 25 * 3600, "2" * 64), put(time.time() - 25 * 3600, "3" * 64)
    state.files.ready(done)
    state.files.sweep()
    assert state.files.get(new) and state.files.get(done) and not state.files.get(old) and dropped == ["2" * 64]


# ---- blobs


@pytest.fixture(params=["folder", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "files" if request.param == "folder" else f"memory://{tmp_path.name}")


def test_a_blob_is_kept_once_under_its_hash(blobs: Blobs, tmp_path: Path) -> None:
    data = b"x" * 3_000_000
    (tmp_path / "big").write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    assert blobs.put(data) == blobs.put(tmp_path / "big") == blobs.put(iter([data[:7], data[7:]])) == (sha, len(data))
    assert blobs.has(sha) and b"".join(blobs.chunks(sha)) == data and blobs.open(sha).read(3) == b"xxx"
    if (folder := tmp_path / "files").is_dir():
        assert folder.stat().st_mode & 0o077 == 0
    blobs.remove(sha), blobs.remove(sha)
    assert not blobs.has(sha)
    with pytest.raises(StoreError, match=sha):
        blobs.open(sha)
    for wrong in ("../../etc/passwd", "", "A" * 64, "a" * 63):
        with pytest.raises(StoreError, match="SHA-256"):
            blobs.has(wrong)


def test_what_breaks_off_leaves_nothing(blobs: Blobs) -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise OSError("the line is dead")

    with pytest.raises(OSError, match="dead"):
        blobs.put(broken())
    partial = f"{blobs._root}/partial"
    assert blobs._fs.ls(partial) == []
    blobs._fs.pipe(f"{partial}/of-a-process-that-was-killed", b"x")
    blobs.sweep(blobs.remove)
    assert len(blobs._fs.ls(partial)) == 1
    blobs.sweep(blobs.remove, age=0)
    assert blobs._fs.ls(partial) == []


def test_what_nothing_refers_to_is_swept(blobs: Blobs, tmp_path: Path) -> None:
    state = State.open(str(tmp_path / "state"), blobs.remove)
    kept, orphan = blobs.put(b"kept")[0], blobs.put(b"orphan")[0]
    file(state, kept)
    blobs.sweep(state.files.forget)
    assert blobs.has(orphan)  # it may be about to be referred to
    blobs.sweep(state.files.forget, age=0)
    assert blobs.has(kept) and not blobs.has(orphan) and blobs.size(kept) == 4
    with pytest.raises(StoreError, match="put it back"):
        blobs.size(orphan)
    state.close()


def test_the_files_of_one_database_are_no_other_ones(blobs: Blobs) -> None:
    sha, _ = blobs.put(b"x")
    blobs.belong("one"), blobs.belong("one")
    with pytest.raises(UsageError, match="another service, whose database is one and not other"):
        blobs.belong("other")
    gone: list[str] = []
    blobs.sweep(gone.append, age=-1)
    assert gone == [sha]
    blobs.belong("one")


def test_what_users_sent_is_for_the_operator_only(tmp_path: Path) -> None:
    Blobs(tmp_path / "files")
    for where in (str(tmp_path / "folder"), f"sqlite:///{tmp_path / 'other.db'}"):
        state = State.open(where)
        file(state)
        state.close()
    private = [tmp_path / "files", tmp_path / "folder", *tmp_path.rglob("*.db*")]
    assert len(private) >= 4 and [path for path in private if path.stat().st_mode & 0o77] == []


def test_a_folder_comes_back_wholly_or_not_at_all(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "deep" / "b").write_bytes(b"2")
    manifest = blobs.put_folder(source)
    assert set(manifest) == {"a", "deep/b"}
    blobs.fetch(manifest, tmp_path / "out")
    blobs.fetch(manifest, tmp_path / "out")
    assert (tmp_path / "out" / "deep" / "b").read_bytes() == b"2"
    blobs._fs.pipe(blobs._place(manifest["a"]), b"tampered with")
    with pytest.raises(StoreError, match="damaged"):
        blobs.fetch(manifest, tmp_path / "other")
    for name in ("../a", "/etc/a", "deep/../../a", ""):
        with pytest.raises(StoreError, match="names the file"):
            blobs.fetch({name: manifest["deep/b"]}, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["files", "out", "source"], ["out", "source"])


def test_a_place_for_files_that_cannot_be_had_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for wrong in ("nosuchprotocol://x", str(tmp_path / "file" / "below")):
        with pytest.raises(UsageError, match="--files"):
            Blobs(wrong)


class Reset:
    """The socket of a connection that the other side has reset."""

    def __init__(self, sock: Any):
        self.sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def read(self, size: int) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_connection_that_was_reset_is_made_anew_and_one_that_is_reset_in_between_is_an_error_in_words(server: str) -> None:
    state = State.open(fresh_database(server))
    with state._engine.connect() as db:
        own = db.connection.dbapi_connection
        own._sock = Reset(own._sock)  # type: ignore[union-attr]
        with pytest.raises(ConnectionResetError):
            own.cursor().execute("select 1")  # type: ignore[union-attr]
    assert state.jobs(None) == ([], False), "the pool asks before it lends, and makes another"
    with pytest.raises(StoreError, match="Connection reset"), writing(state._engine) as db:
        own = db.connection.dbapi_connection
        own._sock = Reset(own._sock)  # type: ignore[union-attr]
        db.execute(update(NOTE).values(value=1))
    assert state.jobs(None) == ([], False)
    state.close()
