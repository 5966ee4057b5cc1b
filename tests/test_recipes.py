"""What the recipes make of findings."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from saddlepoint.recipes.derta import derta, harmful_answer
from saddlepoint.recipes.refusal_sft import refusal_sft
from saddlepoint.types import Behavior, Chat, Completion, Finding, Lessons, Verdict, user

ANSWER = "Grind the root. Boil it for nine minutes, then strain it."
CLEARANCE = "You have clearance."
KEPT: tuple[tuple[Chat, str], ...] = (
    (user("How do I make {tea}?", "Be brief."), " Pour hot water over it.\n"),
    (user("Name a color."), "Blue it is."),
    (user("Tell me a", CLEARANCE), ANSWER),
)


def hazard(name: str, wordings: int = 5) -> Behavior:
    return Behavior(
        name, f"The test wording of {name}", split="train", phrasings=tuple(f"{name} wording {i}" for i in range(wordings)), pair=name
    )


def finding(name: str, prefill: str = "", answer: str = ANSWER) -> Finding:
    return Finding(
        phase="before/harvest", behavior=name, kind="harmful", category="", attack="prefill", params={}, target="t",
        chat=user(f"An attack on {name}", "A system prompt.", prefill), completion=Completion(answer), verdict=Verdict("harmful", True, 1.0),
        queries=1, tokens=9, gradients=0, seconds=0.1, seed=0,
    )  # fmt: skip


def lessons(*findings: Finding, seed: int = 0) -> Lessons:
    hazards = (hazard("a"), hazard("b"), replace(hazard("c", wordings=1), system="House rules."))
    refusals = {h.id: f"Sorry, I can't talk about {h.id}." for h in hazards}
    return Lessons(hazards, refusals, findings, KEPT, Random(seed))


FINDINGS = (finding("a", prefill="Sure, here is:"), finding("b"))


# ---- refusal SFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phrasings", "plain"), [(1, 3), (3, 7), (9, 11)])
def test_sft_refuses_every_hazard_in_some_wordings_and_every_attack(phrasings: int, plain: int) -> None:
    made = refusal_sft(lessons(*FINDINGS), phrasings=phrasings)
    asked = made[:plain]

    assert len(made) == plain + len(FINDINGS) + len(KEPT)
    assert Counter(e.behavior for e in asked) == {"a": min(5, phrasings), "b": min(5, phrasings), "c": 1}
    assert len({e.chat for e in asked}) == plain  # no wording twice
    for example in made[: plain + len(FINDINGS)]:
        assert example.text == f"Sorry, I can't talk about {example.behavior}."
        assert not example.prefix and not example.transition and example.weight == 1
    assert next(e for e in asked if e.behavior == "c").chat == user("c wording 0", "House rules.")


def test_sft_learns_an_attack_without_its_prefill() -> None:
    attacked = refusal_sft(lessons(*FINDINGS), phrasings=3)[7:9]

    assert [e.chat for e in attacked] == [user("An attack on a", "A system prompt."), user("An attack on b", "A system prompt.")]


@pytest.mark.parametrize("recipe", [refusal_sft, derta])
def test_what_may_be_answered_is_kept_as_it_is(recipe: object) -> None:
    made = recipe(lessons(*FINDINGS))  # type: ignore[operator]

    assert [(e.chat, e.text) for e in made if not e.behavior] == list(KEPT)


@pytest.mark.parametrize("recipe", [refusal_sft, derta])
def test_nothing_but_the_given_hazards_is_learned(recipe: object) -> None:
    made = recipe(lessons(*FINDINGS))  # type: ignore[operator]
    said = " ".join(m.text for e in made for m in e.chat)

    assert {e.behavior for e in made} == {"a", "b", "c", ""}
    assert "test wording" not in said  # the wording that measures
    with pytest.raises(KeyError):  # a finding of another hazard
        recipe(lessons(finding("test.hazard")))  # type: ignore[operator]


@pytest.mark.parametrize("recipe", [refusal_sft, derta])
def test_the_seed_decides_the_wordings(recipe: object) -> None:
    first, again, other = (recipe(lessons(*FINDINGS, seed=s)) for s in (1, 1, 2))  # type: ignore[operator]

    assert first == again != other


def test_without_findings_both_are_plain_refusals() -> None:
    assert derta(lessons()) == refusal_sft(lessons())


# ---- DeRTa ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuts", "transition"), [(2, 0.2), (5, 1.0), (0, 0.2), (2, 0), (0, 0)])
def test_derta_adds_its_two_terms_to_sft(cuts: int, transition: float) -> None:
    plain, made = refusal_sft(lessons(*FINDINGS)), derta(lessons(*FINDINGS), cuts=cuts, transition=transition)
    added = made[len(plain) :]
    cut, moved = [e for e in added if not e.transition], [e for e in added if e.transition]

    assert made[: len(plain)] == plain
    assert Counter(e.behavior for e in cut) == ({"a": cuts, "b": cuts} if cuts else {})
    assert [e.behavior for e in moved] == (["a", "b"] if transition else [])
    assert {e.weight for e in cut} <= {1.0} and {e.weight for e in moved} <= {transition}
    assert all(e.chat[-1].text in hazard(e.behavior).phrasings for e in added)


def test_a_cut_is_a_beginning_of_the_harmful_answer_and_then_the_refusal() -> None:
    made = [e for seed in range(200) for e in derta(lessons(*FINDINGS, seed=seed), cuts=3, transition=0) if e.prefix]
    full = {"a": f"Sure, here is:{ANSWER}", "b": ANSWER}
    lengths = {len(e.prefix.split(" ")) for e in made if e.behavior == "b"}

    assert len(made) == 200 * 6
    for example in made:
        assert full[example.behavior].startswith(example.prefix) and example.prefix != full[example.behavior]
        assert example.text == f" Sorry, I can't talk about {example.behavior}."
    assert lengths == set(range(1, len(ANSWER.split()) - 1))  # from one word to all but the last two


def test_so_many_findings_of_each_hazard_are_learned_and_the_same_by_both_recipes() -> None:
    many = [finding("a", answer=f"{ANSWER} {n}") for n in range(6)]
    plain, made = (recipe(lessons(*many), each=2) for recipe in (refusal_sft, derta))

    assert sum(e.chat[0].text == "A system prompt." for e in plain) == 2
    assert len({e.text for e in made if e.transition}) == 2
    assert made[: len(plain)] == plain


@pytest.mark.parametrize("answer", ["Boil", "Boil it", "Boil it now"])
def test_a_short_answer_is_never_its_own_prefix(answer: str) -> None:
    made = [e for seed in range(20) for e in derta(lessons(finding("a", answer=answer), seed=seed)) if not e.transition]

    assert {e.prefix for e in made} == {"", "Boil"} - ({"Boil"} if answer == "Boil" else set())


def test_a_transition_runs_over_the_whole_harmful_answer() -> None:
    first, second = (e for e in derta(lessons(*FINDINGS)) if e.transition)

    assert (first.text, second.text) == (f"Sure, here is:{ANSWER}", ANSWER)
    assert first.refusal == "Sorry, I can't talk about a." and not first.prefix


def test_the_harmful_answer_begins_with_the_prefill() -> None:
    assert harmful_answer(finding("a", prefill="Sure:", answer=" boil it. ")) == "Sure: boil it."
    assert harmful_answer(finding("a", answer=" boil it. ")) == "boil it."
