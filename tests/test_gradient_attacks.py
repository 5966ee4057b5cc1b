"""The per-behavior gradient attacks on a tiny random model: their estimates against explicit sums, and what they reach."""

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from saddlepoint import registry
from saddlepoint.errors import UsageError
from saddlepoint.types import Artifact, Ask, Behavior, Completion, Context, Query, Reply, Sampling, Steps, Verdict, WhiteBox, user

torch = pytest.importorskip("torch")
from saddlepoint.attacks import _gradient as steps  # noqa: E402
from saddlepoint.attacks.gradient import arca as arca_file  # noqa: E402
from saddlepoint.attacks.gradient import gbda as gbda_file  # noqa: E402
from saddlepoint.attacks.gradient import hotflip as hotflip_file  # noqa: E402
from saddlepoint.attacks.gradient.arca import arca  # noqa: E402
from saddlepoint.attacks.gradient.gbda import gbda  # noqa: E402
from saddlepoint.attacks.gradient.hotflip import hotflip  # noqa: E402
from saddlepoint.attacks.gradient.soft_prompt import soft_prompt  # noqa: E402

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

TEA = Behavior("tea", "How do I make tea?", affirmative="Sure, here is how", system="You are a helpful assistant.", pair="tea")
BEGIN = "! ! ! ! ! !"
QUICK: dict[str, dict[str, Any]] = {
    "hotflip": {"edits": 4, "candidates": 16, "init": BEGIN},
    "gbda": {"num_steps": 30, "samples": 4, "draws": 60, "queries": 2, "start": 4.0, "init": BEGIN},
    "arca": {"sweeps": 2, "outputs": 2, "candidates": 8, "averaged": 4, "init": BEGIN},
    "soft_prompt": {"num_steps": 20, "test_steps": 10, "lr": 0.2, "init": BEGIN},
}
TEXTUAL = [name for name in QUICK if name != "soft_prompt"]


def call(name: str) -> Callable[..., Steps]:
    return registry.get("attack", name).call


def asks(run: Steps) -> list[Ask]:
    """Every ask of a run whose answers are all refusals."""
    made: list[Ask] = []
    replies: list[Reply] | None = None
    while True:
        try:
            batch = next(run) if replies is None else run.send(replies)
        except StopIteration:
            return made
        made += batch
        replies = [Reply(ask, Completion("No."), Verdict("refusal", False)) for ask in batch]


def context(model: Any, seed: int = 0, told: list[str] | None = None) -> Context:
    return Context(Random(seed), whitebox=model, tell=(told if told is not None else []).append)


def chat_loss(model: "HF", ask: Ask, affirmative: str = TEA.affirmative) -> float:
    """The loss of the affirmative after what was really asked, from its text."""
    (found,) = model.logprobs([(ask.chat, affirmative)])
    return -float(found.mean())


START = Ask(user(f"{TEA.prompt} {BEGIN}", TEA.system))


# ---- what all of them keep ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTUAL)
def test_a_run_lowers_the_loss_of_the_affirmative(tiny: "HF", name: str) -> None:
    made = asks(call(name)(TEA, context(tiny), **QUICK[name]))

    assert min(chat_loss(tiny, ask) for ask in made) < 0.9 * chat_loss(tiny, START)


@pytest.mark.parametrize("name", TEXTUAL)
def test_what_is_asked_is_read_as_it_was_evaluated(tiny: "HF", name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: dict[tuple[int, ...], float] = {}
    loss = tiny.loss

    def spy(rows: Sequence[Any], scored: int, *more: Any, **named: Any) -> Any:
        found = loss(rows, scored, *more, **named)
        evaluated.update({tuple(row.tolist()[:-scored]): float(value) for row, value in zip(rows, found, strict=True)})
        return found

    monkeypatch.setattr(tiny, "loss", spy)
    for ask in asks(call(name)(TEA, context(tiny), **QUICK[name])):
        assert tuple(tiny.prompt_ids(ask.chat)) in evaluated


@pytest.mark.parametrize("name", QUICK)
def test_the_seed_decides_the_run(tiny: "HF", name: str) -> None:
    first, again, other = (asks(call(name)(TEA, context(tiny, seed), **QUICK[name])) for seed in (1, 1, 2))

    assert first == again
    assert first != other or name in ("hotflip", "soft_prompt")  # these two draw nothing


@pytest.mark.parametrize("name", TEXTUAL)
def test_where_no_candidate_survives_the_first_control_is_asked(tiny: "HF", name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "survives", lambda frame, controls: torch.zeros(len(controls), dtype=torch.bool))

    assert {ask.chat for ask in asks(call(name)(TEA, context(tiny), **QUICK[name]))} == {START.chat}


@pytest.mark.parametrize("name", TEXTUAL)
def test_more_candidates_than_tokens_are_no_error(tiny: "HF", name: str) -> None:
    many = {"gbda": {"draws": 2000}}.get(name, {"candidates": 100_000, "init": "! !"})
    few = {"hotflip": {"edits": 1}, "gbda": {"num_steps": 1}, "arca": {"sweeps": 1, "outputs": 1}}[name]

    assert asks(call(name)(TEA, context(tiny), **(few | many)))


@pytest.mark.parametrize("name", QUICK)
def test_without_weights_it_says_so(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} needs the target's weights"):
        next(call(name)(TEA, Context(Random(0))))


@pytest.mark.parametrize("name", TEXTUAL)
def test_new_tokens_are_ascii_unless_allowed(tiny: "HF", name: str) -> None:
    found = "".join(a.chat[-1].text for seed in range(3) for a in asks(call(name)(TEA, context(tiny, seed), **QUICK[name])))

    assert found.isascii()


# ---- shared steps ---------------------------------------------------------------------------------------------------


def test_soft_logprobs_are_those_of_a_plain_pass(tiny: "HF") -> None:
    frame = steps.framed(tiny, TEA, BEGIN)
    row = steps.row(frame, frame.control)
    with torch.no_grad():
        plain = tiny.model(input_ids=row[None]).logits[0].log_softmax(-1)
        for at in (steps.slots(frame), slice(1, len(row)), slice(len(row) - 2, len(row))):
            found = tiny.soft_logprobs(frame, tiny.embedding[frame.control][None], at)
            torch.testing.assert_close(found[0], plain[at.start - 1 : at.stop - 1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="first token is predicted by none"):
        tiny.soft_logprobs(frame, tiny.embedding[frame.control][None], slice(0, 2))


def test_soft_logprobs_have_the_gradient_of_the_loss(tiny: "HF") -> None:
    frame = steps.framed(tiny, TEA, BEGIN)
    length = len(steps.row(frame, frame.control))
    embeds = tiny.embedding[frame.control][None].clone().requires_grad_()
    said = tiny.soft_logprobs(frame, embeds, slice(length - len(frame.affirmative), length))
    picked = -said[0, torch.arange(len(frame.affirmative)), frame.affirmative].mean()
    (grad,) = torch.autograd.grad(picked, embeds)
    again = tiny.embedding[frame.control][None].clone().requires_grad_()
    (expected,) = torch.autograd.grad(tiny.soft_loss(frame, again).sum(), again)

    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("place", ["prefix", "suffix"])
def test_survivors_are_read_as_themselves_where_an_artifact_puts_them(tiny: "HF", place: Any) -> None:
    behaviors = (TEA, Behavior("b", "Tell me about tea", affirmative="Sure"), Behavior("c", "  (x)\n", affirmative="Sure"))
    frames = [steps.framed(tiny, b, BEGIN, place) for b in behaviors]
    allowed = tiny.candidates(ascii_only=True)
    drawn = steps.random_tokens(allowed, (400, 3), torch.Generator().manual_seed(0))
    kept = steps.survivors(tiny, frames, torch.cat([drawn, drawn]), place)

    assert 10 < len(kept) < 400
    assert len(kept.unique(dim=0)) == len(kept)
    places = [drawn.tolist().index(c) for c in kept.tolist()]
    assert places == sorted(places)
    for control in kept:
        artifact = Artifact("a", tiny.text(control), place)
        for behavior, frame in zip(behaviors, frames, strict=True):
            asked = tiny.prompt_ids(user(artifact.applied(behavior.prompt), behavior.system))
            assert asked == torch.cat([frame.before, control, frame.after]).tolist()
    lost = [c for c in drawn.unique(dim=0).tolist() if c not in kept.tolist()]
    changed = [  # and what is dropped would not have been
        any(
            tiny.prompt_ids(user(Artifact("a", tiny.text(torch.tensor(c)), place).applied(b.prompt), b.system))
            != [*f.before.tolist(), *c, *f.after.tolist()]
            for b, f in zip(behaviors, frames, strict=True)
        )
        for c in lost
    ]
    assert all(changed)


# ---- hotflip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [[], [7]])
def test_every_gain_is_the_directional_derivative_of_the_whole_change(behind: list[int]) -> None:
    control, vocabulary = [3, 1, 1, 4], 9
    tokens = control + behind
    grad = torch.randn(len(tokens), vocabulary, generator=torch.Generator().manual_seed(0))
    flips, inserts, deletes = hotflip_file.gains(grad, torch.tensor(tokens), len(control))
    hot = torch.nn.functional.one_hot

    def explicit(new: list[int]) -> float:
        change = (hot(torch.tensor(new[: len(tokens)]), vocabulary) - hot(torch.tensor(tokens), vocabulary)).float()
        return float(-(grad * change).sum() / change.norm()) if change.any() else 0.0

    assert flips.shape == (4, vocabulary) and inserts.shape == (5, vocabulary) and deletes.shape == (4,)
    for i in range(4):
        for b in range(vocabulary):
            assert float(flips[i, b]) == pytest.approx(explicit([*tokens[:i], b, *tokens[i + 1 :]]), abs=1e-5)
            assert float(inserts[i, b]) == pytest.approx(explicit([*tokens[:i], b, *tokens[i:]]), abs=1e-5)
        left = [*tokens[:i], *tokens[i + 1 :], tokens[-1]]  # what stands behind the run is not known, so its slot stays
        assert float(deletes[i]) == pytest.approx(explicit(left), abs=1e-5)
    for b in range(vocabulary):
        at_end = float(inserts[4, b])
        assert at_end == pytest.approx(explicit([*control, b])) if behind else at_end == -torch.inf


def test_a_gain_is_the_slope_of_the_models_own_loss(tiny: "HF") -> None:
    frame = steps.framed(tiny, TEA, "tea cup is cold")
    grad = tiny.gradient(steps.row(frame, frame.control), steps.slots(frame), len(frame.affirmative))
    flips, _, deletes = hotflip_file.gains(grad, frame.control, len(frame.control))
    start = torch.nn.functional.one_hot(frame.control, len(tiny.embedding)).float()

    def slope(new: Any) -> float:
        change = torch.nn.functional.one_hot(new, len(tiny.embedding)).float() - start
        step = 1e-3 * change / change.norm()
        with torch.no_grad():
            high, low = tiny.soft_loss(frame, torch.stack([(start + step) @ tiny.embedding, (start - step) @ tiny.embedding])).tolist()
        return (low - high) / 2e-3

    for slot, token in ((0, 120), (2, 291), (3, 140)):
        new = frame.control.clone()
        new[slot] = token
        assert float(flips[slot, token]) == pytest.approx(slope(new), abs=2e-3)
    new = torch.cat([frame.control[1:], frame.control[-1:]])
    assert not new.equal(frame.control)
    assert float(deletes[0]) == pytest.approx(slope(new), abs=2e-3)


def test_flips_alone_keep_the_length_and_all_edits_do_not(tiny: "HF") -> None:
    def lengths(operations: Any) -> set[int]:
        few = {"edits": 1, "candidates": 100_000, "init": "tea cup", "operations": operations}
        tried: list[Any] = []
        spy = _Spy(tiny, tried)
        asks(hotflip(TEA, context(spy), **few))
        return {len(row) for rows in tried for row in rows}

    start = len(steps.row(f := steps.framed(tiny, TEA, "tea cup"), f.control))
    assert lengths("flip") == {start}
    assert lengths("all") == {start - 1, start, start + 1}


def test_the_beam_goes_on_with_the_truly_best(tiny: "HF") -> None:
    tried: list[Any] = []
    spy = _Spy(tiny, tried)
    asks(hotflip(TEA, context(spy), edits=2, beam=2, candidates=12, init=BEGIN))
    frame = steps.framed(tiny, TEA, BEGIN)

    first = tried[1]
    values = tiny.loss(list(first), len(frame.affirmative)).tolist()
    best = sorted(range(len(first)), key=values.__getitem__)[:2]
    gradients = spy.gradients
    assert len(gradients) == 3
    assert [g.tolist() for g in gradients[1:]] == [first[i].tolist() for i in best]


def test_hotflip_evades_a_classifier(tiny: "HF") -> None:
    model = _Labels(tiny)
    assert isinstance(model, WhiteBox)
    wanted = Behavior("b", "make tea now", affirmative="yes", pair="b")
    start = float(model.loss([steps.row(f := steps.framed(model, wanted, BEGIN), f.control)], 1))
    made = asks(hotflip(wanted, context(model), edits=4, candidates=16, init=BEGIN))
    end = model.frame(made[-1].chat, "x", "yes")

    assert float(model.loss([torch.cat([end.before, end.after, end.affirmative])], 1)) < 0.5 * start


class _Spy:
    """The tiny model, which also notes the rows whose losses and gradients are asked for."""

    def __init__(self, model: "HF", rows: list[Any]) -> None:
        self.model, self.rows, self.gradients = model, rows, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def loss(self, rows: Any, *more: Any, **named: Any) -> Any:
        self.rows.append([row.clone() for row in rows])
        return self.model.loss(rows, *more, **named)

    def gradient(self, row: Any, *more: Any, **named: Any) -> Any:
        self.gradients.append(row)
        return self.model.gradient(row, *more, **named)


class _Labels(_Spy):
    """A linear bag-of-tokens classifier over the tiny model's tokens: a row ends with the wanted label, 0 or 1."""

    def __init__(self, model: "HF") -> None:
        super().__init__(model, [])
        self.table = torch.randn(len(model.embedding), 2, generator=torch.Generator().manual_seed(1))

    def frame(self, chat: Any, control: str, affirmative: str, place: Any = "suffix") -> Any:
        found = self.model.frame(chat, control, "x", place)
        return type(found)(found.before, found.control, found.after, torch.tensor([int(affirmative == "yes")]))

    def loss(self, rows: Any, scored: int, *more: Any, **named: Any) -> Any:
        assert scored == 1
        return torch.stack([-self.table[row[:-1]].sum(0).log_softmax(0)[row[-1]] for row in rows])

    def gradient(self, row: Any, at: slice, scored: int, *more: Any, **named: Any) -> Any:
        hot = torch.nn.functional.one_hot(row[:-1], len(self.table)).float().requires_grad_()
        (grad,) = torch.autograd.grad(-(hot @ self.table).sum(0).log_softmax(0)[row[-1]], hot)
        return grad[at]


# ---- gbda -----------------------------------------------------------------------------------------------------------


OTHER = [291, 120, 306, 140, 300, 133]


def _one_hot_terms(tiny: "HF", ids: list[int], kappa: float | None = None) -> tuple[Any, list[float]]:
    frame = steps.framed(tiny, TEA, BEGIN)
    assert len(ids) == len(frame.control)
    soft = torch.nn.functional.one_hot(torch.tensor(ids), len(tiny.embedding)).float()[None]
    found = gbda_file.terms(tiny, frame, soft, torch.arange(len(tiny.embedding)), tiny.embedding.float(), kappa)
    return frame, [float(term) for term in found]


def test_at_a_one_hot_the_soft_terms_are_the_hard_ones(tiny: "HF") -> None:
    frame, (adversarial, unlikely, unlike) = _one_hot_terms(tiny, OTHER)
    ids = torch.tensor(OTHER)
    vectors = torch.nn.functional.normalize(tiny.embedding, dim=-1)
    nearest = [max(float(vectors[a] @ vectors[b]) for b in ids) for a in frame.control]

    assert adversarial == pytest.approx(float(tiny.loss([steps.row(frame, ids)], len(frame.affirmative))), abs=1e-4)
    assert unlikely == pytest.approx(float(tiny.loss([torch.cat([frame.before, ids])], len(ids))), abs=1e-4)
    assert unlike == pytest.approx(1 - sum(nearest) / len(nearest), abs=1e-4) and unlike > 0.1
    assert _one_hot_terms(tiny, frame.control.tolist())[1][2] == pytest.approx(0, abs=1e-5)


def test_the_margin_ends_where_every_token_leads(tiny: "HF") -> None:
    frame, (margin, *_) = _one_hot_terms(tiny, OTHER, kappa=5.0)
    ids = torch.tensor(OTHER)
    with torch.no_grad():
        logits = tiny.model(input_ids=steps.row(frame, ids)[None]).logits[0, -len(frame.affirmative) - 1 : -1]
    leads = [float(row[t] - max(row[v] for v in range(len(row)) if v != t)) for row, t in zip(logits, frame.affirmative, strict=True)]

    assert margin == pytest.approx(sum(max(0.0, 5.0 - lead) for lead in leads) / len(leads), abs=1e-3)
    assert _one_hot_terms(tiny, OTHER, kappa=0.0)[1][0] < margin


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_gbda_lowers_its_soft_loss_and_asks_the_best_samples_first(tiny: "HF", loss: Any) -> None:
    told: list[str] = []
    made = asks(gbda(TEA, context(tiny, told=told), **QUICK["gbda"] | {"queries": 4, "loss": loss}))
    soft = [float(text.split()[-1]) for text in told]
    hard = [chat_loss(tiny, ask) for ask in made]

    assert sum(soft[-5:]) < 0.9 * sum(soft[:5])
    assert len(made) == len({a.chat for a in made}) == 4
    assert hard == sorted(hard)


def test_the_fluency_term_makes_controls_likelier(tiny: "HF") -> None:
    def own_loss(fluency: float) -> float:
        (ask,) = asks(gbda(TEA, context(tiny), **QUICK["gbda"] | {"queries": 1, "fluency": fluency}))
        frame = steps.framed(tiny, TEA, ask.chat[-1].text.removeprefix(TEA.prompt).strip())
        return float(tiny.loss([torch.cat([frame.before, frame.control])], len(frame.control)))

    assert own_loss(10.0) < own_loss(0.0) - 1


def test_the_similarity_term_keeps_the_control(tiny: "HF") -> None:
    def kept(similarity: float) -> float:
        told = asks(gbda(TEA, context(tiny), **QUICK["gbda"] | {"queries": 1, "similarity": similarity}))
        return told[0].chat[-1].text.count("!")

    assert kept(100.0) > kept(0.0)


# ---- arca -----------------------------------------------------------------------------------------------------------


def _joint(tiny: "HF", x: str = "tea cup is ! north cold", y: str = " Sure, the water") -> Any:
    frame = steps.framed(tiny, TEA, x)
    return type(frame)(frame.before, frame.control, frame.after, torch.tensor(tiny.ids(y)))


def test_the_averaged_gradient_is_the_mean_of_gradients(tiny: "HF") -> None:
    frame, drawn = _joint(tiny), torch.tensor([300, 290, 310])
    each = [
        tiny.gradient(steps.row(frame, c), steps.slots(frame), len(frame.affirmative))[2] for c in steps.swapped(frame.control, 2, drawn)
    ]

    torch.testing.assert_close(steps.averaged_gradient(tiny, frame, 2, drawn), torch.stack(each).mean(0), atol=1e-5, rtol=1e-3)


def test_the_score_of_an_output_token_is_its_log_probability_and_the_slope_of_what_follows(tiny: "HF") -> None:
    frame, drawn = _joint(tiny), torch.tensor([300, 290])
    length, outputs = len(steps.row(frame, frame.control)), len(frame.affirmative)
    for at in range(outputs):
        place = length - outputs + at
        row = steps.row(frame, frame.control)
        with torch.no_grad():
            expected = tiny.model(input_ids=row[None]).logits[0, place - 1].log_softmax(-1)
        rest = outputs - 1 - at
        if rest:
            slopes = []
            for token in drawn:
                with_it = row.clone()
                with_it[place] = token
                slopes.append(-rest * tiny.gradient(with_it, slice(place, place + 1), rest)[0])
            expected = expected + torch.stack(slopes).mean(0)
        torch.testing.assert_close(arca_file.output_scores(tiny, frame, at, drawn), expected, atol=1e-3, rtol=1e-3)


def test_the_objective_is_phi_and_the_weighted_log_probability(tiny: "HF") -> None:
    frame = _joint(tiny)
    opening = 2
    wanted = torch.zeros(len(tiny.embedding))
    y = frame.affirmative.clone()
    y[-1] = y[opening]
    wanted[y[opening]] = wanted[y[0]] = 1.0  # one in the free slots, twice, and one in the opening
    ys = torch.stack([frame.affirmative, y])
    xs = frame.control.expand(2, -1)
    found = arca_file.objective(tiny, frame, xs, ys, wanted, opening, 0.25)
    likely = [float(tiny.logprobs([(user(TEA.prompt + tiny.text(frame.control), TEA.system), tiny.text(t))])[0].sum()) for t in ys]

    assert found.tolist() == pytest.approx([1 + 0.25 * value for value in likely], abs=1e-3)
    for at in range(opening, len(y)):  # and a token's gain is the difference that it makes
        gains = arca_file.gain(y, at, wanted, opening)
        with_token = [
            arca_file.objective(tiny, frame, xs[:1], steps.swapped(y, at, torch.tensor([t])), wanted, opening, 0.0)
            for t in (5, int(y[0]), int(y[opening]))
        ]
        assert [float(v - with_token[0]) for v in with_token] == pytest.approx([float(gains[t]) for t in (5, int(y[0]), int(y[opening]))])


def test_the_objective_rises_and_the_output_begins_with_the_affirmative(tiny: "HF") -> None:
    told: list[str] = []
    asks(arca(TEA, context(tiny, told=told), **QUICK["arca"] | {"sweeps": 4}))
    rises = [float(re.search(r"objective (\S+),", text)[1]) for text in told]  # type: ignore[index]

    assert len(rises) == 4 and rises == sorted(rises) and rises[-1] > rises[0]
    assert all(f"output {TEA.affirmative}"[:-1] in text.replace("'", "").replace('"', "") for text in told)


def test_phi_brings_the_words_into_the_output(tiny: "HF") -> None:
    def output(lam: float) -> str:
        told: list[str] = []
        asks(arca(TEA, context(tiny, told=told), **QUICK["arca"] | {"words": "weather", "lam": lam, "candidates": 32}))
        return told[-1].partition("output ")[2]

    assert " weather" in output(0.01)
    assert " weather" not in output(100.0)


def test_the_control_never_says_the_output(tiny: "HF") -> None:
    tried: list[Any] = []
    asks(arca(TEA, context(_Spy(tiny, tried)), **QUICK["arca"] | {"candidates": 100_000, "sweeps": 1}))
    frame = steps.framed(tiny, TEA, BEGIN)
    at = steps.slots(frame)
    affirmative = set(frame.affirmative.tolist())

    assert len(tried) > len(frame.control)
    assert not any(affirmative & set(row[at].tolist()) for rows in tried for row in rows)


def test_an_audit_asks_with_the_control_alone(tiny: "HF") -> None:
    made = asks(arca(TEA, context(tiny), **QUICK["arca"], request=False))

    assert made and all("make tea" not in a.chat[-1].text and a.chat[0].text == TEA.system for a in made)
    assert min(chat_loss(tiny, a) for a in made) < chat_loss(tiny, Ask(user(f" {BEGIN}", TEA.system)))


# ---- soft prompt ----------------------------------------------------------------------------------------------------


def test_the_first_embeddings_are_read_as_the_text_that_they_came_from(tiny: "HF") -> None:
    (ask,) = asks(soft_prompt(TEA, context(tiny), num_steps=1, init=BEGIN))
    soft, text = tiny.generate([Query(ask.chat, Sampling(12)), Query(START.chat, Sampling(12))])

    assert ask.chat[-1].text == TEA.prompt and len(ask.chat[-1].soft) == 6
    assert soft.text == text.text != ""


def test_better_embeddings_are_asked_each_time(tiny: "HF") -> None:
    made = asks(soft_prompt(TEA, context(tiny), **QUICK["soft_prompt"] | {"num_steps": 60}))
    frame = steps.framed(tiny, TEA, BEGIN)
    with torch.no_grad():
        losses = [float(tiny.soft_loss(frame, torch.tensor(a.chat[-1].soft)[None])) for a in made]

    assert len(made) == 6
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.4 * chat_loss(tiny, START)


def test_enough_steps_make_the_model_say_the_affirmative(tiny: "HF") -> None:
    *_, ask = asks(soft_prompt(TEA, context(tiny), num_steps=200, lr=0.2, test_steps=200, init=BEGIN))
    (said,) = tiny.generate([Query(ask.chat, Sampling(12))])

    assert said.text.startswith(TEA.affirmative)
