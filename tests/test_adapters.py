"""Fine-tuned models on running servers: there the moment they are published, on every server, behind guards, and gone when deleted."""

import gc
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch"), pytest.importorskip("peft"), pytest.importorskip("fastapi"), pytest.importorskip("uvicorn")
# ruff: noqa: E402
openai = pytest.importorskip("openai")
from test_lora_serving import adapter
from test_serve import FOX, KEY, OTHER, TEA, ask, running

from saddlepoint.defenses.detection.perplexity_filter import PerplexityFilter
from saddlepoint.service.adapters import Adapters
from saddlepoint.service.app import Service
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.chat import Served
from saddlepoint.service.gate import Keys
from saddlepoint.service.records import File, Job
from saddlepoint.service.routing import Tuning
from saddlepoint.service.rows import fresh
from saddlepoint.service.state import State
from saddlepoint.service.upstream import Upstream
from saddlepoint.targets.hf import HF
from saddlepoint.targets.openai import OpenAI
from saddlepoint.types import Query, Sampling, user

if TYPE_CHECKING:
    from collections.abc import Sequence

ADMIN = "sk-admin-0123456789"
KEYS = Keys.of({"me": KEY, "other": OTHER, "admin": ADMIN})


def published(state: State, blobs: Blobs, folder: Path, owner: str = "me", base: str = "tiny", suffix: str = "") -> str:
    """What a worker does at a job's end."""
    file = state.files.add(File(fresh("file-"), owner, *blobs.put(b"{}")[1:], int(time.time()), "file", "fine-tune", blobs.put(b"{}")[0]))
    state.files.ready(file.id)
    name = f"ft:{base}:local:{suffix}:{fresh('', 8)}"
    asked = {"type": "supervised", "supervised": {"hyperparameters": {}}}
    job = state.create(Job(fresh("ftjob-"), owner, int(time.time()), base, base, name, file.id, asked, {}, 7))
    assert state.claim("w", 60)
    state.validated(job.id, "w")
    assert state.claim("w", 60)
    manifest = blobs.put_folder(folder)
    state.checkpoint(job.id, 3, {}, manifest, worker="w")
    state.finish(job.id, "succeeded", worker="w", manifest=manifest)
    return name


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("adapters")
    return [adapter(tiny_folder, out / f"a{i}", i + 10) for i in range(4)]


@pytest.fixture
def place(tmp_path: Path) -> tuple[State, Blobs]:
    return State.open(str(tmp_path / "state")), Blobs(tmp_path / "files")


@pytest.fixture(scope="module")
def merged(folders: list[Path]) -> list[HF]:
    return [HF.load(str(f), dtype="float32", device="cpu") for f in folders]


def service(place: tuple[State, Blobs], bases: "Sequence[Served]", **more: Any) -> tuple[Service, Tuning]:
    adapters = Adapters(*place, {one.name: one for one in bases}, **more)
    return Service.of(bases, adapters=adapters), Tuning(*place, bases={one.name: one.name for one in bases})


def said(text: str, of: HF) -> str:
    return of.generate([Query(user(text), Sampling(12))])[0].text


def client(url: str, key: str = KEY) -> Any:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


def test_a_model_is_callable_once_it_is_published_on_every_server_and_no_longer_once_it_is_deleted(
    place: tuple[State, Blobs], folders: list[Path], merged: list[HF], tiny_folder: Path, tiny: HF
) -> None:
    mine = HF.load(str(tiny_folder), dtype="float32", device="cpu")
    (first, tuning), (second, _) = service(place, [Served("tiny", mine)]), service(place, [Served("tiny", tiny)])
    with running(first, keys=KEYS, tuning=tuning) as url, running(second, keys=KEYS, tuning=tuning) as other:  # noqa: SIM117
        with client(url) as here, client(other) as there, client(url, OTHER) as stranger, client(url, ADMIN) as admin:
            with pytest.raises(openai.NotFoundError):
                ask(here, "ft:tiny:local::missing0")
            names = [published(*place, folder) for folder in folders[:2]]
            for name, one in zip(names, merged, strict=False):
                for asked in (here, there, admin):
                    assert ask(asked, name).choices[0].message.content == said(TEA, one)
                assert ask(here, f"{name}:ckpt-step-3").choices[0].message.content == said(TEA, one)
                assert ask(here, name).model == name and name in [m.id for m in here.models.list()]
                with pytest.raises(openai.NotFoundError) as wrong:
                    ask(stranger, name)
                assert wrong.value.code == "model_not_found"
            assert ask(here, "tiny").choices[0].message.content == said(TEA, tiny)  # the base stays
            assert here.embeddings.create(model=names[0], input="tea").data and here.completions.create(model=names[0], prompt="tea")
            streamed = "".join(c.choices[0].delta.content or "" for c in ask(here, names[1], FOX, stream=True))
            assert streamed == said(FOX, merged[1])
            here.models.delete(names[0])
            for asked in (here, there):
                with pytest.raises(openai.NotFoundError):
                    ask(asked, names[0])
            assert first.adapters and names[0] not in first.adapters.loaded
            assert ask(here, names[1]).choices[0].message.content


def test_concurrent_chats_of_several_models_are_each_answered_by_their_own(
    place: tuple[State, Blobs], folders: list[Path], merged: list[HF], tiny: HF
) -> None:
    names = ["tiny", *(published(*place, folder) for folder in folders)]
    own, tuning = service(place, [Served("tiny", tiny)], most=2)  # so that some leave while they answer
    found: dict[int, str] = {}
    with running(own, keys=KEYS, tuning=tuning) as url, client(url) as here:

        def one(i: int) -> None:
            found[i] = ask(here, names[i % 5], f"{TEA} {i}").choices[0].message.content

        threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
        [t.start() for t in threads], [t.join(60) for t in threads]
        assert own.adapters and len(own.adapters.loaded) <= 2
    assert found == {i: said(f"{TEA} {i}", [tiny, *merged][i % 5]) for i in range(20)}


def test_the_least_recently_asked_leaves_memory(place: tuple[State, Blobs], folders: list[Path], tiny: HF) -> None:
    names, gone = [published(*place, folder) for folder in folders[:3]], list[str]()
    adapters = Adapters(*place, {"tiny": Served("tiny", tiny)}, unload=gone.append, most=2)
    for name in (names[0], names[1], names[0], names[2]):
        assert adapters.served(name, "me")
    assert adapters.loaded == [names[0], names[2]] and gone == [names[1]]
    kept = adapters.served(names[0], "me")
    assert kept is adapters.served(names[0], None) and adapters.served(names[0], "other") is None and names[0] in adapters.loaded
    assert adapters.served("gpt-9", None) is None and adapters.served("ft:\ud800", None) is None


def test_a_base_brings_its_guards_to_its_models(place: tuple[State, Blobs], folders: list[Path], merged: list[HF], tiny: HF) -> None:
    scores = PerplexityFilter(tiny, tiny, threshold=0.0).scores([TEA, FOX])
    odd, fine = (TEA, FOX) if scores[0] > scores[1] else (FOX, TEA)
    bare, guarded = Served("bare", tiny), Served("tiny", PerplexityFilter(tiny, tiny, threshold=sum(scores) / 2))
    own, tuning = service(place, [bare, guarded])
    name = published(*place, folders[0])
    with running(own, keys=KEYS, tuning=tuning) as url, client(url) as here, client(url, OTHER) as stranger:
        assert ask(here, name, odd).choices[0].finish_reason == "content_filter"
        assert ask(here, name, fine).choices[0].message.content == said(fine, merged[0])
        told = here.moderations.create(input=[odd, fine], model=name)
        assert told.model == name and [result.flagged for result in told.results] == [True, False]
        with pytest.raises(openai.BadRequestError, match="no guard"):
            here.moderations.create(input=odd, model="omni-moderation-latest")  # the first base's
        with pytest.raises(openai.NotFoundError):
            stranger.moderations.create(input=odd, model=name)


def test_a_whole_model_is_served_by_itself(
    place: tuple[State, Blobs], folders: list[Path], merged: list[HF], tiny: HF, tmp_path: Path
) -> None:
    merged[1].model.save_pretrained(tmp_path / "whole")
    merged[1].tokenizer.save_pretrained(tmp_path / "whole")
    name, *others = (published(*place, folder) for folder in (tmp_path / "whole", folders[0], *[tmp_path / "whole"] * 2))
    adapters = Adapters(*place, {"tiny": Served("tiny", tiny)})
    found = adapters.served(name, "me")
    assert found and said(TEA, found.target) == said(TEA, merged[1])  # type: ignore[arg-type]
    assert all(adapters.served(other, "me") for other in others)
    assert adapters.loaded == others, "two whole models are in memory, and any number of adapters up to the most"


def test_what_cannot_be_served_says_why(place: tuple[State, Blobs], folders: list[Path], tiny: HF, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_config.json").write_text("{")
    broken, foreign = published(*place, tmp_path / "odd"), published(*place, folders[0], base="elsewhere")
    own, tuning = service(place, [Served("tiny", tiny)])
    with running(own, keys=KEYS, tuning=tuning) as url, client(url) as here:
        with pytest.raises(openai.APIStatusError) as wrong:
            ask(here, broken)
        assert wrong.value.status_code == 502 and "cannot be loaded" in str(wrong.value)
        with pytest.raises(openai.NotFoundError, match="was trained on 'elsewhere'"):
            ask(here, foreign)
        assert own.adapters and own.adapters.loaded == []


# ---- an upstream


def vanishes(path: Path) -> bool:
    """Whether a folder goes within five seconds: it goes with the last request that has it."""
    for _ in range(100):
        gc.collect()
        if not path.exists():
            return True
        time.sleep(0.05)
    return False


class Loading:
    """A server as vLLM is with runtime LoRA loading: it knows what was loaded, and answers with the name and what lies at the path."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.calls.append((self.path, body))
                self.give(*outer.answer(self.path, body))

            def do_GET(self) -> None:
                self.give(200, {"object": "list", "data": [{"id": "big"}]})

            def give(self, status: int, body: Any) -> None:
                raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "text/plain" if isinstance(body, str) else "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        wrong = lambda status, message: (status, {"error": {"message": message, "type": "x", "param": None, "code": status}})
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.loaded:
                return wrong(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
            if not (Path(body["lora_path"]) / "adapter_model.safetensors").is_file():
                return wrong(404, f"No adapter found for {body['lora_path']}")
            self.loaded[body["lora_name"]] = body["lora_path"]
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            return (200, "Success") if self.loaded.pop(body["lora_name"], None) else wrong(404, "not loaded")
        if body["model"] not in ("big", *self.loaded):
            return wrong(404, f"The model `{body['model']}` does not exist.")
        form = body.get("response_format")
        text = f"{body['model']} says {body['messages'][-1]['content']}" if form is None else json.dumps(form["json_schema"]["schema"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def far() -> Iterator[Loading]:
    made = Loading()
    yield made
    made.close()


def test_an_upstream_generates_behind_our_guards_and_loads_adapters_as_they_are_asked(
    far: Loading, place: tuple[State, Blobs], folders: list[Path], tiny: HF, tmp_path: Path
) -> None:
    scores = PerplexityFilter(tiny, tiny, threshold=0.0).scores([TEA, FOX])
    odd, fine = (TEA, FOX) if scores[0] > scores[1] else (FOX, TEA)
    up = Upstream(far.url, tmp_path / "upstream")
    base = Served("tiny", PerplexityFilter(up.base(), tiny, threshold=sum(scores) / 2))
    own, tuning = service(place, [base], load=up.load, unload=up.unload, most=1)
    (left := up.folder / "left").mkdir(parents=True), (left / "lock").touch()
    names = [published(*place, folder) for folder in folders[:2]]
    with running(own, keys=KEYS, tuning=tuning) as url, client(url) as here:
        assert ask(here, "tiny", fine).choices[0].message.content == f"big says {fine}" and not far.loaded
        assert ask(here, names[0], fine).choices[0].message.content == f"{names[0]} says {fine}"
        path = Path(far.loaded[names[0]])
        assert (path / "adapter_model.safetensors").read_bytes() == (folders[0] / "adapter_model.safetensors").read_bytes()
        assert ask(here, names[0], odd).choices[0].finish_reason == "content_filter"  # our guard stands before it
        streamed = "".join(c.choices[0].delta.content or "" for c in ask(here, names[1], fine, stream=True))
        assert streamed == f"{names[1]} says {fine}"
        assert list(far.loaded) == [names[1]] and vanishes(path)  # the first one made room
        assert not left.exists()  # of a server that was killed
        far.loaded.clear()  # it was started anew
        assert ask(here, names[1], fine).choices[0].message.content == f"{names[1]} says {fine}"
        far.loaded.clear()
        assert "".join(c.choices[0].delta.content or "" for c in ask(here, names[1], fine, stream=True)) == f"{names[1]} says {fine}"
        schema = {"type": "object", "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert json.loads(ask(here, names[1], fine, response_format=form).choices[0].message.content) == schema
        here.models.delete(names[1])
        with pytest.raises(openai.NotFoundError):
            ask(here, names[1], fine)
        assert not far.loaded
        with pytest.raises(openai.BadRequestError, match="no weights"):
            here.completions.create(model="tiny", prompt="tea")


def test_an_adapter_that_made_room_while_it_answers_answers_on(
    far: Loading, place: tuple[State, Blobs], folders: list[Path], tmp_path: Path
) -> None:
    up = Upstream(far.url, tmp_path / "upstream")
    one, two = (Adapters(*place, {"tiny": Served("tiny", up.base())}, up.load, up.unload, most=1) for _ in range(2))  # servers
    first, second = (published(*place, folder) for folder in folders[:2])
    tea = [Query(user(TEA), Sampling(12))]

    def answers(served: Served | None) -> bool:
        assert served
        return served.target.generate(tea)[0].text == f"{served.name} says {TEA}"

    under_way, there = one.served(first, "me"), two.served(first, "me")
    assert answers(one.served(second, "me")) and first not in far.loaded
    assert answers(under_way) and answers(one.served(first, "me")) and answers(under_way) and answers(there)
    assert answers(two.served(second, "me")) and answers(one.served(first, "me"))
    assert Path(far.loaded[first]).is_dir()
    del under_way, there
    gc.collect()  # what earlier requests raised may hold it up
    assert len(list((tmp_path / "upstream").iterdir())) == 2  # one for each server


def test_an_upstream_that_loads_nothing_says_what_it_needs(place: tuple[State, Blobs], folders: list[Path], tmp_path: Path) -> None:
    from endpoint import Endpoint, says

    name = published(*place, folders[0])
    with Endpoint(says("yes")) as plain:
        up = Upstream(plain.url, tmp_path / "upstream")
        own, tuning = service(place, [Served("tiny", OpenAI.at(plain.name))], load=up.load, unload=up.unload)
        with running(own, keys=KEYS, tuning=tuning) as url, client(url) as here:
            assert ask(here, "tiny").choices[0].message.content == "yes"
            with pytest.raises(openai.APIStatusError, match="runtime LoRA loading"):
                ask(here, name)
