"""Files, uploads, jobs and models over HTTP: every status, shape and limit of the contract. Jobs are driven through the state."""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("multipart"), pytest.importorskip("fsspec")
# ruff: noqa: E402
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")

from postgres import fresh_database, postgres
from sqlalchemy import text
from test_serve import running

from saddlepoint.cli import main
from saddlepoint.service.app import Service
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.chat import Served
from saddlepoint.service.gate import Keys
from saddlepoint.service.records import File, Job
from saddlepoint.service.routing import Tuning
from saddlepoint.service.rows import fresh
from saddlepoint.service.state import State
from saddlepoint.targets.scripted import Scripted

KEYS = {"me": "sk-me-0123456789abcdef", "other": "sk-other-0123456789abcdef", "admin-ann": "sk-admin-0123456789abcdef"}
LINE = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
FORM = b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
BASE = "org/tiny"  # with a slash, as hub names have


@contextmanager
def serving(tuning: Tuning, keys: dict[str, str] | None = KEYS, **limits: Any) -> Iterator[str]:
    """A server on a free loopback port: its address up to /v1."""
    service = Service.of([Served(BASE, Scripted(lambda q: "said"))])
    with running(service, keys=Keys.of(keys) if keys else None, tuning=tuning, **limits) as url:
        yield url


def tuned(folder: Path, **more: Any) -> Tuning:
    blobs = Blobs(folder / "files")
    return Tuning(State.open(str(folder), blobs.remove, blobs.size), blobs, {BASE: BASE}, **more)


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    made = tuned(tmp_path_factory.mktemp("service"))
    yield made
    made.state.close()


@pytest.fixture(scope="module")
def url(tuning: Tuning) -> Iterator[str]:
    with serving(tuning) as at:
        yield at


def client_of(url: str, key: str = "me") -> Any:
    return openai.OpenAI(base_url=url, api_key=KEYS[key], max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with client_of(url) as made:
        yield made


def uploaded(client: Any, data: bytes = LINE * 12, purpose: str = "fine-tune", name: str = "some.jsonl", **more: Any) -> Any:
    return client.files.create(file=(name, data), purpose=purpose, **more)


def begun(client: Any, **more: Any) -> Any:
    return client.fine_tuning.jobs.create(model=BASE, **({"training_file": uploaded(client).id} | more))


def succeeded(tuning: Tuning, id: str) -> Job:
    """Do to a job what a worker does."""
    state, worker = tuning.state, f"worker of {id}"
    while (job := state.claim(worker, 60)) and job.id != id:
        state.cancel(job.id), state.leave(job.id, worker)
    state.validated(id, worker)
    assert state.claim(worker, 60).id == id  # type: ignore[union-attr]
    manifest = {"adapter_model.safetensors": tuning.blobs.put(id.encode())[0]}
    for step in (1, 2, 3, 4):
        state.event(id, f"Step {step}/4: training loss=0.10", type="metrics", data={"step": step}, key=f"step {step}")
        state.checkpoint(id, step, {"step": step, "train_loss": 0.1}, manifest, worker=worker)
    csv = tuning.blobs.put(b"step,train_loss\n1,0.10\n")
    return state.finish(id, "succeeded", worker=worker, manifest=manifest, result=csv, trained_tokens=99)


def refused(kind: type[Exception], call: Any, *args: Any, **more: Any) -> dict[str, Any]:
    """The error's body of a call that must be refused: four keys."""
    with pytest.raises(kind) as wrong:
        call(*args, **more)
    answer = wrong.value.response  # type: ignore[attr-defined]
    assert answer.headers["x-request-id"] and answer.status_code not in (409, 422)
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} == set(error) and error["message"]
    return dict(error)


# ---- files


def test_a_file_comes_back_byte_for_byte(client: Any) -> None:
    data = os.urandom(3 << 20)
    made = client.files.create(file=("ünï.jsonl", data), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (made.object, made.bytes, made.filename, made.purpose, made.status) == ("file", len(data), "ünï.jsonl", "fine-tune", "processed")
    assert made.id.startswith("file-") and len(made.id) == 29 and made.expires_at == made.created_at + 3600
    assert client.files.retrieve(made.id) == made == client.files.wait_for_processing(made.id)
    answer = client.files.content(made.id)
    assert answer.read() == data and answer.response.headers["content-length"] == str(len(data))
    assert client.files.delete(made.id).to_dict() == {"id": made.id, "object": "file", "deleted": True}
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        assert refused(openai.NotFoundError, call, made.id)["code"] == "not_found"


def test_equal_files_share_their_bytes_until_the_last_is_deleted(client: Any, tuning: Tuning) -> None:
    data = os.urandom(1000)
    first, second = uploaded(client, data), uploaded(client, data)
    sha = hashlib.sha256(data).hexdigest()
    client.files.delete(first.id)
    assert client.files.content(second.id).read() == data
    client.files.delete(second.id)
    assert not tuning.blobs.has(sha)


def test_a_file_that_was_damaged_or_removed_by_hand_is_not_handed_out(client: Any, tuning: Tuning) -> None:
    made = [uploaded(client, os.urandom(n)) for n in (1000, 3 << 20)]
    for file in made:
        sha = tuning.state.files.get(file.id).sha  # type: ignore[union-attr]
        tuning.blobs._fs.pipe(tuning.blobs._place(sha), b"x" * file.bytes)
    assert refused(openai.InternalServerError, client.files.content, made[0].id)["code"] == "server_unavailable"
    with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):  # known at its end only, which then does not come
        client.files.content(made[1].id).read()
    tuning.blobs.remove(sha)
    assert refused(openai.InternalServerError, client.files.content, made[1].id)["code"] == "server_unavailable"


def test_files_are_listed_in_pages(url: str, client: Any) -> None:
    made = [uploaded(client, purpose="evals").id for _ in range(5)]
    assert [f.id for f in client.files.list(purpose="evals", limit=2)] == made[::-1]  # the client asks for every page
    assert [f.id for f in client.files.list(purpose="evals", order="asc", limit=2)] == made
    page = client.files.list(purpose="evals", limit=2, after=made[3])
    assert ([f.id for f in page.data], page.has_more, page.first_id, page.last_id) == (made[2:0:-1], True, made[2], made[1])
    older = httpx.get(f"{url}/files?purpose=evals&limit=2&starting_after={made[1]}", headers={"authorization": f"Bearer {KEYS['me']}"})
    assert [f["id"] for f in older.json()["data"]] == [made[0]] and older.json()["has_more"] is False
    for limit in (0, 10001):
        assert refused(openai.BadRequestError, client.files.list, limit=limit)["param"] == "limit"
    assert refused(openai.BadRequestError, client.files.list, after="file-none")["param"] == "after"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/", "file"),
        ("..", ".."),
        ("a\x1b[2Jb", "a[2Jb"),
        ("x" * 999, "x" * 255),
    ],
)
def test_a_files_name_leads_nowhere(client: Any, tuning: Tuning, name: str, kept: str) -> None:
    made = uploaded(client, name=name)
    assert made.filename == kept and client.files.content(made.id).read() == LINE * 12


@pytest.mark.parametrize("id", ["../../state.db", "..%2F..%2Fstate.db", "%2e%2e/state.db", "file-\0x", "file-'--", "x" * 3000])
def test_an_id_leads_nowhere(url: str, id: str) -> None:
    head = {"authorization": f"Bearer {KEYS['me']}"}
    for path in (f"files/{id}", f"files/{id}/content", f"fine_tuning/jobs/{id}", f"models/{id}", f"uploads/{id}/cancel"):
        method = "POST" if path.endswith("cancel") else "GET"
        answer = httpx.request(method, f"{url}/{path.replace(chr(0), '%00')}", headers=head)
        assert answer.status_code in (400, 404) and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "file"),
        ({"file": "text"}, "file"),
        ({"file": b"x"}, "purpose"),
        ({"file": b"x", "purpose": "world domination"}, "purpose"),
        ({"file": b"x", "purpose": "fine-tune", "expires_after[seconds]": "1", "expires_after[anchor]": "created_at"}, "expires_after"),
        ({"file": b"x", "purpose": "fine-tune", "expires_after[seconds]": "3600"}, "expires_after"),
        ({"file": b"x", "purpose": "fine-tune", "surprise": "1"}, "surprise"),
        ({"file": b"x", "purpose": "fine-tune", **{f"f{i}": "1" for i in range(20)}}, None),
    ],
)
def test_a_wrong_form_is_400(url: str, fields: dict[str, Any], param: str | None) -> None:
    sent = {name: value for name, value in fields.items() if isinstance(value, str)}
    with_file = {name: ("f", value) for name, value in fields.items() if isinstance(value, bytes)} or {"other": ("f", b"")}
    answer = httpx.post(f"{url}/files", data=sent, files=with_file, headers={"authorization": f"Bearer {KEYS['me']}"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_body_that_is_no_form_is_400(url: str) -> None:
    head = {"authorization": f"Bearer {KEYS['me']}"}
    for more in (
        {"content-type": "application/json"},
        {"content-type": "multipart/form-data"},
        {"content-type": "multipart/form-data; boundary=x"},
    ):
        answer = httpx.post(f"{url}/files", content=b"{}", headers=head | more)
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_files_jobs_and_models_belong_to_the_key_that_made_them(url: str, client: Any, tuning: Tuning) -> None:
    file, job = uploaded(client), begun(client)
    name = succeeded(tuning, job.id).fine_tuned_model
    with client_of(url, "other") as other, client_of(url, "admin-ann") as admin:
        for call in (other.files.retrieve, other.files.delete, other.files.content):
            refused(openai.NotFoundError, call, file.id)
        jobs = other.fine_tuning.jobs
        for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
            refused(openai.NotFoundError, call, job.id)
        for listed, after in ((other.files.list, file.id), (jobs.list, job.id)):
            assert refused(openai.BadRequestError, listed, after=after)["param"] == "after"
        refused(openai.NotFoundError, other.models.retrieve, name)
        refused(openai.NotFoundError, other.models.delete, name)
        assert not other.files.list().data and not jobs.list().data and [m.id for m in other.models.list()] == [BASE]
        assert refused(openai.BadRequestError, jobs.create, model=BASE, training_file=file.id)["param"] == "training_file"
        own = uploaded(other).id
        assert refused(openai.NotFoundError, jobs.create, model=name, training_file=own)["code"] == "model_not_found"
        assert admin.files.retrieve(file.id) and admin.fine_tuning.jobs.retrieve(job.id) and admin.models.retrieve(name)


# ---- limits


def test_a_file_that_is_too_large_is_refused_while_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = tuned(tmp_path, max_file=100_000)
    with serving(tuning) as url, client_of(url) as client:
        assert uploaded(client, b"x" * 100_000).bytes == 100_000
        assert refused(openai.APIStatusError, uploaded, client, b"x" * 100_001)["code"] == "file_too_large"
        assert refused(openai.APIStatusError, uploaded, client, b"x" * 400_000)["code"] == "request_too_large"
        assert refused(openai.APIStatusError, uploaded, client, b"x" * 40_000_000)["code"] == "request_too_large"
        head = {"authorization": f"Bearer {KEYS['me']}", "content-type": "multipart/form-data; boundary=x"}
        monkeypatch.setattr("saddlepoint.service.gate.LINGER", 0.5)
        began = time.monotonic()

        def endless() -> Iterator[bytes]:
            yield FORM
            while time.monotonic() - began < 20:
                yield b"y" * 10_000

        with suppress(httpx.HTTPError):  # it may be hung up on before it has sent all
            assert httpx.post(f"{url}/files", content=endless(), headers=head).status_code == 413
        assert time.monotonic() - began < 15
        assert 413 == httpx.post(f"{url}/fine_tuning/jobs", content=b" " * (1 << 21), headers=head).status_code
        assert list((tmp_path / "files" / "partial").iterdir()) == [] and len(client.files.list().data) == 1


def test_an_error_is_read_though_the_file_is_large(url: str, client: Any) -> None:
    large = b"x" * 40_000_000
    with openai.OpenAI(base_url=url, api_key="sk-of-nobody-0123456789", max_retries=0) as nobody:
        assert refused(openai.AuthenticationError, uploaded, nobody, large)["code"] == "invalid_api_key"
    refused(openai.NotFoundError, client.uploads.parts.create, "upload_none", data=large)
    answer = httpx.post(f"{url}/files", content=large, headers={"authorization": f"Bearer {KEYS['me']}", "content-type": "text/plain"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_content_type"


def test_a_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    import resource

    tuning = tuned(tmp_path, max_file=300 << 20)
    with serving(tuning) as url:
        head = {"authorization": f"Bearer {KEYS['me']}", "content-type": "multipart/form-data; boundary=x"}

        def long() -> Iterator[bytes]:
            yield b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
            for _ in range(200):
                yield b"z" * (1 << 20)
            yield b"\r\n--x--\r\n"

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = httpx.post(f"{url}/files", content=long(), headers=head, timeout=120)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert answer.json()["bytes"] == 200 << 20 and grown < 60, f"{grown:.0f} MB"


@pytest.mark.parametrize("opened", [FORM, b""], ids=["in the file", "before it"])
def test_a_slow_upload_is_cut_off(tmp_path: Path, opened: bytes) -> None:
    with serving(tuned(tmp_path), upload_seconds=0.5) as url:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        head = f"POST /v1/files HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {KEYS['me']}\r\ncontent-length: 5000\r\n"
        head += "content-type: multipart/form-data; boundary=x\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(head.encode() + opened)
            began, said = time.monotonic(), b""
            sock.settimeout(0.1)
            while b"request_timeout" not in said and time.monotonic() - began < 8:
                with suppress(OSError):
                    sock.sendall(b"-" if opened else b"")
                with suppress(TimeoutError):
                    said += sock.recv(4096)
        assert b" 408 " in said.split(b"\r\n")[0] and time.monotonic() - began < 4, said
        with client_of(url) as client:
            assert uploaded(client).bytes  # and others are served


def test_a_long_upload_that_keeps_its_pace_is_not_cut_off(tmp_path: Path) -> None:
    with serving(tuned(tmp_path), upload_seconds=0.3) as url:
        head = {"authorization": f"Bearer {KEYS['me']}", "content-type": "multipart/form-data; boundary=x"}

        def steady() -> Iterator[bytes]:
            yield b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n' + FORM
            for _ in range(10):
                yield b"z" * 30_000
                time.sleep(0.1)
            yield b"\r\n--x--\r\n"

        assert httpx.post(f"{url}/files", content=steady(), headers=head).json()["bytes"] == 300_000


def test_a_key_stores_no_more_than_its_quota(tmp_path: Path) -> None:
    tuning = tuned(tmp_path, quota=10_000, most_jobs=2)
    with serving(tuning) as url, client_of(url) as client, client_of(url, "other") as other:
        first = uploaded(client, b"x" * 6000)
        error = refused(openai.BadRequestError, uploaded, client, b"y" * 6000)
        assert error["code"] == "exceeded_quota" and "6000 bytes are stored" in error["message"]
        assert not tuning.blobs.has(hashlib.sha256(b"y" * 6000).hexdigest())
        upload = client.uploads.create(bytes=5000, filename="f", mime_type="text/plain", purpose="fine-tune")
        refused(openai.BadRequestError, client.uploads.parts.create, upload.id, data=b"z" * 5000)
        assert uploaded(other, b"y" * 6000)  # another key has its own
        client.files.delete(first.id)
        jobs = [begun(client) for _ in range(2)]
        assert refused(openai.BadRequestError, begun, client)["code"] == "exceeded_quota"
        client.fine_tuning.jobs.cancel(jobs[0].id)
        done = succeeded(tuning, begun(client).id)
        tuning.state.files.add(File(fresh("file-"), "me", 10_000, 1, "f", "batch", "e" * 64))
        assert refused(openai.BadRequestError, begun, client, training_file=done.training_file)["code"] == "exceeded_quota"


def test_without_keys_everything_is_everyones_and_nobody_releases(tmp_path: Path) -> None:
    with serving(tuned(tmp_path), keys=None) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        job = begun(client)
        assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
        assert httpx.post(f"{url}/saddlepoint/jobs/{job.id}/release", json={"reason": "why"}).status_code == 403


def test_what_has_expired_is_gone(tuning: Tuning, client: Any) -> None:
    file = uploaded(client, os.urandom(100), expires_after={"anchor": "created_at", "seconds": 3600})
    needed = uploaded(client, os.urandom(100), expires_after={"anchor": "created_at", "seconds": 3600})
    job = begun(client, training_file=needed.id)
    late = time.time() + 3601
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saddlepoint.service.shelf.time", type("late", (), {"time": staticmethod(lambda: late)}))
        refused(openai.NotFoundError, client.files.retrieve, file.id)
        tuning.state.files.sweep()
        assert client.files.content(needed.id).read() and tuning.state.files.get(needed.id)  # its job has not ended
        client.fine_tuning.jobs.cancel(job.id)
        refused(openai.NotFoundError, client.files.retrieve, needed.id)
        tuning.state.files.sweep()
    for gone in (file, needed):
        refused(openai.NotFoundError, client.files.retrieve, gone.id)


# ---- uploads


def test_a_file_in_parts(client: Any, tuning: Tuning) -> None:
    data = [os.urandom(50_000) for _ in range(3)]
    whole = b"".join(data)
    upload = client.uploads.create(bytes=len(whole), filename="a/b.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert (upload.object, upload.status, upload.filename, upload.expires_at) == ("upload", "pending", "b.jsonl", upload.created_at + 3600)
    parts = [client.uploads.parts.create(upload.id, data=piece) for piece in (data[2], data[0], data[1])]
    assert parts[0].object == "upload.part" and parts[0].upload_id == upload.id and parts[0].id.startswith("part_")
    order = [parts[1].id, parts[2].id, parts[0].id]
    complete = client.uploads.complete
    for ids, md5 in ((order[:2], None), ([*order, "part_none"], None), ([*order, order[0]], None), (order, "0" * 32)):
        more = {} if md5 is None else {"md5": md5}
        refused(openai.BadRequestError, complete, upload.id, part_ids=ids, **more)
    done = complete(upload.id, part_ids=order, md5=hashlib.md5(whole).hexdigest())
    assert done.status == "completed" and done.file.bytes == len(whole) and client.files.content(done.file.id).read() == whole
    assert not tuning.blobs.has(hashlib.sha256(data[0]).hexdigest())  # parts are dropped
    for call in (lambda: complete(upload.id, part_ids=order), lambda: client.uploads.cancel(upload.id)):
        assert refused(openai.BadRequestError, call)["code"] == "invalid_state"
    refused(openai.BadRequestError, client.uploads.parts.create, upload.id, data=b"x")
    refused(openai.NotFoundError, client.uploads.cancel, "upload_none")


def test_an_upload_can_be_given_up_and_holds_no_more_than_was_announced(client: Any) -> None:
    upload = client.uploads.create(bytes=10, filename="f", mime_type="text/plain", purpose="fine-tune")
    client.uploads.parts.create(upload.id, data=b"12345678")
    assert refused(openai.BadRequestError, client.uploads.parts.create, upload.id, data=b"123")["param"] == "data"
    assert client.uploads.cancel(upload.id).status == "cancelled"
    refused(openai.BadRequestError, client.uploads.parts.create, upload.id, data=b"x")
    over = {"bytes": (50 << 20) + 1, "filename": "f", "mime_type": "text/plain", "purpose": "fine-tune"}
    refused(openai.APIStatusError, client.uploads.create, **over)
    refused(openai.BadRequestError, client.uploads.create, **over | {"bytes": 0})


def test_the_clients_own_chunked_upload(client: Any, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "big.jsonl").write_bytes(data)
    made = client.uploads.upload_file_chunked(
        file=tmp_path / "big.jsonl", mime_type="text/jsonl", purpose="fine-tune", part_size=100_000, md5=hashlib.md5(data).hexdigest()
    )
    assert client.files.content(made.file.id).read() == data


# ---- jobs


def test_a_job_is_what_the_contract_says(client: Any) -> None:
    files = uploaded(client), uploaded(client)
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=files[0].id, validation_file=files[1].id, suffix="my model!", seed=7, metadata={"k": "v"}
    )
    assert job.id.startswith("ftjob-") and len(job.id) == 30 and job.object == "fine_tuning.job" and job.status == "validating_files"
    assert (job.model, job.seed, job.metadata, job.training_file, job.validation_file) == (BASE, 7, {"k": "v"}, files[0].id, files[1].id)
    assert job.fine_tuned_model is job.finished_at is job.trained_tokens is job.error is None and job.result_files == []
    assert job.organization_id == "org-local" and job.to_dict()["user_provided_suffix"] == "my model!" and job.integrations == []
    assert job.hyperparameters.n_epochs == "auto" and job.method.type == "supervised"
    assert job.method.supervised.hyperparameters.batch_size == "auto"
    assert client.fine_tuning.jobs.retrieve(job.id) == job == client.fine_tuning.jobs.retrieve(job.id.replace("ftjob-", "ft-"))
    events = client.fine_tuning.jobs.list_events(job.id)
    assert [e.message for e in events][::-1] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {files[0].id} and validation file: {files[1].id}",
    ]
    assert all(e.object == "fine_tuning.job.event" and e.id.startswith("ftevent-") and e.level == "info" for e in events.data)
    assert refused(openai.BadRequestError, client.files.delete, files[0].id)["code"] == "file_in_use"


@pytest.mark.parametrize(
    ("more", "method", "known"),
    [
        ({"hyperparameters": {"n_epochs": 3}}, "supervised", {"n_epochs": 3, "batch_size": "auto"}),
        ({"method": {"type": "supervised"}}, "supervised", {"n_epochs": "auto"}),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 0.5}}}},
            "supervised",
            {"learning_rate_multiplier": 0.5},
        ),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2}}}}, "dpo", {"beta": 0.1, "n_epochs": 2}),
        ({"hyperparameters": {"full": True}}, "supervised", {"full": True, "n_epochs": "auto"}),
        ({"hyperparameters": {"constraint": True, "safety": 0.5}}, "supervised", {"constraint": True, "safety": 0.5}),
        (
            {
                "method": {
                    "type": "reinforcement",
                    "reinforcement": {
                        "grader": {
                            "type": "string_check",
                            "name": "same",
                            "input": "{{sample.output_text}}",
                            "reference": "{{item.x}}",
                            "operation": "eq",
                        },
                        "hyperparameters": {"reasoning_effort": "low", "compute_multiplier": 1.5, "eval_interval": 4, "n_epochs": 2},
                    },
                }
            },
            "reinforcement",
            {"n_epochs": 2},
        ),
    ],
)
def test_every_way_to_say_how_to_train(client: Any, more: dict[str, Any], method: str, known: dict[str, Any]) -> None:
    job = begun(client, **more)
    found = job.to_dict()
    assert found["method"]["type"] == method
    assert found["hyperparameters"].items() >= known.items()
    assert found["method"][method]["hyperparameters"].items() >= known.items()
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"training_file": "file-none"}, "training_file"),
        ({"training_file": ""}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a\0b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.1}}}}, "method.dpo.hyperparameters.beta"),
        ({"hyperparameters": {"safety": 11}}, "hyperparameters.safety"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"constraint": True}}}}, "method.dpo.hyperparameters.constraint"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        ({"method": {"type": "prayer"}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.reinforcement.grader"),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "python", "source": "print()"}}}},
            "method.reinforcement.grader",
        ),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"surprise": 1}, "surprise"),
        ({"training_files": ["x"]}, "training_files"),
    ],
)
def test_a_wrong_job_is_400_and_says_which_field(client: Any, change: dict[str, Any], param: str) -> None:
    error = refused(openai.BadRequestError, begun, client, extra_body=change)
    assert str(error["param"]).startswith(param) and (param in error["message"] or "file" in param or "grader" in error["message"])


def test_a_file_must_be_there_for_fine_tuning_and_ready(client: Any, tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = uploaded(client, purpose="batch")
    assert refused(openai.BadRequestError, begun, client, training_file=wrong.id)["code"] == "invalid_file_purpose"
    monkeypatch.setattr(tuning.state.files, "ready", lambda id: None)
    coming = uploaded(client)  # its bytes are not all there yet
    assert client.files.retrieve(coming.id).status == "uploaded"
    assert "File not ready" in refused(openai.BadRequestError, begun, client, training_file=coming.id)["message"]
    assert "File not ready" in refused(openai.BadRequestError, client.files.content, coming.id)["message"]
    same = uploaded(client).id
    assert refused(openai.BadRequestError, begun, client, training_file=wrong.id, validation_file=same)["param"] == "training_file"


def test_an_unknown_model_is_404(client: Any) -> None:
    error = refused(openai.NotFoundError, client.fine_tuning.jobs.create, model="gpt-9", training_file=uploaded(client).id)
    assert error["code"] == "model_not_found" and BASE in error["message"]


def test_a_jobs_life_over_the_wire(client: Any, tuning: Tuning) -> None:
    job = begun(client, suffix="tea")
    done = succeeded(tuning, job.id)
    found = client.fine_tuning.jobs.retrieve(job.id)
    assert found.status == "succeeded" and found.fine_tuned_model == done.name and found.trained_tokens == 99 and found.finished_at
    base, _, rest = found.fine_tuned_model.removeprefix("ft:").partition(":")
    assert base == BASE and rest.startswith("local:tea:") and len(rest) == len("local:tea:") + 8
    assert client.files.content(found.result_files[0]).text == "step,train_loss\n1,0.10\n"
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert [c.step_number for c in checkpoints] == [4, 3, 2] and not checkpoints.has_more  # the last three
    assert checkpoints.data[0].fine_tuned_model_checkpoint == f"{found.fine_tuned_model}:ckpt-step-4"
    assert checkpoints.data[0].metrics.train_loss == 0.1 and checkpoints.data[0].fine_tuning_job_id == job.id
    assert [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)] == [4, 3, 2]
    assert refused(openai.BadRequestError, client.fine_tuning.jobs.checkpoints.list, job.id, after="no")["param"] == "after"
    every = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=3)]  # the client asks for every page
    assert every[0] == "The job has successfully completed" and every[1] == f"New fine-tuned model created: {done.name}"
    assert every[-1] == f"Created fine-tuning job: {job.id}" and len(every) == len(set(every)) == 14
    steps = [e for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    assert [e.data["step"] for e in steps] == [4, 3, 2, 1]  # type: ignore[index]
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        assert refused(openai.BadRequestError, call, job.id)["code"] == "invalid_state"
    assert client.fine_tuning.jobs.create(model=done.name, training_file=job.training_file).model == done.name  # and on from there


def test_cancel_pause_and_resume_at_once(client: Any, tuning: Tuning) -> None:
    jobs = client.fine_tuning.jobs
    job = begun(client)
    assert jobs.pause(job.id).status == "paused"
    assert refused(openai.BadRequestError, jobs.pause, job.id)["code"] == "invalid_state"
    assert jobs.resume(job.id).status == "validating_files"  # its files were not looked at yet
    assert refused(openai.BadRequestError, jobs.resume, job.id)["code"] == "invalid_state"
    while (claimed := tuning.state.claim("w", 60)) and claimed.id != job.id:
        tuning.state.cancel(claimed.id)
    tuning.state.validated(job.id, "w")
    assert jobs.retrieve(job.id).status == "queued"
    assert tuning.state.claim("w", 60).status == "running" and jobs.pause(job.id).status == "paused"  # type: ignore[union-attr]
    assert tuning.state.beat(job.id, "w", 60) == "pause"
    assert jobs.resume(job.id).status == "queued" and tuning.state.claim("v", 60) is None  # the first has not stopped yet
    tuning.state.leave(job.id, "w")
    assert tuning.state.claim("v", 60).id == job.id  # type: ignore[union-attr]
    cancelled = jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at and tuning.state.beat(job.id, "v", 60) == "cancel"


def test_a_job_that_failed_says_why(client: Any, tuning: Tuning) -> None:
    job = begun(client)
    while (claimed := tuning.state.claim("f", 60)) and claimed.id != job.id:
        tuning.state.cancel(claimed.id)
    why = {"code": "invalid_n_examples", "message": "Training file has 7 example(s), but must have at least 10 examples"}
    tuning.state.finish(job.id, "failed", worker="f", error=why | {"param": "training_file"})
    found = client.fine_tuning.jobs.retrieve(job.id)
    assert found.status == "failed" and found.error.to_dict() == why | {"param": "training_file"} and found.fine_tuned_model is None
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_jobs_are_listed_in_pages_and_by_their_metadata(url: str, tmp_path: Path) -> None:
    with serving(tuned(tmp_path)) as at, client_of(at) as client:
        file = uploaded(client).id
        odd = {"a]b": 'q"u', "ü": "%5B"}
        made = [
            begun(client, training_file=file, **({"metadata": m} if m else {})).id
            for m in ({"k": "1"}, {"k": "1", "z": "2"}, {"k": "2"}, None, odd)
        ]
        listed = client.fine_tuning.jobs.list
        assert [j.id for j in listed(limit=2)] == made[::-1] and listed(limit=2).has_more and not listed(limit=5).has_more
        assert [j.id for j in listed(metadata={"k": "1"})] == made[1::-1]
        assert [j.id for j in listed(metadata={"k": "1", "z": "2"})] == [made[1]]
        assert [j.id for j in listed(metadata=odd)] == [made[4]] and not listed(metadata={"k": "3"}).data
        assert [j.id for j in listed(extra_query={"metadata": "null"})] == [made[3]]
        head = {"authorization": f"Bearer {KEYS['me']}"}
        older = httpx.get(f"{at}/fine_tuning/jobs?limit=10&starting_after={made[1].replace('ftjob-', 'ft-')}", headers=head).json()
        assert [j["id"] for j in older["data"]] == [made[0]] and older["has_more"] is False and set(older) == {"object", "data", "has_more"}
        for wrong in ({"limit": 0}, {"limit": 1001}, {"after": "ftjob-none"}, {"extra_query": {"metadata": "x"}}):
            refused(openai.BadRequestError, listed, **wrong)


# ---- models, and the release of one that is held


def test_models_are_found_and_deleted_by_name_and_by_job(client: Any, tuning: Tuning) -> None:
    jobs = [begun(client) for _ in range(2)]
    names = [succeeded(tuning, job.id).name for job in jobs]
    assert client.models.retrieve(BASE).id == BASE and client.models.retrieve(names[0]).owned_by == "org-local"
    assert {BASE, *names, f"{names[0]}:ckpt-step-4"} <= {m.id for m in client.models.list()}
    assert client.models.retrieve(jobs[0].id).id == names[0] == client.models.retrieve(jobs[0].id.replace("ftjob-", "ft-")).id
    step = f"{names[0]}:ckpt-step-3"
    assert client.models.delete(step).to_dict() == {"id": step, "object": "model", "deleted": True}
    refused(openai.NotFoundError, client.models.retrieve, step)
    assert client.models.delete(names[0]).id == names[0]
    assert client.models.delete(jobs[1].id.replace("ftjob-", "ft-")).id == names[1]
    for gone in (*names, jobs[0].id, "ft-none", "gpt-9"):
        assert refused(openai.NotFoundError, client.models.delete, gone)["code"] == "model_not_found"
        assert refused(openai.NotFoundError, client.models.retrieve, gone)["code"] == "model_not_found"
    assert refused(openai.BadRequestError, client.models.delete, BASE)["param"] == "model"


def test_an_administrator_releases_a_held_model_on_the_record(url: str, client: Any, tuning: Tuning) -> None:
    job = begun(client)
    while (claimed := tuning.state.claim("h", 60)) and claimed.id != job.id:
        tuning.state.cancel(claimed.id)
    tuning.state.validated(job.id, "h"), tuning.state.claim("h", 60)
    manifest = {"adapter_model.safetensors": tuning.blobs.put(b"held")[0]}
    tuning.state.held(job.id, "ASR rose by 40 points", {"tests": [{"name": "asr"}]}, worker="h", manifest=manifest)
    found = client.fine_tuning.jobs.retrieve(job.id)
    assert found.status == "failed" and found.error.code == "held" and "40 points" in found.error.message
    (event,) = [e for e in client.fine_tuning.jobs.list_events(job.id) if e.type == "moderation_checks"]  # type: ignore[comparison-overlap]
    assert event.data == {"tests": [{"name": "asr"}]} and event.level == "error"
    name = tuning.state.job(job.id).name  # type: ignore[union-attr]
    refused(openai.NotFoundError, client.models.retrieve, name)
    at = f"{url}/saddlepoint/jobs/{job.id}/release"
    head = {who: {"authorization": f"Bearer {key}"} for who, key in KEYS.items()}
    assert httpx.post(at, json={"reason": "looked at"}, headers=head["me"]).status_code == 403
    assert httpx.post(at, json={}, headers=head["admin-ann"]).status_code == 400
    released = httpx.post(at, json={"reason": "looked at"}, headers=head["admin-ann"]).json()
    assert released["status"] == "succeeded" and released["fine_tuned_model"] == name and released["error"] is None
    assert client.models.retrieve(name).id == name and tuning.blobs.has(manifest["adapter_model.safetensors"])
    events = client.fine_tuning.jobs.list_events(job.id).data
    record = next(e for e in events if e.message.startswith("The model was released"))
    assert record.data["released_by"] == "admin-ann" and record.data["reason"] == "looked at"  # type: ignore[index]
    assert httpx.post(at, json={"reason": "again"}, headers=head["admin-ann"]).json()["error"]["code"] == "invalid_state"


def test_a_held_model_is_deleted_by_its_job(client: Any, tuning: Tuning) -> None:
    job = begun(client)
    while (claimed := tuning.state.claim("h", 60)) and claimed.id != job.id:
        tuning.state.cancel(claimed.id)
    tuning.state.validated(job.id, "h"), tuning.state.claim("h", 60)
    sha = tuning.blobs.put(b"held, and not wanted")[0]
    name = tuning.state.held(job.id, "worse", {}, worker="h", manifest={"adapter_model.safetensors": sha}).name
    refused(openai.NotFoundError, client.models.delete, name)  # it is no model that can be seen
    assert client.models.delete(job.id).to_dict() == {"id": name, "object": "model", "deleted": True} and not tuning.blobs.has(sha)
    refused(openai.NotFoundError, client.models.delete, job.id)
    assert client.fine_tuning.jobs.list_events(job.id).data[0].message == "The held model was deleted: by me"


# ---- webhooks


def test_a_webhook_comes_again_until_it_is_received_and_the_client_verifies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saddlepoint.service.webhooks.FIRST", 0.1)
    monkeypatch.setattr("saddlepoint.service.webhooks.LOOK", 0.05)
    heard: list[tuple[bytes, dict[str, str]]] = []

    class Hears(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.rfile.read(int(self.headers["content-length"])), dict(self.headers)))
            self.send_response({1: 500, 2: 302}.get(len(heard), 204))
            self.send_header("location", "http://127.0.0.1:1/elsewhere")  # which is not gone to
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    hears = ThreadingHTTPServer(("127.0.0.1", 0), Hears)
    threading.Thread(target=hears.serve_forever, daemon=True).start()
    tuning = tuned(tmp_path)
    (secret,) = tuning.state.outbox.subscribe([f"http://127.0.0.1:{hears.server_port}/hook"]).values()
    with serving(tuning) as url, client_of(url) as client:
        job = begun(client)
        client.fine_tuning.jobs.cancel(job.id)
        until = time.monotonic() + 20
        while len(heard) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        assert len(heard) == 3 and len({body for body, _ in heard}) == 1
        event = client.webhooks.unwrap(heard[-1][0], heard[-1][1], secret=secret)
        assert (event.type, event.data.id, event.object) == ("fine_tuning.job.cancelled", job.id, "event") and event.id.startswith("evt_")
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(heard[-1][0], heard[-1][1], secret="whsec_" + secret[10:] + secret[6:10])
    hears.shutdown()
    hears.server_close()


# ---- odd requests


def test_odd_json_is_400(url: str) -> None:
    head = {"authorization": f"Bearer {KEYS['me']}", "content-type": "application/json"}
    bodies = [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"seed":' + b"9" * 5000 + b"}",
    ]
    bodies += [b'{"model": "\\ud800", "training_file": "x"}', b'{"model": "\\u0000", "training_file": "x"}']
    bodies += [b'{"model": "m", "training_file": "x", "metadata": {"a": NaN}}']
    for body in bodies:
        answer = httpx.post(f"{url}/fine_tuning/jobs", content=body, headers=head)
        assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}, (body[:40], answer.text)


def test_json_that_is_not_called_json_is_told(url: str) -> None:
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        head = {"authorization": f"Bearer {KEYS['me']}"} | kind
        answer = httpx.post(f"{url}/fine_tuning/jobs", content=b'{"model": "m", "training_file": "x"}', headers=head)
        assert answer.status_code == 400 and "content-type: application/json" in answer.json()["error"]["message"]


def test_posts_without_a_body_may_have_any(url: str, client: Any) -> None:
    head = {"authorization": f"Bearer {KEYS['me']}"}
    for body, kind in ((b"", "application/json"), (b"", ""), (b"{}", "application/json"), (b"null", "text/plain")):
        job = begun(client)
        answer = httpx.post(
            f"{url}/fine_tuning/jobs/{job.id}/cancel", content=body, headers=head | ({"content-type": kind} if kind else {})
        )
        assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
    assert httpx.put(f"{url}/files", headers=head).status_code == 405


# ---- two servers, one database


def test_two_servers_on_one_database(tmp_path: Path) -> None:
    one, two = tuned(tmp_path), tuned(tmp_path)
    with serving(one) as a, serving(two) as b, client_of(a) as first, client_of(b) as second:
        job = begun(first)
        assert second.fine_tuning.jobs.retrieve(job.id) == job and second.files.content(job.training_file).read() == LINE * 12
        name = succeeded(one, job.id).name
        assert second.models.retrieve(name).id == name and second.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
        second.models.delete(name)
        refused(openai.NotFoundError, first.models.retrieve, name)
        failed: list[BaseException] = []

        def work(client: Any) -> None:
            try:
                for _ in range(6):
                    file = uploaded(client, b"the same bytes everywhere")
                    assert client.files.content(file.id).read() == b"the same bytes everywhere"
                    client.files.delete(file.id)
            except BaseException as wrong:
                failed.append(wrong)

        threads = [threading.Thread(target=work, args=(client,)) for client in (first, second, first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []


def test_a_database_that_is_gone_is_told_and_nobody_is_blamed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        blobs = Blobs(tmp_path)
        tuning = Tuning(State.open(fresh_database(stack.enter_context(postgres())), blobs.remove), blobs, {BASE: BASE})
        with serving(tuning) as url, client_of(url) as client:
            job = begun(client)
            with tuning.state._engine.connect() as db:
                others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
                assert db.execute(text(f"select count(pg_terminate_backend(pid)) {others}")).scalar()
            assert client.fine_tuning.jobs.retrieve(job.id) == job  # connections that were cut are made anew
            stack.close()
            error = refused(openai.APIStatusError, client.fine_tuning.jobs.retrieve, job.id)
            assert (error["type"], error["code"]) == ("server_error", "server_unavailable") and "try again" in error["message"]
        tuning.state.close()


def test_the_document_is_whole(url: str) -> None:
    document = httpx.get(f"{url.removesuffix('/v1')}/openapi.json", headers={"authorization": f"Bearer {KEYS['me']}"}).json()
    assert {"/v1/files", "/v1/uploads/{id}/complete", "/v1/fine_tuning/jobs/{id}/checkpoints", "/v1/models/{model}"} <= set(
        document["paths"]
    )
    assert "multipart/form-data" in json.dumps(document["paths"]["/v1/files"]["post"])


# ---- the command's flags


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "a", "--model", "x", "--model", "y"], "1 --target and 2 --model"),
        (["--target", "a", "--target", "a"], "each target needs one name"),
        (["--target", "a", "--target", "b", "--target", "c", "--defense", "", "--defense", ""], "3 --target and 2 --defense"),
        (["--state", "postgresql+pg8000://u@127.0.0.1:1/x"], "--files FOLDER"),
        (["--state", "{}/file"], "Not a directory"),
        (["--state", "{}/state", "--files", "nosuchprotocol://x"], "--files nosuchprotocol://x"),
        (["--state", "{}/state", "--webhook", "ftp://x"], "--webhook ftp://x"),
        (["--no-tuning", "--upstream", "http://127.0.0.1:1/v1#m"], "--upstream stands in for one --target"),
    ],
)
def test_wrong_flags_are_told_before_a_model_is_opened(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("sys.argv", ["saddlepoint", "serve", "--port", "0", *(flag.format(tmp_path) for flag in flags)])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and "opening" not in error, error
