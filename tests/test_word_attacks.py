"""Word edits: where words stand, what may stand there, TextFooler's search and SEAR's rules."""

import re
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saddlepoint.attacks import _words
from saddlepoint.attacks._words import (
    STOP,
    Limits,
    neighbors,
    opened,
    parts,
    passage,
    rewritten,
    rules_of,
    similarities,
    swapped,
    swaps,
    synonyms,
    words,
)
from saddlepoint.attacks.tokens.sear import chosen, find, sear
from saddlepoint.attacks.tokens.textfooler import textfooler
from saddlepoint.errors import UsageError
from saddlepoint.policies import load
from saddlepoint.targets.scripted import Scripted
from saddlepoint.types import Artifact, Ask, Behavior, Completion, Context, Reply, Steps, Verdict

pytest.importorskip("torch")

if TYPE_CHECKING:
    from saddlepoint.targets.classifier import Classifier
    from saddlepoint.targets.hf import HF

TEA = Behavior("tea", "How do I make green tea?", system="You are a help desk.", phrasings=("How do I brew green tea?",), pair="tea")
ANY = Limits(similarity=-1.0, word_similarity=-1.0)
TEXT = st.lists(st.sampled_from(["How", "do", "I", "make", "green", "Tea", "the", "water"]), min_size=1, max_size=8).map(" ".join)


# ---- words ----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.data())
def test_a_swap_changes_its_word_and_nothing_else(text: str, data: st.DataObject) -> None:
    found = words(text)
    if not found:
        return
    place = data.draw(st.integers(0, len(found) - 1))
    new = swapped(text, place, "kettle")

    kept = words(new)
    assert kept[place].lower() == "kettle" and kept[:place] == found[:place] and kept[place + 1 :] == found[place + 1 :]
    assert found[place][:1].isupper() == kept[place][:1].isupper()
    assert len(new) - len("kettle") == len(text) - len(found[place])


def test_deleted_words_leave_one_blank() -> None:
    assert [swapped("Make green tea, now.", i, "") for i in range(4)] == [
        "green tea, now.", "Make tea, now.", "Make green , now.", "Make green tea, ."
    ]  # fmt: skip
    assert swapped("tea", 0, "") == ""


@given(TEXT, st.integers(1, 12), st.data())
def test_a_passage_holds_the_word_and_at_most_its_window(text: str, window: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(words(text)) - 1))
    around = passage(text, place, window)

    assert around in text and len(words(around)) == min(window, len(words(text)))
    marked = swapped(text, place, "kettle")
    assert "kettle" in passage(marked, place, window).lower()
    assert window < len(words(text)) or around == text


def test_the_table_has_its_license_forms_and_parts_of_speech() -> None:
    text = (_words.Path(_words.__file__).parent / "_synonyms.txt").read_text()

    assert "WordNet 3.0 Copyright 2006 by Princeton University" in text and "Permission to use, copy, modify and distribute" in text
    assert "create" in synonyms("make") and "creating" in synonyms("Making") and "created" in synonyms("made")
    assert parts("quickly") == {"r"} and parts("green") == {"n", "a"} and parts("veldrane") == {"n"}
    assert synonyms("veldrane") == ()
    assert len(text.encode()) < 600_000
    body = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z]+ [nvar](?: [a-z]+)*", line) for line in body)
    assert not [line for line in body if line.split()[0] in line.split()[2:]]  # no word is its own synonym


# ---- what may stand there -------------------------------------------------------------------------------------------


def test_neighbors_are_whole_words_nearest_first(tiny_classifier: "Classifier") -> None:
    import torch

    every = neighbors(tiny_classifier, "Tea", 1000, -1.0)
    unit = torch.nn.functional.normalize(tiny_classifier.embedding, dim=1)
    tea, *ids = tiny_classifier.tokenizer.convert_tokens_to_ids(["tea", *every])
    cosines = (unit[ids] @ unit[tea]).tolist()

    assert cosines == sorted(cosines, reverse=True) and len(every) > 50
    assert "tea" not in every and not [w for w in every if not re.fullmatch("[a-z]{2,}", w)]
    assert neighbors(tiny_classifier, "tea", 1000, cosines[4]) == every[:5] == neighbors(tiny_classifier, "tea", 5, -1.0)
    assert neighbors(tiny_classifier, "veldranes", 9, -1.0) == []  # written in pieces


def test_similarity_is_the_cosine_of_whole_texts(tiny_classifier: "Classifier") -> None:
    a, b = "how do i make tea", "the weather is cold"
    vectors = tiny_classifier.encode([a, b])

    assert similarities(tiny_classifier, [(a, a), (a, b), (b, a)]) == pytest.approx([1, *[float(vectors[0] @ vectors[1])] * 2], abs=1e-5)
    assert similarities(tiny_classifier, []) == []


def test_swaps_keep_what_their_limits_say(tiny_classifier: "Classifier") -> None:
    text = "how do i make green tea"
    free = swaps(tiny_classifier, text, text, 3, ANY)
    floor = free[len(free) // 2][0]

    assert [c for c, _ in free] == sorted((c for c, _ in free), reverse=True)
    assert {new for _, new in swaps(tiny_classifier, text, text, 3, Limits(similarity=floor, word_similarity=-1.0))} == {
        new for c, new in free if c >= floor
    }
    assert all(words(new)[3] not in STOP and words(new)[3] != "make" for _, new in free)
    assert len(swaps(tiny_classifier, text, text, 3, Limits(candidates=3, similarity=-1.0, word_similarity=-1.0))) <= 3
    way = "answer in a responsible way"
    strict = swaps(tiny_classifier, way, way, 3, ANY)
    loose = swaps(tiny_classifier, way, way, 3, Limits(similarity=-1.0, word_similarity=-1.0, part_of_speech=False))
    assert strict and all("a" in parts(words(new)[3]) for _, new in strict)
    assert {new for _, new in strict} < {new for _, new in loose}


def test_what_is_no_encoder_is_refused(tiny: "HF") -> None:
    for wrong in (tiny, Scripted(lambda _: "")):
        with pytest.raises(UsageError, match="textfooler needs an encoder of whole texts, got .*; allowed: guard"):
            opened(wrong, "textfooler")  # type: ignore[arg-type]


# ---- textfooler -----------------------------------------------------------------------------------------------------


def played(steps: Steps, score: Callable[[str], float]) -> list[list[str]]:
    """The texts asked, batch by batch; a text passes where its score is above one half."""
    batches: list[list[str]] = []
    replies: list[Reply] | None = None
    while True:
        try:
            batch = next(steps) if replies is None else steps.send(replies)
        except StopIteration:
            return batches
        batches.append([ask.chat[-1].text for ask in batch])
        replies = [_reply(ask, score(ask.chat[-1].text)) for ask in batch]


def _reply(ask: Ask, score: float) -> Reply:
    return Reply(ask, Completion("safe"), Verdict("harmful" if score > 0.5 else "refusal", score > 0.5, score))


def test_textfooler_goes_from_the_most_important_word_and_keeps_what_gains(tiny_classifier: "Classifier") -> None:
    weight = {"make": 0.24, "green": 0.08, "tea": 0.16}  # all three are worth 0.48: none passes

    def score(text: str) -> float:
        found = [w.lower() for w in words(text)]
        if len(found) < 6:  # a deletion
            return sum(w for word, w in weight.items() if word not in found)
        return sum(w for place, (word, w) in enumerate(weight.items(), 3) if found[place] != word)

    first, deletions, *swapped_in = played(
        textfooler(TEA, Context(Random(0)), encoder=tiny_classifier, similarity=-1.0, word_similarity=-1.0), score
    )
    assert first == [TEA.prompt]
    assert deletions == ["How do I green tea?", "How do I make tea?", "How do I make green ?"]  # "how", "do" and "I" stay
    assert len(swapped_in) == 3
    for batch, place in zip(swapped_in, (3, 5, 4), strict=True):  # by importance: make, tea, green
        assert all(words(text)[place] != words(TEA.prompt)[place] for text in batch)
        vectors = tiny_classifier.encode([TEA.prompt, *batch])
        cosines = (vectors[1:] @ vectors[0]).tolist()
        assert cosines == sorted(cosines, reverse=True)
    assert all(words(text)[3] != "make" for text in swapped_in[1])  # the first swap gained, so it stays


def test_textfooler_skips_a_swap_that_gains_nothing_and_stops_at_the_first_that_passes(tiny_classifier: "Classifier") -> None:
    def run(score: Callable[[str], float]) -> list[list[str]]:
        return played(textfooler(TEA, Context(Random(0)), encoder=tiny_classifier, similarity=-1.0, word_similarity=-1.0), score)

    flat = run(lambda text: 0.2)
    assert all(sum(a != b for a, b in zip(words(text), words(TEA.prompt), strict=True)) == 1 for batch in flat[2:] for text in batch)
    assert len(flat) == 5
    assert run(lambda text: 0.9) == [[TEA.prompt]]
    assert len(run(lambda text: 0.9 if len(words(text)) == 6 and "make" not in text and text != TEA.prompt else 0.1)) == 3
    deletion_passes = run(lambda text: 0.9 if len(words(text)) == 5 else 0.1)
    assert len(deletion_passes) == 5  # a deletion only measures


def test_textfooler_on_the_guard_keeps_its_words_alike(guard: "Classifier") -> None:
    hazard = load("fictional").select("harmful", "test")[0]
    batches = played(textfooler(hazard, Context(Random(0)), encoder=guard), lambda _: 0.1)
    made = [text for batch in batches[2:] for text in batch]

    assert len(made) > 5
    assert min(similarities(guard, [(hazard.prompt, text) for text in made])) >= 0.8 - 1e-4
    assert all("orimbel" in text for text in made)


# ---- sear -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(TEXT, st.data())
def test_a_rule_gives_back_the_paraphrase_that_it_came_from(text: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(words(text)) - 1))
    new = swapped(text, place, "kettle")
    once = words(text.lower()).count(words(text)[place].lower()) == 1

    rules = rules_of(text, new, 4)
    assert (words(text)[place].lower(), "kettle") in rules and 1 <= len(rules) <= 3
    if once:
        assert all(rewritten(rule, text).lower() == new.lower() for rule in rules)


def test_rules_keep_to_word_borders_case_and_span() -> None:
    assert rewritten(("how do i", "how can i"), "How do  I make tea? So how do I?") == "How can i make tea? So how can i?"
    assert rewritten(("make", "brew"), "Remake it; MAKE tea, make-up") == "Remake it; Brew tea, brew-up"
    assert rewritten(("please", ""), "Tell me, please.") == "Tell me,." and rewritten(("tea", ""), "tea") == "tea"
    assert rules_of("make the green tea", "brew some nice black tea", 2) == []
    assert rules_of("make tea", "make tea", 4) == [] == rules_of("make green tea", "make tea", 4)
    assert rules_of("how do i make tea", "how can one make tea", 4) == [
        ("do i", "can one"), ("how do i", "how can one"), ("do i make", "can one make")
    ]  # fmt: skip


def test_rules_are_chosen_to_cover_many_requests() -> None:
    wide, same, other, none = ("a", "b"), ("a", "c"), ("d", "e"), ("f", "g")
    gains = {same: {"1": 1.0, "2": 0.9}, wide: {"1": 1.0, "2": 1.0}, other: {"3": 0.5}, none: {"4": 0.0}}

    assert chosen(gains, 5) == (wide, other)  # `same` adds nothing once `wide` is there, `none` never does
    assert chosen(gains, 1) == (wide,) and chosen({}, 3) == ()


def test_sear_finds_rules_that_gain_on_train_requests_and_asks_with_each(tiny_classifier: "Classifier") -> None:
    behaviors = load("fictional").select("harmful", "train")[:6]
    given_ = {"encoder": tiny_classifier, "rules": 4, "texts": 10, "candidates": 6, "similarity": -1.0, "uses": 1}
    found = find(behaviors, Context(Random(3), tiny_classifier), **given_)  # type: ignore[arg-type]

    assert found == find(behaviors, Context(Random(3), tiny_classifier), **given_)  # type: ignore[arg-type]
    assert 1 <= len(found.rules) <= 4 and found.text == "" and found.behaviors == tuple(b.id for b in behaviors)
    (batch,) = played(sear(behaviors[0], Context(Random(0), artifact=found), encoder=tiny_classifier), lambda _: 0.1)
    alone = [new for rule in found.rules if (new := rewritten(rule, behaviors[0].prompt)) != behaviors[0].prompt]
    assert batch[: len(set(alone))] == list(dict.fromkeys(alone)) or batch == [behaviors[0].prompt]


def test_sear_applies_its_rules_alone_and_then_together() -> None:
    artifact = Artifact("sear", "", rules=(("make", "brew"), ("coffee", "cocoa"), ("green tea", "matcha")))

    (batch,) = played(sear(TEA, Context(Random(0), artifact=artifact)), lambda _: 0.1)
    assert batch == ["How do I brew green tea?", "How do I make matcha?", "How do I brew matcha?"]
    (plain,) = played(sear(TEA, Context(Random(0), artifact=Artifact("sear", "", rules=(("x", "y"),)))), lambda _: 0.1)
    assert plain == [TEA.prompt]


def test_sear_says_what_it_needs(tiny: "HF", tiny_classifier: "Classifier") -> None:
    given_ = {"encoder": tiny_classifier, "rules": 1, "texts": 1, "candidates": 1, "similarity": 0.0, "uses": 1}
    with pytest.raises(UsageError, match="whose weights are at hand"):
        find([TEA], Context(Random(0)), **given_)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a classifier that labels every request"):
        find([TEA], Context(Random(0), tiny), **given_)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="sear has no rules"):
        next(sear(TEA, Context(Random(0))))
