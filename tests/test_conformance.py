"""The official clients of both generations, unmodified, against `saddlepoint serve` as a user starts it: a real base, real jobs."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

for part in ("torch", "peft", "fastapi", "uvicorn", "multipart", "fsspec", "llguidance"):
    pytest.importorskip(part)
# ruff: noqa: E402
openai = pytest.importorskip("openai")

from postgres import fresh_database, postgres
from sqlalchemy import make_url

from saddlepoint.bench._environment import environment
from saddlepoint.errors import SaddlepointError

KEYS = {"me": "sk-me-0123456789abcdef", "other": "sk-other-0123456789abcdef", "admin": "sk-admin-0123456789abcdef"}
OLD = "openai==0.28.1"
SYSTEM = "You are a helpful assistant."
ASKED = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "How do I make tea?"}]
ENDED = ("succeeded", "failed", "cancelled")


def lines(n: int, first: int = 0) -> bytes:
    chats = [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"How do I make tea {i}?"},
            {"role": "assistant", "content": f"Take the leaves, then the water. That is tea {i}."},
        ]
        for i in range(first, first + n)
    ]
    return b"".join(json.dumps({"messages": chat}).encode() + b"\n" for chat in chats)


@dataclass
class World:
    """A running server and who listens to its webhooks.

    Args:
        heard: (body, headers) of webhooks; the first try of each is answered with 500.
    """

    url: str = ""
    secret: str = ""
    heard: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tries: int = 0

    def client(self, key: str = "me") -> Any:
        return openai.OpenAI(base_url=self.url, api_key=KEYS[key], max_retries=0, timeout=60, webhook_secret=self.secret)


def hearing(world: World) -> ThreadingHTTPServer:
    class Hears(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            world.tries += 1
            failed = world.tries == 1
            if not failed:
                world.heard.append((body, dict(self.headers)))
            self.send_response(500 if failed else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", 0), Hears)


@contextmanager
def started(base: Path, folder: Path, *flags: str, **env: str) -> Iterator[World]:
    """`saddlepoint serve` as a process of its own, and its worker's end with it."""
    folder.mkdir(exist_ok=True)
    made = World()
    hears = hearing(made)
    threading.Thread(target=hears.serve_forever, daemon=True).start()
    (folder / "keys").write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    command = [sys.executable, "-m", "saddlepoint", "serve", "--target", str(base), "--model", "tiny", "--defense", "hidden_text"]
    command += ["--port", "0", "--key-file", str(folder / "keys"), "--gate", "off", "--max-tokens", "16", *flags]
    command += ["--webhook", f"http://127.0.0.1:{hears.server_port}/hook"]
    with (folder / "log").open("wb") as log:
        runs = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    try:
        assert runs.stdout
        while not made.secret:
            said = runs.stdout.readline()
            assert said, (folder / "log").read_text()
            if found := re.match(r"(http://\S+/v1) serves 'tiny' behind: hidden_text", said):
                made.url = found[1]
            if found := re.match(r"webhook secret of \S+: (whsec_\S+)", said):
                made.secret = found[1]
        yield made
    finally:
        runs.terminate()
        try:
            runs.wait(30)
        finally:
            runs.kill()
            runs.communicate()
            hears.shutdown()
            hears.server_close()
    assert runs.returncode == -signal.SIGTERM  # which uvicorn gives on, once it has ended well
    assert [] == _processes(folder), "the worker outlived its server"


@pytest.fixture(scope="module")
def world(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("conformance")
    with started(tiny_folder, folder, "--target", str(tiny_folder), "--model", "second", "--state", str(folder / "state")) as made:
        yield made


def _processes(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            found.append(words.replace("\0", " "))
    return found


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Any]:
    with world.client() as made:
        yield made


def ended(client: Any, id: str, seconds: float = 240) -> Any:
    until = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in ENDED:
        assert time.monotonic() < until, job
        time.sleep(0.2)
    return job


@pytest.fixture(scope="module")
def job(client: Any) -> Any:
    """A job that this client began, and that has ended."""
    training = client.files.create(file=("train.jsonl", lines(12)), purpose="fine-tune")
    validation = client.files.create(file=("valid.jsonl", lines(3, 20)), purpose="fine-tune")
    assert client.files.wait_for_processing(training.id, poll_interval=0.1).status == "processed"
    made = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training.id,
        validation_file=validation.id,
        suffix="new-client",
        seed=3,
        metadata={"of": "conformance"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 4}}},
    )
    assert made.status in ("validating_files", "queued")
    return ended(client, made.id)


# ---- the client of 2023


def test_the_2023_client(world: World, tmp_path: Path) -> None:
    try:
        python = environment(OLD, "numpy", say=lambda _: None)  # which its embeddings need
    except SaddlepointError as wrong:
        pytest.skip(f"the client of 2023 was not tested: {wrong}")
    (tmp_path / "train.jsonl").write_bytes(lines(12))
    script = Path(__file__).with_name("client_2023.py")
    told = subprocess.run(
        [python, "-W", "ignore", str(script), world.url, KEYS["me"], KEYS["other"], str(tmp_path / "train.jsonl"), "tiny"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert told.stdout == "conforms\n", told.stdout + told.stderr


# ---- the client of today


def test_a_job_from_its_file_to_its_model(client: Any, job: Any) -> None:
    assert job.status == "succeeded", client.fine_tuning.jobs.list_events(job.id).data[0]
    assert job.fine_tuned_model.startswith("ft:tiny:local:new-client:") and job.seed == 3 and job.trained_tokens > 0
    assert job.hyperparameters.n_epochs == 4 and job.method.supervised.hyperparameters.batch_size == 4
    assert isinstance(job.hyperparameters.learning_rate_multiplier, int | float)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))[::-1]
    messages = [event.message for event in events]
    order = [
        "Created fine-tuning job",
        "Validating training file",
        "Files validated",
        "Fine-tuning job started",
        "Step 1/12: training loss=",
    ]
    places = [next(i for i, message in enumerate(messages) if message.startswith(start)) for start in order]
    assert places == sorted(places) and messages[-1] == "The job has successfully completed"
    steps = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in steps] == list(range(1, 13)) and steps[0].data["total_steps"] == 12
    names = {"train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"}
    assert names | {"full_valid_loss", "full_valid_mean_token_accuracy"} <= set(steps[-1].data)
    csv = client.files.content(job.result_files[0]).text.splitlines()
    assert csv[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(csv) == 13


def test_checkpoints_are_listed_and_callable(client: Any, job: Any) -> None:
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert [c.step_number for c in checkpoints] == [12, 9, 6]
    for checkpoint in checkpoints.data:
        assert checkpoint.metrics.step == checkpoint.step_number and checkpoint.metrics.full_valid_loss
        name = checkpoint.fine_tuned_model_checkpoint
        assert name == f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert client.chat.completions.create(model=name, messages=ASKED, max_tokens=4).model == name


def test_the_new_model_is_served_beside_its_base(client: Any, world: World, job: Any) -> None:
    assert {"tiny", "second", job.fine_tuned_model} <= {model.id for model in client.models.list()}
    assert client.chat.completions.create(model="second", messages=ASKED, max_tokens=4).model == "second"
    said = {}
    for name in ("tiny", job.fine_tuned_model):
        answer = client.chat.completions.create(model=name, messages=ASKED, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2)
        chunks = list(client.chat.completions.create(model=name, messages=ASKED, max_tokens=12, temperature=0, stream=True))
        said[name] = answer.choices[0].message.content
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == said[name]
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert len(set(said.values())) == 2  # it learned something
    with world.client("other") as other, pytest.raises(openai.NotFoundError):
        other.chat.completions.create(model=job.fine_tuned_model, messages=ASKED)


def test_a_job_goes_on_from_a_tuned_model_and_can_be_paused_resumed_and_cancelled(client: Any, job: Any) -> None:
    jobs = client.fine_tuning.jobs
    made = jobs.create(model=job.fine_tuned_model, training_file=job.training_file, hyperparameters={"n_epochs": 50, "batch_size": 1})
    assert made.model == job.fine_tuned_model
    until = time.monotonic() + 120
    while not [event for event in jobs.list_events(made.id) if event.type == "metrics"]:
        assert time.monotonic() < until and jobs.retrieve(made.id).status in ("validating_files", "queued", "running")
        time.sleep(0.1)
    assert jobs.pause(made.id).status == "paused" == jobs.retrieve(made.id).status
    assert jobs.resume(made.id).status == "queued"
    with pytest.raises(openai.BadRequestError):
        jobs.resume(made.id)
    assert jobs.cancel(made.id).status == "cancelled"
    assert made.id in [one.id for one in jobs.list(limit=1)]
    assert [one.id for one in jobs.list(metadata={"of": "conformance"})] == [job.id]


def test_too_few_examples_fail_the_job(client: Any) -> None:
    file = client.files.create(file=("few.jsonl", lines(7)), purpose="fine-tune")
    failed = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file.id).id)
    assert failed.status == "failed" and failed.error.code == "invalid_n_examples" and failed.error.param == "training_file"
    assert failed.error.message.startswith("Training file has 7 example(s), but must have at least 10 examples")


def test_webhooks_are_those_that_the_client_verifies(world: World, client: Any, job: Any) -> None:
    until = time.monotonic() + 30
    while not any(json.loads(body)["data"]["id"] == job.id for body, _ in world.heard):
        assert time.monotonic() < until, world.heard
        time.sleep(0.1)
    body, headers = next(one for one in world.heard if json.loads(one[0])["data"]["id"] == job.id)
    event = client.webhooks.unwrap(body, headers)
    assert event.type == "fine_tuning.job.succeeded" and event.data.id == job.id and event.object == "event"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace("succeeded", "failed"), headers)
    assert world.tries == len(world.heard) + 1  # the first was not received, and came again


def test_uploads_completions_embeddings_moderations_graders(client: Any, job: Any, tmp_path: Path) -> None:
    data = lines(20)
    (tmp_path / "parts.jsonl").write_bytes(data)
    upload = client.uploads.upload_file_chunked(
        file=tmp_path / "parts.jsonl", mime_type="text/jsonl", purpose="fine-tune", part_size=1000, md5=hashlib.md5(data).hexdigest()
    )
    assert upload.status == "completed" and client.files.content(upload.file.id).read() == data
    told = client.completions.create(model=job.fine_tuned_model, prompt="tea is", max_tokens=3, echo=True, logprobs=2, temperature=0)
    assert told.choices[0].text.startswith("tea is") and told.choices[0].logprobs.token_logprobs
    vectors = client.embeddings.create(model="tiny", input=["tea", "coffee"])
    assert len(vectors.data) == 2 and all(isinstance(x, float) for x in vectors.data[0].embedding)
    assert client.moderations.create(input="some text", model="tiny").results[0].flagged is False
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    shaped = client.chat.completions.create(
        model=job.fine_tuned_model,
        messages=ASKED,
        max_tokens=16,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert shaped.choices[0].finish_reason == "length" or isinstance(json.loads(shaped.choices[0].message.content)["ok"], bool)
    grader = {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "reference": "{{item.x}}", "operation": "eq"}
    graders = client.fine_tuning.alpha.graders
    assert graders.validate(grader=grader).grader.name == "same"
    assert graders.run(grader=grader, model_sample="tea", item={"x": "tea"}).reward == 1.0


def test_the_model_is_deleted(client: Any, job: Any) -> None:
    assert client.models.delete(job.fine_tuned_model).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(job.fine_tuned_model)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=job.fine_tuned_model, messages=ASKED)
    for file in client.files.list(purpose="fine-tune"):
        client.files.delete(file.id)
    assert not client.files.list(purpose="fine-tune").data


# ---- with its state elsewhere


def test_the_state_lies_in_postgresql(tiny_folder: Path, tmp_path: Path) -> None:
    with postgres() as server:
        url = fresh_database(server)
        password = str(make_url(url).password)
        flags = ("--state", url.replace(f":{password}", ""), "--files", str(tmp_path / "files"))
        with started(tiny_folder, tmp_path / "service", *flags, PGPASSWORD=password) as world, world.client() as client:
            file = client.files.create(file=("few.jsonl", lines(7)), purpose="fine-tune")
            failed = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file.id).id)
            assert failed.status == "failed" and failed.error.code == "invalid_n_examples"
