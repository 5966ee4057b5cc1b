"""`saddlepoint finetune`: the check as a user reads it, and the thin clients against a running server that really trains."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from saddlepoint.cli import main

KEYS = {"me": "sk-me-0123456789abcdef", "admin-ann": "sk-admin-0123456789abcdef"}


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Call `saddlepoint finetune` in an empty folder."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["saddlepoint", "finetune", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = Said(int(ended.value.code or 0), *capsys.readouterr())
        assert "Traceback" not in said.err
        return said

    return call


def row(i: int, **more: Any) -> dict[str, Any]:
    asked, answer = (
        f"How do I make tea number {i}? " + "x" * (i % 5),
        "Take the leaves, " * (1 + i % 3) + f"{i} of them, and then the water.",
    )
    turns = [("system", "You are a helpful assistant."), ("user", asked), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def write(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return name


# ---- check ----------------------------------------------------------------------------------------------------------


def test_check_names_each_mistake_with_line_and_column(finetune: Call) -> None:
    bad = '{"messages": [{"role": "user", "content": "Say "Hi"",}]}\n{"messages": [{"role": "usr", "content": "Hi"}, {"role": "assistant"}]}\n'
    file = write("bad.jsonl", bad, *map(row, range(10)))
    said = finetune("check", file, "--base", "")
    assert said.code == 2 and "format chat, 12 example(s)" in said.out and "not ready" in said.out
    for place in (bad.index('"Hi"') + 1, bad.index(",}") + 1):
        assert f"line 1, column {place}: " in said.out
    assert "line 2, column 24: a role is one of" in said.out and "line 2, column 49: the message has no" in said.out

    found = json.loads(finetune("check", file, "--base", "", "--json").out)
    assert not found["right"] and found["training"]["counts"] is None and found["cost"] is None
    assert [(m["line"], m["code"]) for m in found["training"]["mistakes"]] == [
        *((1, "invalid_json"),) * 2,
        (2, "unrecognized_role"),
        (2, "message_missing_key"),
    ]


def test_ten_thousand_mistakes_stay_readable(finetune: Call) -> None:
    said = finetune("check", write("many.jsonl", *[json.dumps(row(1)).replace('"user"', '"usr"') + "\n"] * 10_000), "--base", "")
    assert said.code == 2 and "unrecognized_role: 10,000" in said.out and "and 9,997 more" in said.out
    assert len(said.out.splitlines()) < 25


def test_check_counts_costs_and_times(finetune: Call, tiny_folder: Path) -> None:
    training, validation = write("train.jsonl", *map(row, range(20)), row(99, id=1)), write("val.jsonl", row(3), row(50))
    said = finetune("check", training, "--validation", validation, "--base", tiny_folder, "--price", 0.5, "--json")
    found, asked = (
        json.loads(said.out),
        json.loads(finetune("check", training, "--base", tiny_folder, "--prices", write("p.toml", "train = 0.5"), "--json").out),
    )
    assert said.code == 0 and found["right"] and found["epochs"] == 4 and found["method"] == "supervised"
    counts = found["training"]["counts"]
    assert counts["tokens"]["n"] == 21 and 0 < counts["trained"]["total"] < counts["tokens"]["total"] and counts["cut"] == []
    assert (
        counts["tokens"]["min"]
        <= counts["tokens"]["p5"]
        <= counts["tokens"]["median"]
        <= counts["tokens"]["p95"]
        <= counts["tokens"]["max"]
    )
    assert found["cost"]["training"] == pytest.approx(counts["tokens"]["total"] * 4 * 0.5 / 1000) == asked["cost"]["training"]
    assert found["seconds"] == pytest.approx(counts["tokens"]["total"] * 4 / found["speed"]["tokens_per_second"])
    assert asked["speed"] == found["speed"]  # measured once
    assert [(p["line"], p["other"], p["kind"]) for p in found["leaks"] if p["kind"] == "same"] == [(1, 4, "same")]
    assert [w["code"] for w in found["training"]["warnings"]] == ["unrecognized_key", "few_examples"]

    shown = finetune("check", training, "--validation", validation, "--base", tiny_folder, "--no-measure")
    assert shown.code == 0 and "tokens learned" in shown.out and "on this machine" not in shown.out
    assert "2023, in US dollars" in shown.out and "by default 4 epoch(s)" in shown.out
    assert "  line 1: the same as training line 4 (100% alike)" in shown.out
    assert "really training" in finetune("check", training, "--base", tiny_folder).out


def test_an_example_that_cannot_be_trained_on_is_a_mistake(finetune: Call, tiny_folder: Path) -> None:
    long = row(0)
    long["messages"][1]["content"] = "tea " * 900
    said = finetune("check", write("long.jsonl", *map(row, range(1, 12)), long), "--base", tiny_folder, "--no-measure")
    assert said.code == 2 and "not_trainable" in said.out and "line 12, column 1: " in said.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("none.jsonl", "--base", ""), "none.jsonl: cannot be read"),
        (("a.jsonl", "--base", "", "--format", "csv"), "no format 'csv'; allowed: chat, completion"),
        (("a.jsonl", "--base", "", "--prices", "b.toml"), "b.toml: "),
        (("a.jsonl", "--base", "", "--validation", "none.jsonl"), "none.jsonl: cannot be read"),
    ],
)
def test_what_a_user_can_correct_ends_with_two(finetune: Call, args: tuple[str, ...], said: str) -> None:
    write("a.jsonl", *map(row, range(10)))
    found = finetune("check", *args)
    assert found.code == 2 and f"error: {said}" in found.err


def test_what_is_no_language_model_counts_nothing(finetune: Call, tiny_classifier_folder: Path) -> None:
    found = finetune("check", write("a.jsonl", *map(row, range(10))), "--base", tiny_classifier_folder)
    assert found.code == 2 and "has no tokenizer and weights here" in found.err


# ---- the clients ----------------------------------------------------------------------------------------------------

pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("fsspec"), pytest.importorskip("openai")
pytest.importorskip("torch"), pytest.importorskip("peft")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[str]:
    """`saddlepoint serve` as a user starts it, with the tiny model and no gate."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    how = (
        "--target",
        str(tiny_folder),
        "--model",
        "tiny",
        "--defense",
        "",
        "--port",
        "0",
        "--key-file",
        "keys",
        "--state",
        "state",
        "--gate",
        "off",
    )
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "saddlepoint", "serve", *how], cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert server.stdout
        line = server.stdout.readline()
        try:
            match = re.match(r"(http://\S+/v1) serves 'tiny'", line)
            assert match, (folder / "log").read_text()
            yield match[1]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            server.stdout.close()


@pytest.fixture
def remote(finetune: Call, url: str, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The commands, with the server and the key where the official client looks for them."""
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", KEYS["me"])
    return finetune


def test_a_job_from_its_files_to_its_model(remote: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    training, validation = write("train.jsonl", *map(row, range(12))), write("val.jsonl", row(50), row(51))
    how = (
        "--suffix",
        "tea",
        "--seed",
        7,
        "--epochs",
        2,
        "--batch-size",
        4,
        "--learning-rate-multiplier",
        2,
        "--constraint",
        "--metadata",
        "who=me",
        "--metadata",
        "why=a=b",
    )
    said = remote("create", training, "--model", "tiny", "--validation", validation, *how)
    assert said.code == 0, said
    (id,) = re.findall(r"created (ftjob-\w+)", said.err)
    order = [
        "Created fine-tuning job",
        "Files validated",
        "Fine-tuning job started",
        "Step 1/6: ",
        "Step 6/6: ",
        "Checkpoint created at step 6",
    ]
    places = [said.out.index(words) for words in [*order, "New fine-tuned model created: ft:tiny:local:tea:", "successfully completed"]]
    assert places == sorted(places) and "status: succeeded" in said.out

    job = json.loads(remote("retrieve", id, "--json").out)
    assert (job["status"], job["seed"], job["metadata"], job["user_provided_suffix"]) == (
        "succeeded",
        7,
        {"who": "me", "why": "a=b"},
        "tea",
    )
    known = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 2, "constraint": True}
    assert job["method"]["supervised"]["hyperparameters"] == known
    model = job["fine_tuned_model"]
    assert f"fine_tuned_model: {model}" in remote("retrieve", id).out
    assert (
        id in remote("list").out
        and model in remote("list").out
        and [j["id"] for j in json.loads(remote("list", "--limit", 1, "--json").out)] == [id]
    )
    monkeypatch.setattr("saddlepoint.cli._finetune_client.out", Console(width=60, emoji=False))  # a narrow terminal
    assert id in remote("list").out.splitlines()[1].split() and model in remote("list").out.splitlines()[1].split()
    events = [json.loads(line) for line in remote("events", id, "--json").out.splitlines()]
    assert events[0]["message"] == f"Created fine-tuning job: {id}" and len([e for e in events if e["type"] == "metrics"]) == 6
    assert [e["message"] for e in events] == [line.partition("  ")[2] for line in remote("events", id).out.splitlines()]
    assert [e["message"] for e in events][-1] in remote("events", id, "--follow").out
    followed = [json.loads(line) for line in remote("events", id, "--follow", "--json").out.splitlines()]
    assert followed == [*events, job]
    checkpoints = json.loads(remote("checkpoints", id, "--json").out)
    assert [c["step_number"] for c in checkpoints] == [6, 3] and f"{model}:ckpt-step-3" in remote("checkpoints", id).out

    again = remote("create", job["training_file"], "--model", model, "--no-follow", "--json")  # a file by its id, on the tuned model
    other = json.loads(again.out)
    assert again.code == 0 and other["model"] == model and other["training_file"] == job["training_file"] and "uploaded" not in again.err
    assert json.loads(remote("cancel", other["id"], "--json").out)["id"] == other["id"]


def test_a_job_is_paused_resumed_and_cancelled(remote: Call) -> None:
    pair = {"input": {"messages": row(1)["messages"][:2]}}
    sides = [
        {side: [{"role": "assistant", "content": text}]}
        for side, text in (("preferred_completion", "Yes."), ("non_preferred_completion", "No."))
    ]
    file = write("pairs.jsonl", *[{**pair, **sides[0], **sides[1]}] * 12)
    job = json.loads(remote("create", file, "--model", "tiny", "--epochs", 50, "--beta", 0.2, "--no-follow", "--json").out)
    assert job["method"]["type"] == "dpo" and job["method"]["dpo"]["hyperparameters"]["beta"] == 0.2  # told from the file
    assert "status: paused" in remote("pause", job["id"]).out
    watched = remote("events", job["id"], "--follow")
    assert watched.code == 0 and f"saddlepoint finetune resume {job['id']}" in watched.err
    assert "status: paused" not in remote("resume", job["id"]).out
    assert "status: cancelled" in remote("cancel", job["id"]).out
    ended = remote("events", job["id"], "--follow")
    assert ended.code == 1 and "status: cancelled" in ended.out
    assert remote("cancel", job["id"]).code == 2  # it has ended


def test_a_bad_file_is_not_uploaded_unless_told_to(remote: Call) -> None:
    file = write("bad.jsonl", *map(row, range(10)), '{"messages": [}\n')
    said = remote("create", file, "--model", "tiny")
    assert said.code == 2 and "line 11, column 15: " in said.err and "has 1 mistake(s)" in said.err and "uploaded" not in said.err
    sent = remote("create", file, "--model", "tiny", "--no-check")
    assert sent.code == 1 and "uploaded" in sent.err and "status: failed" in sent.out and "line 11, column 15" in sent.err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("list", "--key", "sk-wrong"), 2, "give its key: --key or OPENAI_API_KEY"),
        (("list", "--url", "http://127.0.0.1:9/v1"), 1, "does not answer"),
        (("list", "--url", "nonsense"), 1, "does not answer"),
        (("retrieve", "ftjob-none"), 2, "says 404"),
        (("retrieve", ""), 2, "non-empty value"),
        (("cancel", "ftjob-none"), 2, "says 404"),
        (("checkpoints", "ftjob-none"), 2, "says 404"),
        (("release", "ftjob-none", "--reason", "why"), 2, "only an administrator"),
        (("create", "none.jsonl", "--model", "tiny"), 2, "none.jsonl: cannot be read"),
        (("create", "a.jsonl", "--model", "nano"), 2, "'nano' does not exist"),
        (("create", "a.jsonl", "--model", "tiny", "--metadata", "x"), 2, "metadata is KEY=VALUE; got 'x'"),
        (
            ("create", "a.jsonl", "--model", "tiny", "--method", "reinforcement", "--grader", "none.json"),
            2,
            "give a JSON file with a grader",
        ),
        (("create", "a.jsonl", "--model", "tiny", "--epochs", "51"), 2, "n_epochs"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(remote: Call, args: tuple[str, ...], code: int, said: str) -> None:
    write("a.jsonl", *map(row, range(10)))
    found = remote(*args)
    (line,) = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert found.code == code and said in line


@contextmanager
def holding(folder: Path) -> Iterator[tuple[str, str]]:
    """A server whose only job was held by its gate: its address and the job's id."""
    from saddlepoint.service.app import Service, create
    from saddlepoint.service.blobs import Blobs
    from saddlepoint.service.chat import Served
    from saddlepoint.service.gate import Keys
    from saddlepoint.service.records import File, Job
    from saddlepoint.service.routing import Tuning
    from saddlepoint.service.rows import fresh
    from saddlepoint.service.server import listening, server
    from saddlepoint.service.state import State
    from saddlepoint.targets.scripted import Scripted

    blobs = Blobs(folder / "files")
    state = State.open(str(folder), blobs.remove)
    id, how = fresh("ftjob-"), {"type": "supervised", "supervised": {"hyperparameters": {}}}
    sha, size = blobs.put(b"{}")
    file = state.files.add(File(fresh("file-"), "me", size, int(time.time()), "file", "fine-tune", sha)).id
    state.create(Job(id, "me", int(time.time()), "tiny", "tiny", "ft:tiny:local::abcdefgh", file, how, {}, 7))
    for _ in range(2):  # once to validate its files, once to train
        assert state.claim("worker", 60)
        if _ == 0:
            state.validated(id, "worker")
    state.held(id, "over-refusal rose by 40 points", {}, worker="worker", manifest={"adapter_model.safetensors": blobs.put(b"weights")[0]})
    service = Service.of([Served("tiny", Scripted(lambda q: "said"))])
    sock = listening("127.0.0.1", 0)
    runs = server(create(service, Keys.of(KEYS), tuning=Tuning(state, blobs, {"tiny": "tiny"})))
    thread = threading.Thread(target=runs.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1", id
    finally:
        runs.should_exit = True
        thread.join(20)
        service.pool.shutdown()
        state.close()


def test_an_administrator_releases_a_held_model(finetune: Call, tmp_path: Path) -> None:
    with holding(tmp_path / "held") as (at, id):
        held = finetune("retrieve", id, "--url", at, "--key", KEYS["me"])
        assert "status: failed" in held.out and "error: over-refusal rose by 40 points" in held.err
        denied = finetune("release", id, "--reason", "looked at it", "--url", at, "--key", KEYS["me"])
        assert denied.code == 2 and "only an administrator" in denied.err
        released = finetune("release", id, "--reason", "looked at it", "--url", at, "--key", KEYS["admin-ann"])
        assert released.code == 0 and "status: succeeded" in released.out and "fine_tuned_model: ft:tiny:local::abcdefgh" in released.out
        assert "The model was released by admin-ann: looked at it" in finetune("events", id, "--url", at, "--key", KEYS["me"]).out


# ---- the hosted service, which says some things otherwise than its own schema

HOSTED = {
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "model": "gpt-4o-mini-2024-07-18",
    "created_at": 1721764800,
    "fine_tuned_model": None,
    "status": "paused",  # which its schema lacks
    "training_file": "file-abc123",
    "hyperparameters": None,
    "error": {},
    "result_files": [],
    "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}},
    "shared_with_openai": False,
}
OLDER = {**HOSTED, "id": "ftjob-old", "status": "succeeded", "error": {"code": None, "message": None, "param": None}, "method": None}
HAPPENED = [
    {"object": "fine_tuning.job.event", "id": f"ftevent-{n}", "created_at": 1721764800 + n, "level": "info", "message": said, "type": kind}
    for n, said, kind in ((2, "Moderation checks passed", "moderation_checks"), (1, "Created fine-tuning job", "message"))
]


def test_the_commands_take_what_the_hosted_service_answers(finetune: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bytes]] = []

    class Hosted(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = self.path.partition("?")[0]
            asked.append((f"{self.command} {path}", self.rfile.read(int(self.headers.get("content-length") or 0))))
            told: dict[str, Any] = OLDER if "old" in path else HOSTED
            if path.endswith("/events"):
                told = {"object": "list", "data": HAPPENED, "has_more": False}
            elif asked[-1][0] == "GET /v1/fine_tuning/jobs":
                told = {"object": "list", "data": [HOSTED, OLDER], "has_more": False}
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None: ...

    hosted = ThreadingHTTPServer(("127.0.0.1", 0), Hosted)
    threading.Thread(target=hosted.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", KEYS["me"])
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{hosted.server_port}/v1")
    assert [line.split()[:2] for line in finetune("list").out.splitlines()[1:]] == [["ftjob-abc123", "paused"], ["ftjob-old", "succeeded"]]
    shown = finetune("retrieve", "ftjob-abc123")
    assert shown.code == 0 and 'method: {"type": "dpo"' in shown.out and "error" not in shown.err
    told = [line.partition("  ")[2] for line in finetune("events", "ftjob-abc123").out.splitlines()]
    assert told == ["Created fine-tuning job", "Moderation checks passed"]
    followed = finetune("events", "ftjob-old", "--follow")
    assert followed.code == 0 and "status: succeeded" in followed.out
    assert finetune("cancel", "ftjob-abc123").code == 0 and asked[-1] == ("POST /v1/fine_tuning/jobs/ftjob-abc123/cancel", b"")
    made = finetune("create", "file-abc123", "--model", "gpt-4o-mini-2024-07-18", "--epochs", 2, "--no-follow")
    assert made.code == 0 and json.loads(asked[-1][1]) == {
        "model": "gpt-4o-mini-2024-07-18",
        "training_file": "file-abc123",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    }
    hosted.shutdown()
    hosted.server_close()
