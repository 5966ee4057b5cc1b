"""The server as its clients see it: the official client against a running server, a real model and real guards behind it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("prometheus_client")
# ruff: noqa: E402
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")

from saddlepoint.defenses._stack import REFUSED
from saddlepoint.defenses.detection.perplexity_filter import PerplexityFilter
from saddlepoint.defenses.response.window_check import WindowCheck
from saddlepoint.errors import UsageError
from saddlepoint.exchange.blocks import export
from saddlepoint.policies import load
from saddlepoint.service.app import Service, create
from saddlepoint.service.blocks import BlockLog
from saddlepoint.service.chat import Served
from saddlepoint.service.gate import Keys
from saddlepoint.service.server import listening, server
from saddlepoint.store import Store
from saddlepoint.targets.openai import OpenAI
from saddlepoint.targets.scripted import Scripted
from saddlepoint.types import Completion, Query, Sampling, user

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

KEY, OTHER = "sk-test-0123456789", "sk-other-0123456789"
TEA = "How do I make green tea?"
FOX = "the quick brown fox jumps over the lazy dog! ! ! !"


@contextmanager
def running(service: Service, **limits: Any) -> Iterator[str]:
    """A server on a free loopback port: its address up to /v1."""
    sock = listening("127.0.0.1", 0)
    runs = server(create(service, **limits))
    thread = threading.Thread(target=runs.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    finally:
        runs.should_exit = True
        thread.join(20)
        service.pool.shutdown()
        assert not thread.is_alive()


class World:
    """What the tests need to know of the model and of its guards."""

    def __init__(self, tiny: "HF", log: Path):
        self.tiny, self.log = tiny, log
        scores = PerplexityFilter(tiny, tiny, threshold=0.0).scores([TEA, FOX])
        self.fine, self.odd = (TEA, FOX) if scores[0] < scores[1] else (FOX, TEA)
        guarded = PerplexityFilter(tiny, tiny, threshold=sum(scores) / 2)
        self.answer = tiny.generate([Query(user(self.fine), Sampling(60))])[0].text
        self.word = self.answer[40:48]  # what it will say after 40 characters, and so must not
        window = WindowCheck(tiny, every=8, patterns=(re.escape(self.word),), classifier="")  # type: ignore[arg-type]
        call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
        self.service = Service.of(
            [
                Served("tiny", tiny, prefill=True),
                Served("guarded", guarded),
                Served("watched", window),
                Served("lenient/watched", WindowCheck(guarded, every=8, patterns=(re.escape(self.word),), classifier=""), enforced=False),  # type: ignore[arg-type]
                Served("caller", Scripted(lambda q: call if "weather" in q.chat[0].text else "no tools")),
                Served("down", Scripted(lambda q: Completion("", finish="error", error="connection failed"))),
            ],
            log=BlockLog(log),
        )


@pytest.fixture(scope="module")
def world(tiny: "HF", tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny, tmp_path_factory.mktemp("serve") / "blocks.jsonl")


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    with running(world.service, keys=Keys.of({"me": KEY, "other": OTHER})) as at:
        yield at


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def ask(client: Any, model: str = "tiny", text: str = TEA, **more: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **({"temperature": 0, "max_tokens": 12} | more)
    )


# ---- answers


def test_a_chat_is_answered_as_the_model_answers_it(client: Any, world: World) -> None:
    found = ask(client, seed=3, temperature=1.0, top_p=0.9)
    (want,) = world.tiny.generate([Query(user(TEA), Sampling(12, 1.0, 0.9, 3))])
    (choice,) = found.choices
    assert choice.message.content == want.text and choice.message.role == "assistant" and choice.message.refusal is None
    assert choice.finish_reason == {"stop": "stop", "length": "length"}[want.finish]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (want.prompt_tokens, want.completion_tokens)
    assert found.usage.total_tokens == want.prompt_tokens + want.completion_tokens
    assert found.object == "chat.completion" and found.id.startswith("chatcmpl-") and found.model == "tiny"
    assert choice.logprobs is None and found.moderation is None and found.system_fingerprint and found._request_id.startswith("req_")


def test_a_stream_says_the_same(client: Any, world: World) -> None:
    whole = ask(client, seed=5, temperature=0.8, max_tokens=20)
    chunks = list(ask(client, seed=5, temperature=0.8, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1 and all(c.object == "chat.completion.chunk" for c in chunks)
    assert len([c for c in chunks[:-1] if c.choices[0].delta.content]) > 5


def test_without_asking_for_it_a_stream_has_no_usage(client: Any) -> None:
    assert all(c.choices and c.usage is None for c in ask(client, stream=True))


def test_logprobs_are_those_of_the_model(client: Any, world: World) -> None:
    found = ask(client, logprobs=True, top_logprobs=3).choices[0]
    (want,) = world.tiny.generate([Query(user(TEA), Sampling(12, top_logprobs=3))])
    drawn = [d for d in want.drawn if d[0]]
    assert [(t.token, pytest.approx(t.logprob)) for t in found.logprobs.content] == drawn
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob >= t.logprob for t in found.logprobs.content)
    assert all(("\ufffd" in t.token) == ("\ufffd" in bytes(t.bytes).decode(errors="replace")) for t in found.logprobs.content)
    assert bytes(b for t in found.logprobs.content for b in t.bytes).decode(errors="replace") == found.message.content
    streamed = [
        t for c in ask(client, logprobs=True, top_logprobs=3, stream=True) if c.choices[0].logprobs for t in c.choices[0].logprobs.content
    ]
    assert [t.token for t in streamed] == [t.token for t in found.logprobs.content]
    assert all(t.top_logprobs == [] for t in ask(client, logprobs=True).choices[0].logprobs.content)


def test_several_choices_differ_by_their_seeds(client: Any, world: World) -> None:
    found = ask(client, n=3, seed=7, temperature=1.2)
    want = [world.tiny.generate([Query(user(TEA), Sampling(12, 1.2, 1.0, 7 + i))])[0] for i in range(3)]
    assert [c.message.content for c in found.choices] == [w.text for w in want] and [0, 1, 2] == [c.index for c in found.choices]
    assert found.usage.completion_tokens == sum(w.completion_tokens for w in want)
    texts = {0: "", 1: "", 2: ""}
    for chunk in ask(client, n=3, seed=7, temperature=1.2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [w.text for w in want]


def test_a_stop_ends_the_answer_before_it_wherever_tokens_are_cut(client: Any, world: World) -> None:
    (want,) = world.tiny.generate([Query(user(TEA), Sampling(40))])
    stop = want.text[10:15]
    cut = want.text[: want.text.index(stop)]
    found = ask(client, max_tokens=40, stop=["never said \u2603", stop], logprobs=True).choices[0]
    assert found.message.content == cut and found.finish_reason == "stop"
    spoken = "".join(t.token for t in found.logprobs.content).replace("\ufffd", "")
    assert spoken and cut.replace("\ufffd", "").startswith(spoken)
    streamed = list(ask(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == cut and streamed[-1].choices[0].finish_reason == "stop"


def test_chats_of_every_role_and_form_are_read(client: Any, world: World) -> None:
    parts = [{"type": "text", "text": "How do I"}, {"type": "text", "text": " make green tea?"}]
    chat = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    from saddlepoint.types import Message

    asked = (Message("system", "Be brief."), Message("user", TEA))
    assert client.chat.completions.create(model="tiny", messages=chat, temperature=0, max_tokens=9).choices[0].message.content == (
        world.tiny.generate([Query(asked, Sampling(9))])[0].text
    )
    turn = [*chat, {"role": "assistant", "content": "Sure."}]
    begun = world.tiny.generate([Query((*asked, Message("assistant", "Sure."), Message("assistant", "")), Sampling(9))])[0]
    assert client.chat.completions.create(model="tiny", messages=turn, temperature=0, max_tokens=9).choices[0].message.content == begun.text
    gone_on = world.tiny.generate([Query((*asked, Message("assistant", "Sure.")), Sampling(9))])[0]
    more = {"extra_body": {"continue_final_message": True}, "temperature": 0, "max_tokens": 9}
    assert client.chat.completions.create(model="tiny", messages=turn, **more).choices[0].message.content == gone_on.text
    with pytest.raises(openai.BadRequestError, match="does not go on"):
        client.chat.completions.create(model="guarded", messages=turn, **more)


TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {"type": "object"}}}


def test_a_call_that_the_model_writes_comes_as_a_call(client: Any) -> None:
    found = ask(client, "caller", tools=[TOOL]).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    (call,) = found.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Oslo"} and call.id.startswith("call_")
    streamed = list(ask(client, "caller", tools=[TOOL], stream=True))
    assert streamed[-1].choices[0].finish_reason == "tool_calls" and not any(c.choices[0].delta.content for c in streamed)
    assert ["weather"] == [t.function.name for c in streamed for t in c.choices[0].delta.tool_calls or []]
    assert ask(client, "caller", tools=[TOOL], tool_choice="none").choices[0].message.content == "no tools"
    assert ask(client, tools=[TOOL]).choices[0].message.content  # a model that cannot, writes text
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert client.chat.completions.create(model="tiny", messages=turns, tools=[TOOL], max_tokens=4).choices[0].finish_reason


def test_models_are_listed_and_found_by_names_with_slashes(client: Any) -> None:
    assert ["tiny", "guarded", "watched", "lenient/watched", "caller", "down"] == [m.id for m in client.models.list()]
    found = client.models.retrieve("lenient/watched")
    assert (found.object, found.owned_by) == ("model", "saddlepoint") and found.created > 1_700_000_000
    with pytest.raises(openai.NotFoundError) as wrong:
        client.models.retrieve("gpt-9")
    assert wrong.value.code == "model_not_found"


def test_our_own_endpoint_target_attacks_it(url: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    target = OpenAI.at(f"{url}#tiny")
    queries = [Query(user(TEA, prefill="Sure"), Sampling(8, top_logprobs=2)), Query(user(FOX), Sampling(8, 0.7, 1.0, 4))]
    here = world.tiny.generate(queries)
    assert [a.text for a in target.generate(queries)] == [a.text for a in here]
    (blocked,) = OpenAI.at(f"{url}#guarded").generate([Query(user(world.odd), Sampling(8))])
    assert blocked.finish == "filter" and blocked.text == ""


# ---- guards


def test_a_blocked_request_is_refused_and_told_in_the_protocols_fields(client: Any, world: World) -> None:
    found = ask(client, "guarded", world.odd)
    (choice,) = found.choices
    assert choice.finish_reason == "content_filter" and choice.message.content is None and choice.message.refusal == REFUSED
    (result,) = found.moderation.input.results
    assert result.flagged and result.categories == {"perplexity_filter": True} and result.category_scores == {"perplexity_filter": 1.0}
    assert found.moderation.input.type == "moderation_results" and found.moderation.output.type == "error"
    assert found.usage.completion_tokens == 0
    passes = ask(client, "guarded", world.fine, moderation={"model": "any"})
    assert passes.choices[0].message.content == ask(client, "tiny", world.fine).choices[0].message.content
    assert not passes.moderation.input.results[0].flagged and ask(client, "guarded", world.fine).moderation is None


def test_a_blocked_answer_ends_in_the_middle_of_the_stream(client: Any, world: World) -> None:
    chunks = list(ask(client, "watched", world.fine, max_tokens=60, stream=True))
    released = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert world.answer.startswith(released) and 24 <= len(released) < len(world.answer) and world.word not in released
    assert [REFUSED] == [c.choices[0].delta.refusal for c in chunks if c.choices and c.choices[0].delta.refusal]
    assert ["content_filter"] == [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    (told,) = [c.moderation for c in chunks if c.moderation]
    assert told.output.results[0].flagged and told.output.results[0].categories == {"window_check": True}
    whole = ask(client, "watched", world.fine, max_tokens=60)
    assert whole.choices[0].message.content is None and whole.choices[0].finish_reason == "content_filter"


def test_a_mode_of_score_tells_and_withholds_nothing_where_the_operator_lets_it(client: Any, world: World) -> None:
    score = {"model": "any", "policy": {"input": {"mode": "score"}, "output": {"mode": "score"}}}
    found = ask(client, "lenient/watched", world.odd, moderation=score)
    assert found.choices[0].message.content and found.moderation.input.results[0].flagged
    spoken = ask(client, "lenient/watched", world.fine, max_tokens=60, moderation=score)
    assert spoken.choices[0].message.content == world.answer and spoken.moderation.output.results[0].flagged
    block = {"model": "any", "policy": {"input": {"mode": "block"}, "output": {"mode": "score"}}}
    assert ask(client, "lenient/watched", world.odd, moderation=block).choices[0].finish_reason == "content_filter"
    assert ask(client, "lenient/watched", world.odd).choices[0].finish_reason == "content_filter"
    assert ask(client, "guarded", world.odd, moderation=score).choices[0].finish_reason == "content_filter"  # the operator decides


def test_moderations_are_what_the_guards_say(client: Any, world: World) -> None:
    found = client.moderations.create(input=[world.odd, world.fine], model="guarded")
    assert [True, False] == [r.flagged for r in found.results] and found.id.startswith("modr-")
    assert found.results[0].categories.model_extra["perplexity_filter"] and not found.results[0].categories.violence
    with pytest.raises(openai.BadRequestError, match="no guard"):
        client.moderations.create(input="x", model="tiny")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.moderations.create(input=[])
    assert wrong.value.param == "input"


def test_blocks_are_logged_counted_and_go_back_into_the_loop(client: Any, url: str, world: World, tmp_path: Path) -> None:
    ask(client, "guarded", world.odd), ask(client, "guarded", world.odd), ask(client, "watched", world.fine, max_tokens=60)
    lines = [json.loads(line) for line in world.log.read_text().splitlines()]
    assert world.log.stat().st_mode & 0o77 == 0
    last = next(line for line in reversed(lines) if line["defense"] == "perplexity_filter")
    assert (
        last["key"] == "me"
        and last["direction"] == "input"
        and last["withheld"]
        and "nats" in last["reason"]
        and last["model"] == "guarded"
    )
    assert last["chat"] == [{"role": "user", "text": world.odd}] and re.fullmatch(r"req_\w{32}", last["request_id"])
    metrics = httpx.get(url.removesuffix("/v1") + "/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    assert float(re.search(r'saddlepoint_blocks_total\{defense="perplexity_filter",direction="input"\} (\S+)', metrics)[1]) >= 2  # type: ignore[index]
    for name in ("first_token_seconds_count", 'tokens_total{kind="completion"}', 'tokens_total{kind="prompt"}'):
        assert float(metrics.split(f"saddlepoint_{name} ")[1].split()[0]) > 0
    assert 'saddlepoint_requests_total{path="/v1/chat/completions",status="200"}' in metrics

    out = tmp_path / "blocks"
    told = export(world.log, out)
    findings, policy = Store.open(out).findings(), load(str(out / "policy.jsonl"))
    assert len(findings) == len(policy.select("harmful", "train")) == 2 == len({f.behavior for f in findings})
    unsafe = next(f for f in findings if f.verdict.unsafe)
    assert unsafe.completion.text and world.answer.startswith(unsafe.completion.text) and world.word in unsafe.completion.text
    assert not next(f for f in findings if not f.verdict.unsafe).completion.text
    assert "attack --policy" in "\n".join(told)

    last = ask(client, "watched", world.fine, max_tokens=60, n=2)._request_id
    assert sum(json.loads(line)["request_id"] == last for line in world.log.read_text().splitlines()) == 2  # each answer that was withheld


# ---- errors


def status(url: str, path: str, method: str = "POST", key: str = KEY, **more: Any) -> tuple[int, dict[str, Any], Any]:
    answer = httpx.request(method, url + path, headers={"authorization": f"Bearer {key}"} | more.pop("headers", {}), timeout=30, **more)
    error = answer.json().get("error") or {}
    assert answer.is_success or ({"message", "type", "param", "code"} == set(error) and error["message"])
    assert answer.headers["x-request-id"].startswith("req_")
    return answer.status_code, error, answer


GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**80}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools"),
        ({"logit_bias": {"tea": 5}}, "logit_bias"),
        ({"logit_bias": {"1": 500}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"function_call": "auto"}, "function_call"),
        ({"top_k": 5}, "top_k"),
        ({"\ud800": 5}, None),
        ({"moderation": {"model": "x", "policy": {"input": {"mode": "loud"}}}}, "moderation"),
    ],
)
def test_a_bad_request_is_400_and_says_which_field(url: str, change: dict[str, Any], param: str | None) -> None:
    code, error, _ = status(url, "/chat/completions", content=json.dumps(GOOD | change), headers={"content-type": "application/json"})
    assert code == 400 and error["type"] == "invalid_request_error"
    assert param is None or str(error["param"]).startswith(param)


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"model": ' + "9" * 5000 + "}", "\x00", b"\xff\xfe"])
def test_what_is_no_request_at_all_is_400(url: str, body: Any) -> None:
    assert status(url, "/chat/completions", content=body, headers={"content-type": "application/json"})[0] == 400


def test_other_errors_have_the_protocols_status_and_shape(url: str, client: Any) -> None:
    assert status(url, "/chat/completions", json=GOOD | {"model": "gpt-9"})[:2][1]["code"] == "model_not_found"
    assert status(url, "/nothing", "GET")[0] == 404 and status(url, "/models", "PUT")[0] == 405
    code, error, _ = status(url, "/chat/completions", json=GOOD | {"model": "down"})
    assert (code, error["type"]) == (502, "server_error") and "connection failed" in error["message"]
    assert status(url, "/chat/completions", json=GOOD | {"model": "down", "stream": True})[0] == 502
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, text="tea " * 2000)
    assert wrong.value.code == "context_length_exceeded"
    assert status(url, "/chat/completions", json=GOOD | {"logit_bias": {}, "user": "u", "presence_penalty": 0, "stop": None})[0] == 200


def test_keys(url: str, tmp_path: Path) -> None:
    assert httpx.get(url.removesuffix("/v1") + "/health").json() == {"status": "ok"}
    assert httpx.get(url + "/models").status_code == 401
    for key in ("wrong", KEY[:-1], KEY + "x", "none", "ключ".encode()):
        code, error, _ = status(
            url, "/models", "GET", headers={"authorization": b"Bearer " + (key if isinstance(key, bytes) else key.encode())}
        )
        assert (code, error["code"]) == (401, "invalid_api_key")
    assert status(url, "/models", "GET", key=OTHER)[0] == 200
    file = tmp_path / "keys"
    file.write_text(f"# ours\nme: {KEY}\n\nother:{OTHER}\n")
    keys = Keys.read(file)
    assert ("me", "other", None) == tuple(keys.who(f"Bearer {key}") for key in (KEY, OTHER, "none"))
    assert keys.who(f"Basic {KEY}") is None and KEY not in repr(keys)
    for bad in ("", "me", "me:short", f"me:{KEY}\nme:{KEY}", f"me:{'é' * 20}"):
        file.write_text(bad)
        with pytest.raises(UsageError, match="NAME:KEY"):
            Keys.read(file)


# ---- limits


@pytest.fixture(scope="module")
def strict() -> Iterator[str]:
    service = Service.of([Served("echo", Scripted(lambda q: q.chat[-1].text))])
    limits: dict[str, Any] = {"max_body": 2000, "upload_seconds": 0.4, "rate": 30}
    with running(service, keys=Keys.of({str(i): f"{i}-{KEY}" for i in range(5)}), **limits) as at:
        yield at


def raw(url: str, sent: bytes, pause: float = 0.0, chunks: int = 1) -> bytes:
    """What comes back on a connection of its own."""
    host, port = re.findall(r"//([^:]+):(\d+)", url)[0]
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        step = max(1, len(sent) // chunks)
        with suppress(BrokenPipeError, ConnectionResetError):
            for at in range(0, len(sent), step):
                sock.sendall(sent[at : at + step])
                time.sleep(pause)
        found = b""
        with suppress(ConnectionResetError):
            while part := sock.recv(65536):
                found += part
    return found


def head(extra: str, key: int = 1) -> bytes:
    return f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}-{KEY}\r\ncontent-type: application/json\r\n{extra}\r\n\r\n".encode()


def test_a_body_that_is_too_large_is_cut_off(strict: str) -> None:
    code, error, answer = status(strict, "/chat/completions", key=f"1-{KEY}", json={"x": "y" * 3000})
    assert (code, error["code"]) == (413, "request_too_large") and answer.headers["connection"] == "close"
    # One that does not say how long it is, and one that lies.
    chunk = b"400\r\n" + b"y" * 1024 + b"\r\n"
    assert b"413 " in raw(strict, head("transfer-encoding: chunked") + chunk * 50).split(b"\r\n")[0]
    assert re.match(rb"HTTP/1.1 4(00|13) ", raw(strict, head("content-length: 99999999999999999999") + b"{}"))


def test_a_slow_upload_is_cut_off_and_others_are_served_meanwhile(strict: str) -> None:
    found: list[bytes] = []
    began = time.monotonic()
    slow = threading.Thread(target=lambda: found.append(raw(strict, head("content-length: 1000") + b"{" * 900, 0.1, 60)))
    slow.start()
    with openai.OpenAI(base_url=strict, api_key=f"2-{KEY}", max_retries=0) as client:
        assert ask(client, "echo", "tea").choices[0].message.content == "tea"
    assert time.monotonic() - began < 5
    slow.join(30)
    assert found[0].startswith(b"HTTP/1.1 408") and b'"request_timeout"' in found[0]


def test_a_head_that_does_not_come_is_not_waited_for(strict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from saddlepoint.service import server as module

    monkeypatch.setattr(module, "HEAD_SECONDS", 0.3)
    began = time.monotonic()
    assert raw(strict, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-a: ", 0.05, 4) == b""
    assert raw(strict, b"") == b"" and time.monotonic() - began < 10


def test_who_asks_too_often_is_told_when_to_come_again(strict: str) -> None:
    passed = 0
    with httpx.Client(headers={"authorization": f"Bearer 3-{KEY}"}) as asking:
        while (answer := asking.get(strict + "/models")).status_code == 200 and passed < 300:
            passed += 1
    assert passed >= 30 and answer.status_code == 429  # some come back while it asks
    assert answer.json()["error"]["code"] == "rate_limit_exceeded" and int(answer.headers["retry-after"]) >= 1
    assert status(strict, "/models", "GET", key=f"4-{KEY}")[0] == 200


def test_without_keys_only_this_machines_own_names_are_answered() -> None:
    with running(Service.of([Served("echo", Scripted(lambda q: "x"))])) as at:
        assert httpx.get(at + "/models").status_code == 200
        foreign = httpx.get(at + "/models", headers={"host": "evil.example:80"})
        assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "forbidden_host"
        for origin, code in (("http://localhost:3000", 200), ("https://evil.example", 403), ("null", 403)):  # as a page's browser tells it
            assert httpx.get(at + "/models", headers={"origin": origin}).status_code == code


def test_what_is_no_http_and_what_fails_within_are_told_with_four_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service.of([Served("echo", Scripted(lambda q: "x"))])
    with running(service) as at:
        told = raw(at, b"GARBAGE\r\n\r\n").partition(b"\r\n\r\n")
        assert told[0].startswith(b"HTTP/1.1 400 ") and json.loads(told[2])["error"].keys() == {"message", "type", "param", "code"}
        monkeypatch.setattr(service, "models", None)
        broken = httpx.post(at + "/moderations", json={"input": "x"})
        assert broken.status_code == 500 and broken.json()["error"].keys() == {"message", "type", "param", "code"}
        assert broken.json()["error"]["code"] == "internal_error" and broken.headers["x-request-id"]


def test_a_port_that_is_taken_is_told() -> None:
    with listening("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="cannot listen"):
        listening("127.0.0.1", taken.getsockname()[1])


# ---- many at once


def test_eight_streams_at_once_are_all_alive(client: Any, world: World) -> None:
    firsts: list[float] = []
    lasts: list[float] = []
    texts: dict[int, str] = {}
    barrier = threading.Barrier(8)

    def one(i: int) -> None:
        barrier.wait()
        chunks = ask(
            client, text=f"{TEA} {i}", max_tokens=80, seed=10 + i, temperature=1.0, stream=True
        )  # with these no two tokens nearly tie
        said = []
        for chunk in chunks:
            if chunk.choices[0].delta.content:
                said.append(chunk.choices[0].delta.content)
                firsts.append(time.monotonic()) if len(said) == 1 else None
        lasts.append(time.monotonic())
        texts[i] = "".join(said)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    beside = client.models.list()
    [t.join(60) for t in threads]
    assert beside.data and len(firsts) == 8
    alone = {i: world.tiny.generate([Query(user(f"{TEA} {i}"), Sampling(80, 1.0, 1.0, 10 + i))])[0] for i in range(8)}
    assert texts == {i: answer.text for i, answer in alone.items()}
    long = [answer for answer in alone.values() if answer.completion_tokens > 40]
    assert not long or max(firsts) < max(lasts)  # the last to begin began before the longest ended


def test_a_client_that_goes_away_stops_the_work(client: Any, world: World, url: str) -> None:
    def busy() -> int:
        return sum(not row.ended for batch in world.tiny._decoding._batches for row in batch.rows)

    def settles() -> bool:
        end = time.monotonic() + 20
        while (busy() or world.service.chats) and time.monotonic() < end:
            time.sleep(0.02)
        return not busy() and not world.service.chats

    assert settles()
    world.tiny.model.generation_config.eos_token_id = None
    ends = world.tiny.__dict__.pop("ends")
    decoding = world.tiny._decoding
    before, decoding.ends = decoding.ends, frozenset()
    world.tiny.__dict__["ends"] = frozenset()  # it would go on to the end of its context
    try:
        stream = ask(client, max_tokens=450, stream=True)
        next(iter(stream)), stream.close()
        assert settles()
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3), max_tokens=450)
        assert settles()
    finally:
        decoding.ends = before
        world.tiny.__dict__["ends"] = ends
        world.tiny.model.generation_config.eos_token_id = min(ends)


# ---- the command line


def test_the_command_serves_survives_a_kill_and_its_log_goes_back_into_the_loop(tiny_folder: Path, tmp_path: Path, world: World) -> None:
    log, keys = tmp_path / "blocks.jsonl", tmp_path / "keys"
    keys.write_text(f"me:{KEY}\n")
    scores = PerplexityFilter(world.tiny, world.tiny, threshold=0.0).scores([world.fine, world.odd])
    defense = f"perplexity_filter(scorer={str(tiny_folder)!r}, threshold={sum(scores) / 2})"
    command = [sys.executable, "-m", "saddlepoint", "serve", "--target", str(tiny_folder), "--defense", defense, "--model", "tiny"]
    command += ["--target", str(tiny_folder), "--defense", "", "--model", "open"]  # the same once more, under another name and no guard
    command += ["--port", "0", "--log", str(log), "--key-file", str(keys), "--state", str(tmp_path / "state")]
    done = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert done.stdout
        said = ""
        while " serves " not in said:
            said = done.stdout.readline()
            assert said, done.wait(5)
        found = re.match(r"(http://127\.0\.0\.1:\d+/v1) serves 'tiny' behind: perplexity_filter", said)
        assert found, said
        assert done.stdout.readline().endswith(" serves 'open' behind: no defense\n")
        with openai.OpenAI(base_url=found[1], api_key=KEY, max_retries=0) as client:
            assert ask(client, text=world.fine).choices[0].message.content
            assert ask(client, text=world.odd).choices[0].finish_reason == "content_filter"
            assert ask(client, "open", world.odd).choices[0].finish_reason != "content_filter"
            stream = iter(ask(client, text=world.fine, max_tokens=300, stream=True, temperature=1.0, seed=1))
            next(stream)
            done.send_signal(signal.SIGKILL)
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(stream)
                raise httpx.ReadError("it had all been sent")
    finally:
        done.kill()
        done.communicate()
    assert len(log.read_text().splitlines()) == 1
    told = subprocess.run(
        [sys.executable, "-m", "saddlepoint", "blocks", "export", str(log), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 blocked requests" in told.stdout


# ---- in front of another server


def test_a_stream_through_an_endpoint_stays_a_stream(url: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    behind = OpenAI.at(f"{url}#tiny")
    guarded = PerplexityFilter(behind, world.tiny, threshold=1e9)
    with running(Service.of([Served("front", guarded)])) as front, openai.OpenAI(base_url=front, api_key="none", max_retries=0) as client:
        whole = ask(client, "front", world.fine, max_tokens=40, logprobs=True, top_logprobs=2)
        chunks = list(ask(client, "front", world.fine, max_tokens=40, stream=True))
        texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        assert len(texts) > 10 and "".join(texts) == whole.choices[0].message.content
        direct = behind.generate([Query(user(world.fine), Sampling(40))])[0]
        assert direct.text == "".join(texts)
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens or whole.choices[0].finish_reason == "stop"
        before = world.service.chats
        with ask(client, "front", world.fine, max_tokens=400, stream=True) as broken_off:
            next(iter(broken_off))
        deadline = time.monotonic() + 10
        while world.service.chats > before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert world.service.chats == before, "who goes away behind the front is no longer answered"
