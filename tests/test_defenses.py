"""Inference-time defenses: each by itself, and stacked."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from saddlepoint import registry
from saddlepoint.defenses import defended
from saddlepoint.defenses._stack import REFUSED
from saddlepoint.defenses.demonstration.self_reminder import AFTER, BEFORE, SelfReminder
from saddlepoint.defenses.detection.perplexity_filter import PerplexityFilter
from saddlepoint.errors import UsageError
from saddlepoint.targets.scripted import Scripted
from saddlepoint.types import Chat, Message, Query, Sampling, user

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

REQUESTS = [
    "How do I make green tea?",
    "Please tell me what the weather is like in the north.",
    "the wind",
    "Answer in one short paragraph. " * 3,
    "x",
]
GIBBERISH = "\x07 zq\ufffd}{ \u8336\u8336 QX#\x01 ~~ \\u0 \u0416 %%"


def echo() -> Scripted:
    return Scripted(lambda query: f"answer to {query.chat[-1].text}")


def asked(target: Scripted) -> list[Chat]:
    return [q.chat for q in target.asked]


# ---- self-reminder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["How do I make tea?", "Say {the} {0} %s {", "", "two\nlines"])
def test_the_reminder_stands_around_the_request(text: str) -> None:
    inner = echo()
    SelfReminder(inner).generate([Query(user(text, "System {prompt}."))])

    assert asked(inner) == [user(f"{BEFORE}\n{text}\n{AFTER}", "System {prompt}.")]


def test_only_the_last_request_of_a_talk_is_wrapped_and_a_prefill_stays_last() -> None:
    inner, sampling = echo(), Sampling(7, 0.5, 0.9, 3, 2)
    talk = (*user("First", "System"), Message("assistant", "Yes"), Message("user", "Second"), Message("assistant", "Sure,"))
    none = (Message("system", "Be brief."), Message("assistant", "Well"))
    SelfReminder(inner, before="B", after="A").generate([Query(talk, sampling), Query(none)])

    assert asked(inner) == [(*talk[:3], Message("user", "B\nSecond\nA"), talk[4]), none]
    assert inner.asked[0].sampling == sampling


# ---- perplexity filter ----------------------------------------------------------------------------------------------


def test_a_window_is_never_less_than_the_whole(tiny: "HF") -> None:
    whole = PerplexityFilter(echo(), tiny).scores([*REQUESTS, GIBBERISH])
    for window in (1, 3, 10, 1000):
        scores = PerplexityFilter(echo(), tiny, window).scores([*REQUESTS, GIBBERISH])
        assert all(part >= all_ - 1e-5 for part, all_ in zip(scores, whole, strict=True))
        assert scores == whole or window < 1000


def test_scores_are_the_mean_loss_per_token_of_the_worst_window(tiny: "HF") -> None:
    (row,) = tiny.logprobs([((), REQUESTS[1])])
    losses = (-row).tolist()
    worst = max(sum(part) / len(part) for part in (losses[i : i + 4] for i in range(0, len(losses), 4)))

    assert PerplexityFilter(echo(), tiny).scores([REQUESTS[1]]) == [pytest.approx(sum(losses) / len(losses), abs=1e-4)]
    assert PerplexityFilter(echo(), tiny, 4).scores([REQUESTS[1]]) == [pytest.approx(worst, abs=1e-4)]


class Moody:
    """A scorer whose losses move with what shares a call, as they do in bfloat16."""

    def logprobs(self, texts: Any) -> Any:
        torch = pytest.importorskip("torch")
        return [torch.full((len(text),), -0.01 * len(text) - 0.1 * len(texts)) for _, text in texts]


def test_a_verdict_does_not_depend_on_what_shares_the_call() -> None:
    fit = PerplexityFilter(echo(), Moody()).calibrated(REQUESTS)  # type: ignore[arg-type]
    longest = max(REQUESTS, key=len)

    for texts in ([longest], REQUESTS * 2, [longest + "!"] * 3):
        assert [c.finish for c in fit.generate([Query(user(t)) for t in texts])] == ["stop" if t in REQUESTS else "filter" for t in texts]


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calibrated_it_lets_exactly_such_requests_pass(tiny_folder: Any, window: int, dtype: str) -> None:
    from saddlepoint.targets.hf import HF

    scorer = HF.load(str(tiny_folder), dtype, "cpu")
    bare = PerplexityFilter(echo(), scorer, window)
    fit = bare.calibrated(REQUESTS)
    # Whatever they share a call with: in bfloat16 a loss moves with its batch.
    for queries in ([Query(user(t)) for t in reversed(REQUESTS)], *([Query(user(t))] for t in REQUESTS)):
        assert {c.finish for c in fit.generate(queries)} == {"stop"}
    assert fit.threshold == max(bare.scores(REQUESTS)) and bare.threshold is None
    assert PerplexityFilter(echo(), scorer, window, 1.5).calibrated(REQUESTS).threshold == 1.5


def test_what_is_less_likely_than_the_threshold_is_blocked_and_the_rest_stays_in_order(tiny: "HF") -> None:
    inner = echo()
    scores = PerplexityFilter(inner, tiny).scores([*REQUESTS, GIBBERISH])
    middle = sorted(scores)[3]
    texts = [*REQUESTS, GIBBERISH]
    answers = PerplexityFilter(inner, tiny, threshold=middle).generate([Query(user(t, "Be brief.")) for t in texts])

    assert [a.text for a in answers] == [f"answer to {t}" if s <= middle else REFUSED for t, s in zip(texts, scores, strict=True)]
    assert [a.finish for a in answers].count("filter") == 2
    assert asked(inner) == [user(t, "Be brief.") for t, s in zip(texts, scores, strict=True) if s <= middle]
    assert all(a.completion_tokens == 0 for a in answers if a.finish == "filter")


def test_with_everything_blocked_the_target_is_not_asked(tiny: "HF") -> None:
    inner = echo()

    assert [a.finish for a in PerplexityFilter(inner, tiny, threshold=-1.0).generate([Query(user("x"))] * 2)] == ["filter"] * 2
    assert not inner.asked and PerplexityFilter(inner, tiny, threshold=9.0).generate([]) == []


def test_the_last_request_is_scored_and_an_empty_one_passes(tiny: "HF") -> None:
    inner = echo()
    strict = PerplexityFilter(inner, tiny, threshold=0.0)
    chats = [user(""), (*user("", prefill=GIBBERISH),), (*user(GIBBERISH), Message("assistant", "?"), Message("user", ""))]

    assert [a.finish for a in strict.generate([Query(c) for c in chats])] == ["stop"] * 3
    assert strict.generate([Query((Message("user", ""), Message("user", "the wind")))])[0].finish == "filter"
    assert strict.scores([""]) == [0.0] and strict.scores([]) == []


def test_without_a_threshold_it_says_how_to_get_one(tiny: "HF") -> None:
    with pytest.raises(UsageError, match=r"no threshold; give threshold=\.\.\., or calibrate it"):
        PerplexityFilter(echo(), tiny).generate([Query(user("x"))])


# ---- stacks ---------------------------------------------------------------------------------------------------------


def test_a_stack_shows_itself(tiny: "HF") -> None:
    outer = SelfReminder(PerplexityFilter(tiny, tiny, threshold=2.0), "B", "A")

    assert outer.name == f"self_reminder(perplexity_filter({tiny.name}))"
    inner = f"PerplexityFilter(inner=HF({tiny.name!r}), scorer=HF({tiny.name!r}), window=0, threshold=2.0)"
    assert repr(outer) == f"SelfReminder(inner={inner}, before='B', after='A')"


@pytest.mark.parametrize(
    "build",
    [lambda t, m: SelfReminder(PerplexityFilter(t, m, threshold=99.0)), lambda t, m: PerplexityFilter(SelfReminder(t), m, threshold=99.0)],
)
def test_both_orders_answer_in_order(tiny: "HF", build: Callable[[Any, Any], Any]) -> None:
    inner = echo()
    answers = build(inner, tiny).generate([Query(user(t)) for t in REQUESTS])

    assert asked(inner) == [user(f"{BEFORE}\n{t}\n{AFTER}") for t in REQUESTS]
    assert [a.text for a in answers] == [f"answer to {BEFORE}\n{t}\n{AFTER}" for t in REQUESTS]


def test_the_order_decides_what_the_filter_reads(tiny: "HF") -> None:
    inside, outside = (
        SelfReminder(PerplexityFilter(echo(), tiny, threshold=0.0)),
        PerplexityFilter(SelfReminder(echo()), tiny, threshold=0.0),
    )

    assert inside.generate([Query(user(""))])[0].finish == "filter"  # it reads the reminder too
    assert outside.generate([Query(user(""))])[0].finish == "stop"


def test_a_stack_is_built_from_words_the_first_innermost_and_calibrated(tiny: "HF", tiny_folder: Any) -> None:
    calls = registry.parse("defense", f"perplexity_filter(scorer={str(tiny_folder)!r}, window=8), self_reminder(before='B')")
    stack: Any = defended(echo(), calls, REQUESTS)

    assert stack.name == "self_reminder(perplexity_filter(scripted))" and stack.before == "B"
    assert stack.inner.window == 8 and stack.inner.threshold == max(stack.inner.scores(REQUESTS))
    for wrong in ("perplexity_filter(window=-1)", "perplexity_filter(windows=1)", "self_reminder(before=3)"):
        with pytest.raises(UsageError):
            registry.parse("defense", wrong)
