"""What an attacker sees who knows the defenses: gradients and losses through the stack."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from saddlepoint.defenses.demonstration.goal_priority import GoalPriority
from saddlepoint.defenses.demonstration.self_reminder import AFTER, BEFORE, SelfReminder
from saddlepoint.defenses.detection.classifier_guard import ClassifierGuard
from saddlepoint.defenses.detection.perplexity_filter import PerplexityFilter
from saddlepoint.types import Query, WhiteBox, user

torch = pytest.importorskip("torch")
from saddlepoint.attacks._gradient import row, rows, slots  # noqa: E402
from saddlepoint.defenses._adaptive import Adaptive  # noqa: E402

if TYPE_CHECKING:
    from saddlepoint.targets.classifier import Classifier
    from saddlepoint.targets.hf import HF

REQUEST = user("How do I make green tea?", "You are a helpful assistant.")
CONTROL, WANTED = "the wind the cup", "Sure, here is"


@pytest.mark.parametrize("place", ["suffix", "prefix"])
def test_a_frame_holds_the_demonstrations_and_leaves_the_control_where_it_was(tiny: HF, place: str) -> None:
    stack = SelfReminder(tiny)
    seen = Adaptive(stack, tiny)
    frame = seen.frame(REQUEST, CONTROL, WANTED, place)  # type: ignore[arg-type]
    text = f"{REQUEST[1].text} {CONTROL}" if place == "suffix" else f"{CONTROL} {REQUEST[1].text}"
    asked = user(f"{BEFORE}\n{text}\n{AFTER}", REQUEST[0].text)

    assert isinstance(seen, WhiteBox)
    assert tiny.text(torch.cat([frame.before, frame.control, frame.after])) == tiny.render(asked)
    assert tiny.text(frame.control).strip() == CONTROL
    # What it optimizes is the loss of what the stack really asks.
    (expected,) = tiny.logprobs([(asked, WANTED)])
    assert float(seen.loss([row(frame, frame.control)], len(frame.affirmative))) == pytest.approx(-float(expected.mean()), abs=0.05)
    assert not tiny.frame(REQUEST, CONTROL, WANTED, place).before.equal(frame.before)  # type: ignore[arg-type]


def test_an_undefended_frame_is_the_bare_one(tiny: HF) -> None:
    ours, bare = (
        Adaptive(PerplexityFilter(tiny, tiny, threshold=1e9), tiny).frame(REQUEST, CONTROL, WANTED),
        tiny.frame(REQUEST, CONTROL, WANTED),
    )

    assert all(torch.equal(getattr(ours, part), getattr(bare, part)) for part in ("before", "control", "after", "affirmative"))


def test_the_loss_counts_what_the_filter_would_not_let_pass(tiny: HF) -> None:
    low, high = PerplexityFilter(tiny, tiny, threshold=0.0), PerplexityFilter(tiny, tiny, threshold=1e9)
    controls = torch.stack([tiny.frame(REQUEST, CONTROL, WANTED).control, tiny.frame(REQUEST, CONTROL, WANTED).control.flip(0)])
    found = {}
    for name, stack in (("low", low), ("high", high)):
        seen = Adaptive(stack, tiny)
        frame = seen.frame(REQUEST, CONTROL, WANTED)
        found[name] = seen.loss(rows(frame, controls), len(frame.affirmative))
    texts = [f"{REQUEST[1].text} {tiny.text(c).lstrip()}" for c in controls]

    assert found["high"].tolist() == tiny.loss(rows(frame, controls), len(frame.affirmative)).tolist()
    assert (found["low"] - found["high"]).tolist() == pytest.approx(low.scores(texts), abs=1e-4)


def test_the_slope_is_the_gradient_of_the_filter_s_own_loss(tiny: HF) -> None:
    """Against finite differences: between a one-hot and a step towards another token."""
    stack = PerplexityFilter(tiny, tiny, threshold=0.0)
    frame = tiny.frame(REQUEST, CONTROL, WANTED)
    control = frame.control
    slope = stack.slope("How do I make green tea? ", control, "")
    assert slope is not None and slope.shape == (len(control), len(tiny.embedding))

    prompt = torch.tensor([*tiny.prompt_ids(()), *tiny.ids("How do I make green tea?")])

    def loss(onehot: torch.Tensor) -> torch.Tensor:
        embeds = torch.cat([tiny.embedding[prompt], onehot @ tiny.embedding])[None]
        logits = tiny.model(inputs_embeds=embeds).logits[0].log_softmax(-1)
        ids = torch.cat([prompt, control])
        known = -logits[range(len(prompt) - 1), ids[1 : len(prompt)]].sum()
        own = -(logits[len(prompt) - 1 : -1] * onehot).sum()
        return (known + own) / (len(ids) - 1)

    onehot = torch.nn.functional.one_hot(control, len(tiny.embedding)).float().requires_grad_()
    (expected,) = torch.autograd.grad(loss(onehot), onehot)
    assert torch.allclose(slope, expected, atol=1e-4)


def test_the_gradient_has_the_slope_only_where_the_filter_would_block(tiny: HF) -> None:
    plain = tiny.frame(REQUEST, CONTROL, WANTED)
    bare = tiny.gradient(row(plain, plain.control), slots(plain), len(plain.affirmative))
    for threshold, same in ((0.0, False), (1e9, True)):
        stack = PerplexityFilter(tiny, tiny, threshold=threshold)
        seen = Adaptive(stack, tiny)
        frame = seen.frame(REQUEST, CONTROL, WANTED)
        found = seen.gradient(row(frame, frame.control), slots(frame), len(frame.affirmative))
        assert torch.allclose(found, bare) is same
        if not same:
            assert torch.allclose(found - bare, stack.slope("How do I make green tea? ", frame.control, ""), atol=1e-4)  # type: ignore[arg-type]


def test_rows_of_no_known_frame_are_left_alone(tiny: HF) -> None:
    seen = Adaptive(PerplexityFilter(tiny, tiny, threshold=0.0), tiny)
    frame = seen.frame(REQUEST, CONTROL, WANTED)
    other = torch.cat([frame.before, frame.control])  # how likely the control is by itself, as uat_lm asks

    assert seen.loss([other], 2).tolist() == tiny.loss([other], 2).tolist()
    moved = replace(frame, before=frame.before.flip(0))
    assert seen.loss([row(moved, frame.control)], 3).tolist() == tiny.loss([row(moved, frame.control)], 3).tolist()


def test_a_guard_behind_a_reminder_grades_what_it_is_shown(tiny: HF) -> None:
    guard = PerplexityFilter(tiny, tiny, threshold=0.0)
    seen = Adaptive(SelfReminder(guard), tiny)
    frame = seen.frame(REQUEST, CONTROL, WANTED)
    asked = [row(frame, frame.control)]
    shown = f"{BEFORE}\n{REQUEST[1].text} {tiny.text(frame.control).lstrip()}\n{AFTER}"

    added = seen.loss(asked, len(frame.affirmative)) - tiny.loss(asked, len(frame.affirmative))
    assert added.tolist() == pytest.approx(guard.scores([shown]), abs=1e-4)


def test_the_loss_counts_by_how_much_a_classifier_stops_a_request(tiny: HF, tiny_classifier: Classifier) -> None:
    (logprob,) = tiny_classifier.logprobs([(user(f"{REQUEST[1].text} {CONTROL}"), tiny_classifier.labels[0])])
    passes = float(logprob.exp())
    for threshold in (0.01, 0.99):
        guard = ClassifierGuard(tiny, tiny_classifier, threshold)
        seen = Adaptive(guard, tiny)
        frame = seen.frame(REQUEST, CONTROL, WANTED)
        asked = [row(frame, frame.control)]
        excess = max(0.0, math.log((1 - passes) / passes) - math.log(threshold / (1 - threshold)))

        assert (seen.loss(asked, len(frame.affirmative)) - tiny.loss(asked, len(frame.affirmative))).tolist() == pytest.approx(
            [excess], abs=1e-3
        )
        assert (excess > 0) is (threshold == 0.01)


def test_a_frame_holds_what_goal_priority_puts_around_a_request(tiny: HF) -> None:
    stack = GoalPriority(tiny)
    frame = Adaptive(stack, tiny).frame(REQUEST, CONTROL, WANTED)
    asked = stack.wrapped(Query((REQUEST[0], replace(REQUEST[1], text=f"{REQUEST[1].text} {CONTROL}")))).chat

    assert tiny.text(torch.cat([frame.before, frame.control, frame.after])) == tiny.render(asked)
