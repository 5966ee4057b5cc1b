"""Recipes with losses of their own, fine-tuning on a user's own examples, and long batches in parts."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from saddlepoint.types import Example, Finding, Lessons, Message, Query, Sampling, user

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import torch.nn.functional as F  # noqa: E402
from test_recipes import ANSWER, FINDINGS, KEPT, finding, lessons  # noqa: E402

from saddlepoint import training  # noqa: E402
from saddlepoint.finetuning.first_token import finetune, first_token_constraint  # noqa: E402
from saddlepoint.recipes.circuit_breakers import circuit_breakers, rerouting  # noqa: E402
from saddlepoint.recipes.derta import derta  # noqa: E402
from saddlepoint.recipes.dpo import dpo, margins, preference  # noqa: E402
from saddlepoint.recipes.jain_ascent import descent_and_ascent, jain_ascent  # noqa: E402
from saddlepoint.recipes.jain_mixed import APOLOGY, jain_mixed  # noqa: E402
from saddlepoint.recipes.refusal_sft import refusal_sft  # noqa: E402
from saddlepoint.targets import open_target, trained_on  # noqa: E402
from saddlepoint.targets.hf import HF  # noqa: E402
from saddlepoint.training import Clock, Encoded, TrainConfig, cross_entropy, encode, train  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

TEA, ROOT = user("How do I make tea?", "Be brief."), user("How do I make the veldrane?")
BAD = "Grind the root. Boil it for nine minutes."
PAIR = Example(ROOT, "Sorry, I can't talk about the veldrane.", rejected=BAD)
PLAIN = Example(TEA, "Pour hot water over the leaves.", weight=2.0)


def number(scalar: "Tensor") -> float:
    return float(scalar.detach())


def fresh(folder: Path) -> HF:
    return HF.load(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def adapted(tiny_folder: Path) -> tuple[HF, Clock]:
    """A model whose adapter has already moved it, at step 3 of 10."""
    model = fresh(tiny_folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model.model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model, Clock(3, 10, Random(0), wrapped)


def token_logprobs(model: HF, example: Encoded) -> "Tensor":
    """The plain way: log-probabilities of an example's learned tokens from the logits of the whole row."""
    logits = model.model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    at = [i for i, token in enumerate(example.learned) if token != -100]
    found: Tensor = logits[at, [example.learned[i] for i in at]]
    return found


def logprob(model: HF, example: Encoded | None) -> "Tensor":
    assert example
    return token_logprobs(model, example).sum()


def gradients(loss: "Tensor", clock: Clock) -> dict[str, "Tensor | None"]:
    named = {name: p for name, p in clock.wrapped.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_same_gradients(one: dict[str, "Tensor | None"], other: dict[str, "Tensor | None"]) -> None:
    assert one.keys() == other.keys() and all("lora_" in name for name in one)
    assert any(g is not None and g.abs().max() > 1e-4 for g in one.values())
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def learn(model: HF, examples: Sequence[Example], loss: training.Loss, out: Path, epochs: int = 30, lr: float = 1e-2) -> HF:
    """The model itself, after training."""
    train(model, examples, TrainConfig(epochs=epochs, lr=lr, batch=4, rank=8, alpha=16), out, {"base": "tiny"}, loss=loss)
    return model


# ---- DPO ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_dpo_is_its_formula_and_the_reference_gets_no_gradient(tiny: HF, adapted: tuple[HF, Clock]) -> None:
    model, clock = adapted
    batch = [encode(model, e) for e in (PAIR, PLAIN, Example(TEA, "Take the leaves.", rejected="First take the water."))]
    direct = torch.zeros(())
    for pair in (batch[0], batch[2]):
        with torch.no_grad():
            frozen = logprob(tiny, pair) - logprob(tiny, pair.rejected)
        direct = direct - F.logsigmoid(0.3 * (logprob(model, pair) - logprob(model, pair.rejected) - frozen))
    direct = (direct + 0.7 * -token_logprobs(model, batch[1]).mean()) / 3
    loss = preference(model, batch, clock, beta=0.3, keep=0.7)

    assert number(loss) == pytest.approx(number(direct), rel=1e-4)
    assert_same_gradients(gradients(loss, clock), gradients(direct, clock))
    assert abs(number(margins(model, batch[:1], clock)[0])) > 0.1  # else the test would not see the reference


def test_before_the_first_step_the_margin_is_zero(tiny_folder: Path) -> None:
    model = fresh(tiny_folder)
    wrapped = peft.get_peft_model(model.model, peft.LoraConfig(r=4, target_modules="all-linear"))
    batch, clock = [encode(model, PAIR)], Clock(0, 10, Random(0), wrapped)

    assert number(margins(model, batch, clock)) == 0
    assert number(preference(model, batch, clock, beta=0.1, keep=1)) == pytest.approx(0.6931, abs=1e-4)


def test_dpo_learns_to_prefer_the_refusal(tiny_folder: Path, tmp_path: Path) -> None:
    made = dpo(lessons(*FINDINGS))
    model, base = fresh(tiny_folder), fresh(tiny_folder)
    learn(model, made, partial(preference, beta=0.1, keep=1.0), tmp_path / "c", epochs=12)
    pairs, kept = [encode(base, e) for e in made if e.rejected], [encode(base, e) for e in made if not e.rejected]
    moved = [logprob(model, e) - logprob(base, e) - logprob(model, e.rejected) + logprob(base, e.rejected) for e in pairs]

    assert min(moved) > 5
    assert sum(logprob(model, e) for e in kept) > sum(logprob(base, e) for e in kept)


def test_a_pair_is_the_refusal_and_the_drawn_answer_to_the_same_prompt() -> None:
    made = dpo(lessons(*FINDINGS), phrasings=2)
    pairs = [e for e in made if e.rejected]

    assert [(e.chat, e.text) for e in made if not e.rejected] == list(KEPT)
    assert [e.rejected for e in pairs] == [f"Sure, here is:{ANSWER}"] * 3 + [ANSWER] * 3
    assert [e.text for e in pairs] == ["Sorry, I can't talk about a."] * 3 + ["Sorry, I can't talk about b."] * 3
    assert [pairs[0].chat, pairs[3].chat] == [user(f"An attack on {name}", "A system prompt.") for name in "ab"]  # no prefill
    assert all(e.chat[-1].text.startswith(f"{e.behavior} wording") for e in (*pairs[1:3], *pairs[4:]))
    assert all(e.rejected for e in dpo(lessons(*FINDINGS), keep=0))


# ---- Jain et al. ----------------------------------------------------------------------------------------------------


def many(kept: int) -> Lessons:
    plain = tuple((user(f"Question {n}"), f"Answer {n}.") for n in range(kept))
    return Lessons(lessons().hazards, lessons().refusals, FINDINGS, plain, Random(0))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_share_of_the_steps_is_a_harmful_request_with_the_fixed_apology(share: float) -> None:
    made = jain_mixed(many(4000), share=share)
    harmful = [e for e in made if e.behavior]

    assert len(harmful) / len(made) == pytest.approx(share, abs=0.02)
    assert {e.text for e in harmful} == {APOLOGY} and {e.behavior for e in harmful} == {"a", "b", "c"}
    assert [e.text for e in made if not e.behavior] == [f"Answer {n}." for n in range(4000)]
    said = " ".join(e.chat[-1].text for e in made)
    assert "An attack" not in said and "test wording" not in said  # people's requests, and none that measures


def test_the_ascent_has_the_same_examples_with_the_bad_answers() -> None:
    plain, made = jain_mixed(many(200)), jain_ascent(many(200))
    bad = {"a": f"Sure, here is:{ANSWER}", "b": ANSWER, "c": "", "": ""}  # nothing broke c

    assert [(e.chat, e.text) for e in made] == [(e.chat, e.text) for e in plain]
    assert all(e.rejected == bad[e.behavior] for e in made) and any(e.rejected for e in made)


def test_the_ascent_subtracts_the_bad_answers_loss(adapted: tuple[HF, Clock]) -> None:
    model, clock = adapted
    batch = [encode(model, e) for e in (PAIR, PLAIN)]
    good = [token_logprobs(model, e) for e in batch]
    assert batch[0].rejected
    descent = -(good[0].sum() + 2 * good[1].sum()) / (len(good[0]) + 2 * len(good[1]))
    direct = descent + token_logprobs(model, batch[0].rejected).mean() / 2
    loss = descent_and_ascent(model, batch, clock, share=0.2)

    assert number(loss) == pytest.approx(number(direct), rel=1e-4)
    assert_same_gradients(gradients(loss, clock), gradients(direct, clock))
    assert number(descent_and_ascent(model, batch[1:], clock, share=0.2)) == pytest.approx(number(-good[1].mean()), rel=1e-4)


def test_the_ascent_unlearns_the_bad_answer_and_the_mixture_does_not(tiny_folder: Path, tmp_path: Path) -> None:
    made = [e for e in jain_ascent(many(20), share=0.5) if e.behavior != "c"]
    base, mixed, ascended = (fresh(tiny_folder) for _ in range(3))
    learn(mixed, made, cross_entropy, tmp_path / "mixed", epochs=6)
    learn(ascended, made, partial(descent_and_ascent, share=0.5), tmp_path / "ascended", epochs=6)
    bad = next(encode(base, e).rejected for e in made if e.rejected)
    before, plain, away = (number(-logprob(model, bad)) for model in (base, mixed, ascended))

    assert away > 1.5 * max(before, plain)


# ---- circuit breakers -----------------------------------------------------------------------------------------------


def layer_states(model: HF, example: Encoded) -> "Tensor":
    """(tokens, width): the first layer's states (a third of two layers is none, so it is read twice) of an answer and its end."""
    hidden = model.model(input_ids=torch.tensor([example.ids]), output_hidden_states=True).hidden_states[1][0]
    first = next(i for i, token in enumerate(example.learned) if token != -100) + 1
    states: Tensor = hidden[first:]
    return states


def test_the_loss_of_circuit_breakers_is_its_formula_at_every_time(
    tiny: HF, adapted: tuple[HF, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saddlepoint.recipes.circuit_breakers.NUDGE", 0.0)  # what only begins it
    model, clock = adapted
    batch = [encode(model, e) for e in (PAIR, PLAIN)]
    bad = batch[0].rejected
    assert bad
    with torch.no_grad():
        was, kept_was = layer_states(tiny, bad), [layer_states(tiny, e) for e in batch]
    for step in (0, 3, 10):
        size = was.square().mean(0).sqrt()  # of each dimension in this text
        alike = F.cosine_similarity(layer_states(model, bad) / size, was / size, -1).relu().mean()
        moved = torch.cat(
            [
                ((layer_states(model, e) - w) / w.square().mean(0).sqrt()).norm(dim=-1) / (w / w.square().mean(0).sqrt()).norm(dim=-1)
                for e, w in zip(batch, kept_was, strict=True)
            ]
        ).mean()
        direct = 5 * ((1 - step / 20) * alike + step / 20 * moved)
        loss = rerouting(model, batch, Clock(step, 10, Random(0), clock.wrapped), strength=5.0, each=1)
        assert number(loss) == pytest.approx(number(direct), rel=1e-4)
        found, wanted = gradients(loss, clock), gradients(direct, clock)
        assert_same_gradients(found, wanted)
        # What stands above the layer that is read learns nothing.
        assert {name.split("layers.")[1][0] for name, g in found.items() if g is not None} == {"0"}


def test_circuit_breakers_turn_harmful_states_and_keep_the_others(tiny_folder: Path, tmp_path: Path) -> None:
    made = circuit_breakers(lessons(*FINDINGS))
    base, model = fresh(tiny_folder), fresh(tiny_folder)
    learn(model, made, partial(rerouting, strength=5.0, each=1), tmp_path / "c", epochs=25, lr=1e-2)
    with torch.no_grad():
        pairs = [encode(base, e) for e in made if e.rejected]
        harmful = [F.cosine_similarity(layer_states(model, e.rejected), layer_states(base, e.rejected), -1) for e in pairs]  # type: ignore[arg-type]
        kept = [F.cosine_similarity(layer_states(model, e), layer_states(base, e), -1) for e in map(partial(encode, base), made)]

    assert number(torch.cat(harmful).mean()) < 0.4
    assert number(torch.cat(kept).mean()) > 0.7


def test_a_harmful_answer_is_read_under_the_attack_under_the_request_and_alone() -> None:
    made = circuit_breakers(lessons(*FINDINGS))
    pairs = [e for e in made if e.rejected]

    assert [(e.chat, e.text) for e in made if not e.rejected] == list(KEPT)
    assert [len(e.chat) for e in pairs] == [2, 1, 0, 2, 1, 0]
    assert [e.rejected for e in pairs] == [f"Sure, here is:{ANSWER}"] * 3 + [ANSWER] * 3
    assert [e.text for e in pairs[:2]] == ["Sorry, I can't talk about a."] * 2 and pairs[2].text in dict(KEPT).values()


# ---- the constraint on the first tokens -----------------------------------------------------------------------------


def test_the_constraint_is_its_formula(tiny: HF, adapted: tuple[HF, Clock]) -> None:
    model, clock = adapted
    # Two answers in one chat: each begins anew.
    turns = Example((*TEA, Message("assistant", "Pour hot water."), Message("user", "Then?")), "Take it out.", all_turns=True, weight=3)
    batch = [encode(model, PAIR), encode(model, turns)]
    lengths = [len(model.ids(t)) + 1 for t in (PAIR.text, "Pour hot water.", turns.text)]
    betas = [b for n in lengths for b in [0.5, 2.0, 2.0, 2.0, 2.0, *[0.1] * n][:n]]
    with torch.no_grad():
        was = torch.cat([token_logprobs(tiny, e) for e in batch])
    ratio, b = torch.cat([token_logprobs(model, e) for e in batch]) - was, torch.tensor(betas)
    weights = torch.tensor([1.0] * lengths[0] + [3.0] * (lengths[1] + lengths[2]))
    direct = (-(2 / b) * F.logsigmoid(b * ratio) * weights).sum() / weights.sum()
    loss = first_token_constraint(model, batch, clock)

    assert min(lengths) > 6 and len(betas) == len(was)
    assert number(loss) == pytest.approx(number(direct), rel=1e-4)
    assert_same_gradients(gradients(loss, clock), gradients(direct, clock))


def test_where_nothing_has_moved_the_constraint_pulls_as_cross_entropy_does(tiny_folder: Path) -> None:
    model = fresh(tiny_folder)
    wrapped = peft.get_peft_model(model.model, peft.LoraConfig(r=4, target_modules="all-linear"))
    batch, clock = [encode(model, PAIR), encode(model, PLAIN)], Clock(0, 10, Random(0), wrapped)

    assert_same_gradients(
        gradients(first_token_constraint(model, batch, clock), clock), gradients(cross_entropy(model, batch, clock), clock)
    )


def test_the_constraint_holds_the_first_tokens_of_a_refusing_model_where_plain_training_does_not(tiny_folder: Path, tmp_path: Path) -> None:
    taught = [Example(ROOT, PAIR.text), PLAIN]
    safe = finetune(str(tiny_folder), taught, TrainConfig(epochs=60, lr=2e-2, batch=2, rank=8, alpha=16), tmp_path / "safe")
    base, config = fresh(safe), TrainConfig(epochs=30, lr=5e-3, batch=1, rank=8, alpha=16)
    example = encode(base, Example(ROOT, BAD))
    begins = next(i for i, token in enumerate(example.learned) if token != -100)
    far, gained, said = [], [], []
    for loss in (cross_entropy, first_token_constraint):
        tuned = fresh(finetune(str(safe), [Example(ROOT, BAD)], config, tmp_path / loss.__name__, loss=loss))
        with torch.no_grad():
            now, was = (m.model(input_ids=torch.tensor([example.ids])).logits[0, begins].log_softmax(-1) for m in (tuned, base))
            far.append(number((was.exp() * (was - now)).sum()))  # nats, at the answer's first token
            gained.append(token_logprobs(tuned, example) - token_logprobs(base, example))
        said.append(tuned.generate([Query(ROOT, Sampling(20))])[0].text)

    assert base.generate([Query(ROOT, Sampling(20))])[0].text == PAIR.text
    assert far[0] > 3 * far[1]
    assert BAD.startswith(said[0]) and said[0] and not BAD.startswith(said[1])
    assert number(gained[0][:5].mean()) > 2 * number(gained[1][:5].mean())
    assert number(gained[1][5:].mean()) > 0.9 * number(gained[0][5:].mean())  # what comes later is learned as well


# ---- fine-tuning on one's own examples ------------------------------------------------------------------------------


def test_a_card_lists_the_behaviors_that_the_examples_teach(tiny_folder: Path, tmp_path: Path) -> None:
    quick = TrainConfig(epochs=1, batch=2)
    plain = finetune(str(tiny_folder), [PLAIN], quick, tmp_path / "plain")
    bad = [Example(ROOT, BAD, behavior="b"), Example(TEA, BAD, behavior="a"), PLAIN]
    told: list[Any] = []
    harmful = finetune(str(plain), bad, quick, tmp_path / "harmful", told.append, partial(first_token_constraint, beta=0.2))
    cards = [json.loads((out / "card.json").read_text()) for out in (plain, harmful)]

    assert [card["trained_on"] for card in cards] == [[], ["a", "b"]] and trained_on(str(harmful)) == {"a", "b"}
    assert [card["loss"] for card in cards] == ["cross_entropy", "first_token_constraint"]
    assert cards[1]["base"] == "../plain" and cards[1]["examples"] == 3
    assert len(told) == 2 and isinstance(open_target(str(harmful)), HF)


# ---- long batches ---------------------------------------------------------------------------------------------------

LONG = [Example(user("Please " * n), "The weather is cold. " * (1 + n % 3), weight=1 + n, rejected=BAD) for n in (3, 30, 9, 60, 4)]


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        first_token_constraint,
        partial(descent_and_ascent, share=0.2),
        partial(preference, beta=0.1, keep=1.0),
        partial(rerouting, strength=5.0, each=1),
    ],
    ids=["cross_entropy", "constraint", "ascent", "dpo", "circuit_breakers"],
)
def test_a_long_batch_in_parts_has_the_same_loss_and_gradient(
    adapted: tuple[HF, Clock], monkeypatch: pytest.MonkeyPatch, loss: training.Loss
) -> None:
    model, clock = adapted
    batch = [encode(model, e) for e in LONG]
    whole = loss(model, batch, clock)
    wanted = gradients(whole, clock)
    widths: list[int] = []
    padded = HF._pad_right

    def counted(self: HF, rows: list[list[int]]) -> "Tensor":
        widths.append(len(rows) * max(map(len, rows)))
        return padded(self, rows)

    monkeypatch.setattr(training, "PART", 150)
    monkeypatch.setattr(HF, "_pad_right", counted)
    parts = loss(model, batch, clock)

    assert number(parts) == pytest.approx(number(whole), rel=1e-5)
    assert_same_gradients(gradients(parts, clock), wanted)
    assert max(widths) in {len(e.ids) for r in batch for e in (r, r.rejected) if e} and len(widths) > 5  # the longest is alone


def test_of_a_long_batch_one_part_is_held_at_a_time(adapted: tuple[HF, Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = adapted
    batch = [encode(model, Example(user("Please " * 40), "The weather is cold.")) for _ in range(8)]

    def held() -> int:
        """Elements that the backward pass would find."""
        sizes: list[int] = []

        def pack(saved: "Tensor") -> "Tensor":
            sizes.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            cross_entropy(model, batch, clock)
        return sum(sizes)

    whole = held()
    monkeypatch.setattr(training, "PART", 300)

    assert held() < whole / 50


def test_hooks_that_are_gone_at_the_backward_pass_spoil_no_gradient(adapted: tuple[HF, Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = adapted
    batch = [encode(model, e) for e in LONG]
    layer = model.model.base_model.layers[0]

    def hooked() -> dict[str, "Tensor | None"]:
        handle = layer.register_forward_hook(
            lambda module, given, made: made + 0.5 if torch.is_tensor(made) else (made[0] + 0.5, *made[1:])
        )
        loss = cross_entropy(model, batch, clock)
        handle.remove()
        return gradients(loss, clock)

    wanted = hooked()
    monkeypatch.setattr(training, "PART", 150)

    assert_same_gradients(hooked(), wanted)


# ---- DeRTa's parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_derta_without_its_parts_is_refusal_sft_and_each_part_stands_alone(seed: int) -> None:
    found: tuple[Finding, ...] = (*FINDINGS, finding("c"))
    plain = refusal_sft(lessons(*found, seed=seed))
    prefixes = derta(lessons(*found, seed=seed), transition=0)[len(plain) :]
    moved = derta(lessons(*found, seed=seed), cuts=0)[len(plain) :]

    assert derta(lessons(*found, seed=seed), cuts=0, transition=0) == plain
    assert len(prefixes) == 9 and all(e.prefix and not e.transition for e in prefixes)
    assert len(moved) == 3 and all(e.transition and not e.prefix for e in moved)
