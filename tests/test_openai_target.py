import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import Any

import pytest
from endpoint import Answer, Endpoint, cuts, fails, hangs, says, sends
from hypothesis import given, settings
from hypothesis import strategies as st

from saddlepoint.defenses._stream import joined
from saddlepoint.errors import TargetError, UsageError
from saddlepoint.targets import open_target, openai
from saddlepoint.targets.openai import OpenAI, _asked_wait
from saddlepoint.types import Completion, Message, Query, Sampling, user

HI = Query(user("hi"))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_CUSTOM_HEADERS", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def quick(endpoint: Endpoint, **settings: Any) -> OpenAI:
    """A target whose waits are too short to notice."""
    return OpenAI(endpoint.url, "m", **({"backoff": 0.002, "timeout": 5.0, "retries": 2} | settings))


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[Endpoint, OpenAI]]:
    """One endpoint and one target for the tests that only change the script; a client takes long to build."""
    with Endpoint() as endpoint:
        yield endpoint, quick(endpoint)


def echo(asked: dict[str, Any]) -> Answer:
    return says(asked["messages"][-1]["content"])


def waits_of(target: OpenAI, query: Query, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between the tries of a query that fails, without waiting."""
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(openai, "sleep", note)
    assert "error" == target.generate([query])[0].finish
    return waited


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# ---- what is sent, what comes back


def test_one_answer_with_its_counts():
    with Endpoint(says("hello", usage=(11, 5))) as endpoint:
        target = open_target(endpoint.name)

        assert [Completion("hello", 11, 5)] == target.generate([HI])
        assert endpoint.name == target.name
        assert [] == target.generate([])
    (asked,) = endpoint.asked
    assert {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64} == {
        key: asked[key] for key in ("model", "messages", "max_tokens")
    }
    assert not {"logprobs", "top_logprobs", "continue_final_message", "add_generation_prompt", "stream"} & asked.keys()


def test_roles_system_prompts_and_any_text_go_through_unchanged():
    texts = ["be {kind}", "שלום \u202e\x00 \N{PILE OF POO}", "", "a" * 10_000, "tool says"]
    roles = ["system", "user", "assistant", "user", "tool"]
    chat = tuple(Message(role, text) for role, text in zip(roles, texts, strict=True))  # type: ignore[arg-type]
    with Endpoint(echo) as endpoint:
        assert "tool says" == quick(endpoint).generate([Query(chat)])[0].text
    assert [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)] == endpoint.asked[0]["messages"]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 10**6), st.floats(0, 2), st.floats(0.01, 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 20), st.text(), st.text()
)
def test_the_request_says_what_the_query_says(max_tokens, temperature, top_p, seed, alternatives, text, prefill):
    draw = Sampling(max_tokens, temperature, top_p, seed, alternatives)
    request = SILENT._request(Query(user(text, prefill=prefill), draw))

    assert (max_tokens, temperature, top_p, seed) == tuple(request[key] for key in ("max_tokens", "temperature", "top_p", "seed"))
    assert alternatives == request.get("top_logprobs", 0)
    assert (alternatives > 0) == request.get("logprobs", False)
    assert bool(prefill) == ("continue_final_message" in request)


SILENT = OpenAI("http://127.0.0.1:9/v1", "m")


def test_sampling_and_seeds_reach_the_server():
    with Endpoint() as endpoint:
        quick(endpoint).generate([Query(user("a"), Sampling(5, 0.75, 0.5, seed)) for seed in (3, 4, 2**40)])
    assert {3, 4, 2**40} == {asked["seed"] for asked in endpoint.asked}
    assert {(5, 0.75, 0.5)} == {(asked["max_tokens"], asked["temperature"], asked["top_p"]) for asked in endpoint.asked}


def test_a_prefill_is_the_last_message_and_is_to_be_continued():
    with Endpoint(says(" 1. Take")) as endpoint:
        (answer,) = quick(endpoint).generate([Query(user("how", "sys", prefill="Sure:"))])
    (asked,) = endpoint.asked
    assert " 1. Take" == answer.text  # without the prefill
    assert {"role": "assistant", "content": "Sure:"} == asked["messages"][-1]
    assert asked["continue_final_message"] is True
    assert asked["add_generation_prompt"] is False


def test_top_logprobs():
    tops = [[("a", -0.25), ("b", -1.5)], [("<e>", -0.125), ("é", float("-inf"))]]
    content = [
        {"token": top[0][0], "logprob": top[0][1], "bytes": None, "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}
        for top in tops
    ]
    with Endpoint(says("a", logprobs={"content": content}), says("a", logprobs={"content": None}), says("a")) as endpoint:
        target = quick(endpoint)
        full, empty, absent = (target.generate([Query(user("x"), Sampling(top_logprobs=2))])[0] for _ in range(3))
    assert tuple(map(tuple, tops)) == full.top_logprobs
    assert () == empty.top_logprobs == absent.top_logprobs
    assert (True, 2) == (endpoint.asked[0]["logprobs"], endpoint.asked[0]["top_logprobs"])


@pytest.mark.parametrize(
    ("reason", "finish"), [("stop", "stop"), ("length", "length"), ("content_filter", "filter"), (None, "stop"), ("tool_calls", "stop")]
)
def test_finish(reason, finish, stage):
    endpoint, target = stage
    endpoint.play(says("text", finish=reason))

    assert Completion("text", 7, 3, finish) == target.generate([HI])[0]


def test_a_filtered_answer_or_prompt_is_no_error():
    with Endpoint(says(None, finish="content_filter"), fails(400, "filtered", code="content_filter")) as endpoint:
        target = quick(endpoint)

        assert Completion("", 7, 3, "filter") == target.generate([HI])[0]
        assert Completion("", finish="filter") == target.generate([HI])[0]


@pytest.mark.parametrize("usage", [None, (None, None), {}, {"prompt_tokens": 0}])
def test_counts_are_whole_numbers_even_where_the_server_sends_none(usage, stage):
    endpoint, target = stage
    endpoint.play(says("x", usage=usage))
    (answer,) = target.generate([HI])

    assert (int, 0, int, 0) == (type(answer.prompt_tokens), answer.prompt_tokens, type(answer.completion_tokens), answer.completion_tokens)


def test_the_key_comes_from_the_environment_and_shows_nowhere(monkeypatch):
    with Endpoint() as endpoint:
        quick(endpoint).generate([HI])
        monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\n")
        target = quick(endpoint)
        target.generate([HI])
        assert "sk-secret" not in repr(target) + target.name
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret sk-other")
        with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
            quick(endpoint)
    assert "sk-secret" not in str(caught.value)
    assert ["Bearer none", "Bearer sk-secret"] == [headers["authorization"] for headers in endpoint.headers]


# ---- many at once


def test_order_is_kept_and_concurrency_is_used_but_bounded():
    together = threading.Barrier(4, timeout=9)  # no request is answered before four are open

    def backwards(asked: dict[str, Any]) -> Answer:
        text = asked["messages"][-1]["content"]
        together.wait()
        return says(text, seconds=0.02 if int(text) % 4 == 0 else 0.0)

    with Endpoint(backwards) as endpoint:
        answers = quick(endpoint, concurrency=4, timeout=20.0).generate([Query(user(str(number))) for number in range(40)])
    assert list(map(str, range(40))) == [answer.text for answer in answers]
    assert 4 == endpoint.most_at_once


def test_concurrency_is_shared_by_threads():
    together = threading.Barrier(3, timeout=9)

    def crowd(asked: dict[str, Any]) -> Answer:
        together.wait()
        return echo(asked)

    with Endpoint(crowd) as endpoint:
        target = quick(endpoint, concurrency=3, timeout=20.0)
        with ThreadPoolExecutor(6) as pool:
            batches = list(pool.map(lambda start: target.generate([Query(user(str(start + i))) for i in range(5)]), range(0, 30, 5)))
    assert list(map(str, range(30))) == [answer.text for batch in batches for answer in batch]
    assert 3 == endpoint.most_at_once


def test_one_failed_query_leaves_the_others_alone():
    with Endpoint(lambda asked: fails(400, "too long") if asked["messages"][-1]["content"] == "3" else echo(asked)) as endpoint:
        answers = quick(endpoint).generate([Query(user(str(number))) for number in range(6)])
    assert ["0", "1", "2", "", "4", "5"] == [answer.text for answer in answers]
    assert ["3"] == [str(i) for i, answer in enumerate(answers) if answer.finish == "error"]


# ---- trying again


@pytest.mark.parametrize(
    "trouble", [*map(fails, (408, 409, 429, 500, 502, 503, 529)), cuts(), sends(b"<html>bad gateway</html>", 502, content_type="text/html")]
)
def test_passing_trouble_is_tried_again(trouble, stage):
    endpoint, target = stage
    endpoint.play(trouble, trouble, says("there"))

    assert Completion("there", 7, 3) == target.generate([HI])[0]
    assert 3 == len(endpoint.asked)
    assert endpoint.asked[0] == endpoint.asked[1] == endpoint.asked[2]


@pytest.mark.parametrize("status", [400, 402, 405, 413, 415, 422])
def test_lasting_trouble_is_not(status, stage):
    endpoint, target = stage
    endpoint.play(fails(status, "this\nis wrong", retry_after="0"))
    (answer,) = target.generate([HI])

    assert 1 == len(endpoint.asked)
    assert Completion("", finish="error", error=answer.error) == answer
    assert f"HTTP {status}: this is wrong; change what the message names (tries: 1)" in answer.error


def test_a_silent_server_is_tried_again_after_the_timeout():
    with Endpoint(hangs(), says("there")) as endpoint:
        assert "there" == quick(endpoint, timeout=0.2, retries=9).generate([HI])[0].text
    assert 0.1 < endpoint.waits()[0] < 9


def test_retries_are_counted_and_zero_is_allowed():
    for retries in (0, 3):
        with Endpoint(fails(500)) as endpoint:
            (answer,) = quick(endpoint, retries=retries).generate([HI])
        assert retries + 1 == len(endpoint.asked)
        assert f"(tries: {retries + 1})" in answer.error


def test_waits_double_with_a_jitter_that_a_second_run_repeats(monkeypatch):
    with Endpoint(fails(503)) as endpoint:
        target = quick(endpoint, backoff=8, retries=4)
        once, again, other = (waits_of(target, query, monkeypatch) for query in (HI, HI, Query(user("another"))))
    assert [True] * 4 == [8 * 2**attempt / 2 <= wait <= min(8 * 2**attempt, 60) for attempt, wait in enumerate(once)]
    assert once == again != other


def test_the_backoff_is_really_waited():
    with Endpoint(fails(500)) as endpoint:
        quick(endpoint, backoff=0.1).generate([HI])
    assert all(0.04 * 2**attempt < wait for attempt, wait in enumerate(endpoint.waits()))


@pytest.mark.parametrize(
    ("headers", "least"),
    [({"retry_after": "0.3"}, 0.3), ({"retry_after_ms": "250"}, 0.25), ({"retry_after_ms": "200", "retry_after": "9"}, 0.2)],
)
def test_the_server_says_how_long_to_wait(headers, least):
    with Endpoint(fails(429, **headers), says("there")) as endpoint:
        assert "there" == quick(endpoint).generate([HI])[0].text
    assert 0.8 * least < endpoint.waits()[0] < 5


def test_the_server_says_when_to_come_back():
    def busy_at_first(_: dict[str, Any]) -> Answer:
        then = formatdate(time.time() + 2, usegmt=True)  # whole seconds, so 1 to 2 from now
        return says("there") if len(endpoint.asked) > 1 else fails(503, retry_after=then)

    with Endpoint(busy_at_first) as endpoint:
        assert "there" == quick(endpoint).generate([HI])[0].text
    assert 0.8 < endpoint.waits()[0] < 9


def test_retry_after_zero_beats_a_long_backoff():
    with Endpoint(fails(429, retry_after="0"), says("there")) as endpoint:
        assert "there" == quick(endpoint, backoff=50).generate([HI])[0].text
    assert endpoint.waits()[0] < 9


@pytest.mark.parametrize("asked", ["", "soon", "-5", "nan", "Wed, 99 Foo 2015 07:28:00 GMT", "Wed, 01 Jan 99999999 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing_leaves_the_backoff(asked):
    assert 7.5 == _asked_wait({"retry-after": asked, "retry-after-ms": "x"}, 7.5)


def test_a_date_gone_by_is_no_wait():
    assert 0 == _asked_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 7.5)


@pytest.mark.parametrize(
    ("options", "headers"), [({"backoff": 1e9}, {}), ({}, {"retry_after": "3600"}), ({}, {"retry_after_ms": "9" * 400})]
)
def test_no_wait_is_longer_than_a_minute(options, headers, monkeypatch):
    with Endpoint(fails(429, **headers)) as endpoint:
        assert [60.0, 60.0] == waits_of(quick(endpoint, **options), HI, monkeypatch)


# ---- what went wrong


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (fails(500, "cuda\nout of memory"), "HTTP 500: cuda out of memory; lower concurrency or see its log (tries: 3)"),
        (fails(429, "slow down"), "HTTP 429: slow down; lower concurrency"),
        (sends(b"<html>\n<b>502</b>", 502, content_type="text/html"), "HTTP 502: <html> <b>502</b>;"),
        (sends(b"", 503), "HTTP 503: no reason given;"),
        (sends({"message": "plain"}, 400), "HTTP 400: plain;"),
        (sends({"detail": [{"loc": ["body", "top_p"]}]}, 422), "HTTP 422: {'detail': [{'loc': ['body', 'top_p']}]};"),
        (sends([1], 400), "HTTP 400: [1];"),
        (fails(400, "x" * 9999), "HTTP 400: " + "x" * 200 + ";"),
        (cuts(), "connection failed, Server disconnected; check that the server still runs (tries: 3)"),
        (sends(b"\x00\xff{garbage"), "HTTP 200 without a usable answer, "),
        (sends(b"not json"), "HTTP 200 without a usable answer, Expecting value"),
        (sends(b""), "HTTP 200 without a usable answer, Expecting value"),
        (sends(b"", content_type="text/plain"), "HTTP 200 without a usable answer, Expecting value"),
        (sends(b"<html>login</html>", content_type="text/html"), "char 0) in b'<html>login</html>'"),
        (sends(b"[" * 100_000), "HTTP 200 without a usable answer, "),
        (sends(b"null"), "no choices in 'None'"),
        (sends(b"3"), "no choices in '3'"),
        (sends([]), "no choices in '[]'"),
        (sends({}), "HTTP 200 without a usable answer, no choices in"),
        (sends({"choices": None}), "no choices in"),
        (sends({"choices": []}), "no choices in"),
        (sends({"choices": "abc"}), "HTTP 200 without a usable answer, "),
        (sends({"choices": {"a": 1}}), "HTTP 200 without a usable answer, "),
        (sends({"choices": [None]}), "HTTP 200 without a usable answer, "),
        (sends({"choices": [{}]}), "HTTP 200 without a usable answer, "),
        (sends({"choices": [{"message": None}]}), "HTTP 200 without a usable answer, "),
        (sends({"choices": [{"message": {}}]}), "content None, finish_reason None"),
        (sends({"choices": [{"message": {"content": "x"}, "finish_reason": ["stop"]}]}), "HTTP 200 without a usable answer, "),
        (says(None), "content None, finish_reason 'stop'"),
        (says(None, finish="length", reasoning_content="hm"), "finish_reason 'length' (if the model thinks first, raise max_tokens)"),
        (says(5), "content 5,"),  # type: ignore[arg-type]
        (says(["x" * 999]), "content ['xxx"),  # type: ignore[arg-type]
        (says("x", usage=(float("nan"), 1)), "HTTP 200 without a usable answer, "),
        (says("x", logprobs={"content": [{"token": "a"}]}), "HTTP 200 without a usable answer, "),
        (says("x", logprobs={"content": [{"top_logprobs": [{"token": "a", "logprob": None}]}]}), "HTTP 200 without a usable answer, "),
    ],
)
def test_a_failed_query_says_what_failed_on_one_line_and_is_never_an_exception(script, words, stage):
    endpoint, target = stage
    endpoint.play(script)
    (answer,) = target.generate([HI])

    assert Completion("", finish="error", error=answer.error) == answer
    assert answer.error.startswith(f"{endpoint.name}: ")
    assert words in answer.error
    assert "\n" not in answer.error
    assert len(answer.error) < 500


def test_a_silent_server_is_an_error():
    with Endpoint(hangs()) as endpoint:
        (answer,) = quick(endpoint, timeout=0.1).generate([HI])
    assert f"{endpoint.name}: timeout, nothing came for 0.1 s; raise timeout or lower concurrency (tries: 3)" == answer.error


def test_an_answer_that_is_no_json_is_not_asked_for_again():
    with Endpoint(sends(b"garbage")) as endpoint:
        quick(endpoint).generate([HI])
    assert 1 == len(endpoint.asked)


def test_an_answer_that_ends_too_early_is_tried_again():
    broken = Answer(200, b'{"choices": [', {"content-type": "application/json", "transfer-encoding": "chunked"})
    with Endpoint(broken, says("there")) as endpoint:
        assert "there" == quick(endpoint, timeout=0.2, retries=9).generate([HI])[0].text


def test_a_redirect_that_leads_nowhere_is_an_error():
    with Endpoint(sends(b"", 307, location="/v1/chat/completions")) as endpoint:
        assert "connection failed, redirected 10 times;" in quick(endpoint, retries=0).generate([HI])[0].error


def test_a_lone_surrogate_cannot_be_sent_and_never_comes_back():
    with Endpoint(sends(b'{"choices": [{"message": {"content": "a\\ud83d"}, "finish_reason": "stop"}]}')) as endpoint:
        unsent, answered = quick(endpoint).generate([Query(user("half \ud83d")), HI])
    assert "lone surrogate" in unsent.error
    assert 1 == len(endpoint.asked)
    assert Completion("a?") == answered


def test_a_server_that_went_away_gives_error_completions():
    target = OpenAI(f"http://127.0.0.1:{free_port()}/v1", "m", retries=1, backoff=0.001)
    answers = target.generate([HI] * 3)

    assert ["error"] * 3 == [answer.finish for answer in answers]
    assert "Connection refused; check that the server still runs (tries: 2)" in answers[0].error


@pytest.mark.parametrize(
    ("status", "words"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "write http://HOST:PORT/v1#MODEL with a model of")]
)
def test_where_every_query_would_fail_the_target_fails(status, words):
    with Endpoint(fails(status, "you may not"), echo) as endpoint:
        with pytest.raises(TargetError, match=words) as caught:
            quick(endpoint, concurrency=1).generate([HI])
        assert f"{endpoint.name}: HTTP {status}: you may not; " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert 1 == len(endpoint.asked)


def test_a_refused_key_stops_the_rest():
    def refuse_one(asked: dict[str, Any]) -> Answer:
        number = asked["messages"][-1]["content"]
        if number in "01" and not together.broken:
            together.wait()
        return fails(401) if number == "0" else fails(429, retry_after="0.3")

    together = threading.Barrier(2, timeout=9)
    with Endpoint(refuse_one) as endpoint:
        with pytest.raises(TargetError):
            quick(endpoint, concurrency=2, timeout=20.0).generate([Query(user(str(number))) for number in range(500)])
        time.sleep(0.5)
        asked = [request["messages"][-1]["content"] for request in endpoint.asked]
    assert {"0", "1"} <= set(asked)
    assert 1 == asked.count("1")  # it was to be tried again after 0.3 s
    assert len(asked) < 10


# ---- fields that a server does not take


@pytest.mark.parametrize("status", [400, 422])
def test_fields_that_the_server_refuses_are_replaced_once_and_remembered(status):
    def picky(asked: dict[str, Any]) -> Answer:
        if "max_tokens" in asked:
            return fails(status, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "seed" in asked:
            return sends({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}, status)
        return says(str(asked["max_completion_tokens"]))

    with Endpoint(picky) as endpoint:
        target = quick(endpoint)

        assert "9" == target.generate([Query(user("a"), Sampling(max_tokens=9))])[0].text
        assert 3 == len(endpoint.asked)
        assert "8" == target.generate([Query(user("a"), Sampling(max_tokens=8))])[0].text
        assert 4 == len(endpoint.asked)
    assert [{"max_tokens", "seed"}, {"seed"}, set(), set()] == [{"max_tokens", "seed"} & asked.keys() for asked in endpoint.asked]


def test_a_refusal_that_the_substitute_does_not_cure_is_an_error_and_not_remembered():
    with Endpoint(fails(400, "max_tokens is too large for 'seed'")) as endpoint:
        target = quick(endpoint)
        errors = [target.generate([HI])[0].error for _ in range(2)]
    assert 4 == len(endpoint.asked)
    assert all("HTTP 400: max_tokens is too large" in error for error in errors)
    assert "max_tokens" in endpoint.asked[2]


# ---- opening


def test_without_a_model_the_only_one_is_taken():
    with Endpoint(models=("org/tiny:1b",)) as endpoint:
        target = OpenAI.at(f"{endpoint.url}/", concurrency=2)

        assert f"{endpoint.url}#org/tiny:1b" == target.name
        assert 2 == target.concurrency
        target.generate([HI])
    assert "org/tiny:1b" == endpoint.asked[0]["model"]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ((), "lists: none"),
        (("a", "b"), "lists: a, b"),
        (fails(404), "lists: none"),
        (fails(500), "lists: none"),
        (sends(b"<html>", content_type="text/html"), "lists: none"),
        (sends(b"junk"), "lists: none"),
        (sends({"data": None}), "lists: none"),
        (sends({"data": [None]}), "lists: none"),
    ],
)
def test_without_a_model_and_without_exactly_one_the_error_says_the_form(models, words):
    with Endpoint(models=models) as endpoint, pytest.raises(UsageError, match="write http://HOST:PORT/v1#MODEL") as caught:
        OpenAI.at(f"{endpoint.url}#")
    assert words in str(caught.value)


@pytest.mark.parametrize("models", [fails(401), fails(404), fails(500), sends(b"junk"), ("other",)])
def test_with_a_model_the_list_does_not_matter(models):
    with Endpoint(models=models) as endpoint:
        assert "m" == OpenAI.at(endpoint.name).model


@pytest.mark.parametrize("status", [401, 403])
def test_a_list_that_wants_a_key_says_so(status):
    with Endpoint(models=fails(status)) as endpoint, pytest.raises(TargetError, match="OPENAI_API_KEY"):
        OpenAI.at(endpoint.url)


@pytest.mark.parametrize("model", ["", "#m"])
def test_an_endpoint_that_cannot_be_reached(model):
    with pytest.raises(TargetError, match="nothing answers at .*Connection refused; start the server") as caught:
        OpenAI.at(f"http://127.0.0.1:{free_port()}/v1{model}")
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_is_silent():
    with Endpoint(models=hangs()) as endpoint, pytest.raises(TargetError, match="nothing answers at .*timed out"):
        OpenAI.at(endpoint.name, timeout=0.1)


@pytest.mark.parametrize("name", ["http://", "https://#m", "http://:x@h/v1#m", "http://h:port/v1#m", "http://h/v1?v=1#m", "http://h/a b#m", "ftp://h/v1#m", "http://1.2.3.999/v1#m"])  # fmt: skip
def test_a_name_of_another_form(name):
    with pytest.raises(UsageError, match="write http://HOST:PORT/v1#MODEL"):
        OpenAI.at(name)


def test_a_password_in_a_name_is_not_repeated():
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
        OpenAI.at("http://me:hunter2@h/v1#m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"backoff": -1.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(UsageError, match="must be"):
        OpenAI("http://h/v1", "m", **settings)


# ---- answers in pieces


def events(*chunks: Any, done: bool = True) -> Answer:
    """A stream of server-sent events."""
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"] * done
    return Answer(200, b": a comment\n\n" + "".join(lines).encode(), {"content-type": "text/event-stream"})


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "delta": {"content": text} if text is not None else {}, "finish_reason": finish, **more}],
        "usage": None,
    }


COST: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


def test_a_streamed_answer_comes_in_the_pieces_that_the_endpoint_sends(stage):
    endpoint, target = stage
    spread = {"content": [{"token": "lo", "logprob": -0.5, "top_logprobs": [{"token": "lo", "logprob": -0.5}]}]}
    endpoint.play(events(chunk(""), chunk("Hel"), chunk("lo", logprobs=spread), chunk(finish="length"), COST))
    pieces = list(target.stream(Query(user("hi"), Sampling(5, 0.5, 0.9, 3, top_logprobs=1))))
    assert [p.text for p in pieces] == ["Hel", "lo", ""]
    whole = joined(pieces)
    assert (whole.text, whole.prompt_tokens, whole.completion_tokens, whole.finish) == ("Hello", 7, 2, "length")
    assert whole.drawn == (("lo", -0.5),) and whole.top_logprobs == ((("lo", -0.5),),)
    (asked,) = endpoint.asked
    assert asked["stream"] is True and asked["stream_options"] == {"include_usage": True}
    assert (asked["seed"], asked["max_tokens"], asked["temperature"], asked["top_p"]) == (3, 5, 0.5, 0.9)


def test_an_endpoint_that_does_not_stream_gives_one_piece(stage):
    endpoint, target = stage
    endpoint.play(says("whole"))
    assert list(target.stream(HI)) == [Completion("whole", 7, 3)]


@pytest.mark.parametrize("trouble", [fails(500), cuts(), events(chunk(""), done=False)], ids=["500", "cut", "no finish"])
def test_what_fails_before_the_first_piece_is_tried_again(trouble, stage):
    endpoint, target = stage
    endpoint.play(trouble, events(chunk("yes"), chunk(finish="stop")))
    whole = joined(list(target.stream(HI)))
    assert (whole.text, whole.finish, len(endpoint.asked), len(whole.faults)) == ("yes", "stop", 2, 1)


@pytest.mark.parametrize(
    "end", [{"error": {"message": "the model died"}}, {"choices": [{"delta": 3}]}, None], ids=["error event", "garbage", "broken off"]
)
def test_what_fails_later_is_an_error_and_nothing_is_said_twice(end, stage):
    endpoint, target = stage
    endpoint.play(events(chunk("half"), *([end] if end else []), done=False), says("no"))
    pieces = list(target.stream(HI))
    assert [p.text for p in pieces] == ["half", ""] and pieces[-1].finish == "error" and len(endpoint.asked) == 1
    assert end != {"error": {"message": "the model died"}} or "the model died" in pieces[-1].error


def test_a_refused_key_ends_a_stream_as_it_ends_a_run(stage):
    endpoint, target = stage
    endpoint.play(fails(401))
    with pytest.raises(TargetError, match="OPENAI_API_KEY"):
        list(target.stream(HI))


def test_a_stream_leaves_out_what_the_server_refuses(stage):
    endpoint, _ = stage
    endpoint.play(fails(400, "unknown field: seed"), events(chunk("ok"), chunk(finish="stop")))
    assert joined(list(quick(endpoint).stream(HI))).text == "ok"
    assert "seed" not in endpoint.asked[1]
