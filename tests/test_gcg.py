"""GCG on a tiny random model: what it proposes, what it picks, and what it asks."""

from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from saddlepoint.errors import UsageError
from saddlepoint.types import Ask, Behavior, Completion, Context, Reply, Steps, Verdict, WhiteBox, user

torch = pytest.importorskip("torch")
from saddlepoint.attacks._gradient import propose  # noqa: E402
from saddlepoint.attacks.gradient.gcg import gcg  # noqa: E402

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

TEA = Behavior("tea", "How do I make tea?", affirmative="Sure, here is how", system="You are a helpful assistant.", pair="tea")
BEGIN = "! ! ! ! ! !"


def asks(steps: Steps, unsafe_at: int | None = None) -> list[Ask]:
    """Every ask of a run; the answer to ask number `unsafe_at`, from 1, is judged unsafe."""
    made: list[Ask] = []
    replies: list[Reply] | None = None
    while True:
        try:
            (ask,) = next(steps) if replies is None else steps.send(replies)
        except StopIteration:
            return made
        made.append(ask)
        unsafe = len(made) == unsafe_at
        replies = [Reply(ask, Completion("Sure."), Verdict("harmful" if unsafe else "refusal", unsafe))]


class Recorder:
    """The tiny model, which also notes the rows whose losses are asked for, and the losses."""

    def __init__(self, model: "HF") -> None:
        self.model, self.seen = model, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def loss(self, rows: Any, scored: int, near: Any = None, exact: bool = True, reduce: Any = None) -> Any:
        losses = self.model.loss(rows, scored, near, exact, reduce)
        self.seen.append((rows, losses))
        return losses


def context(model: Any, seed: int = 0) -> Context:
    return Context(Random(seed), whitebox=model)


def suffix_loss(model: "HF", ask: Ask) -> float:
    """The loss of the affirmative after what was really asked."""
    prompt, affirmative = model.prompt_ids(ask.chat), model.ids(TEA.affirmative)
    return float(model.loss(torch.tensor([prompt + affirmative]), len(affirmative)))


# ---- candidates -----------------------------------------------------------------------------------------------------


def drawn(width: int = 60, topk: int = 4, n_replace: int = 1, length: int = 6, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    control, grad = torch.arange(100, 100 + length), torch.randn(length, 50, generator=torch.Generator().manual_seed(9))
    allowed = torch.arange(50) % 3 != 0
    rows = propose(control, grad, allowed, width, topk, n_replace, torch.Generator().manual_seed(seed))
    return control, grad, allowed, rows


@pytest.mark.parametrize(("n_replace", "length"), [(1, 6), (2, 6), (3, 7), (6, 6), (9, 6), (1, 1)])
def test_a_candidate_changes_at_most_n_replace_slots(n_replace: int, length: int) -> None:
    control, _, allowed, rows = drawn(n_replace=n_replace, length=length, topk=20)
    changed = (rows != control).sum(1)

    assert rows.shape[1] == length and len(rows.unique(dim=0)) == len(rows) <= 60
    assert len(rows) == min(60, 20 * length) or n_replace > 1  # two changed slots may be drawn in either order
    assert int(changed.max()) == min(n_replace, length) == int(changed.min())  # the control's own tokens are out of reach here
    assert allowed[rows[rows != control]].all()


@pytest.mark.parametrize("width", [6, 60, 64])
def test_the_slots_are_evenly_covered(width: int) -> None:
    control, _, _, rows = drawn(width, topk=20)
    times = (rows != control).sum(0).tolist()

    assert sum(times) == width and max(times) - min(times) <= 1


def test_fewer_candidates_than_slots_reach_every_slot_in_time() -> None:
    reached = Counter(int(slot) for seed in range(60) for slot in (drawn(2, seed=seed)[3] != drawn(2)[0]).nonzero()[:, 1])

    assert set(reached) == set(range(6))


def test_only_the_best_allowed_tokens_of_each_slot_are_drawn() -> None:
    control, grad, allowed, rows = drawn(width=600, topk=4)
    for slot in range(6):
        best = sorted((t for t in range(50) if allowed[t]), key=lambda t: float(grad[slot, t]))[:4]
        assert {int(t) for t in rows[:, slot] if t != control[slot]} == set(best)


def test_more_topk_than_tokens_draws_them_all() -> None:
    _, _, allowed, rows = drawn(width=6000, topk=256)

    assert {int(t) for t in rows.flatten() if t < 100} == set(allowed.nonzero().flatten().tolist())


def test_candidates_follow_the_seed() -> None:
    assert drawn(seed=1, topk=20)[3].equal(drawn(seed=1, topk=20)[3])
    assert not drawn(seed=1, topk=20)[3].equal(drawn(seed=2, topk=20)[3])


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_replace", [1, 2])
def test_a_run_lowers_the_loss_of_the_affirmative(tiny: "HF", n_replace: int) -> None:
    made = asks(gcg(TEA, context(tiny), num_steps=30, search_width=32, topk=32, n_replace=n_replace, optim_str_init=BEGIN, test_steps=6))
    begun = suffix_loss(tiny, Ask(user(f"{TEA.prompt} {BEGIN}", TEA.system)))
    losses = [suffix_loss(tiny, ask) for ask in made]

    assert len(made) == 5
    assert losses == sorted(losses, reverse=True)  # the best so far is asked, never a worse one
    assert losses[-1] < 0.8 * begun


def test_one_step_is_that_of_a_plain_implementation(tiny: "HF") -> None:
    width, topk = 24, 16
    (ask,) = asks(gcg(TEA, context(tiny, seed=5), num_steps=1, search_width=width, topk=topk, optim_str_init=BEGIN, test_steps=1))

    # The same numbers in the same order, but everything else in the plainest way: text in, one row at a time.
    head, tail = tiny.render(user(f"{TEA.prompt}@", TEA.system)).split("@")
    before, control, after, affirmative = (tiny.ids(t) for t in (head, f" {BEGIN}", tail, TEA.affirmative))
    table = tiny.embedding.clone()

    def loss(embeds: Any) -> Any:
        logits = tiny.model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        start = len(before) + len(control) + len(after)
        return -sum(logits[start + i - 1, token] for i, token in enumerate(affirmative)) / len(affirmative)

    hot = torch.nn.functional.one_hot(torch.tensor(before + control + after + affirmative), len(table)).float().requires_grad_()
    (grad,) = torch.autograd.grad(loss(hot @ table), hot)
    writable = [t for t in range(len(table)) if (s := tiny.tokenizer.decode([t])).isascii() and s.isprintable() and not s.startswith("<|")]
    generator = torch.Generator().manual_seed(Random(5).getrandbits(63))
    shift = int(torch.randint(len(control), (1,), generator=generator))
    torch.randint(topk, (width, 1), generator=generator)
    order = torch.rand(len(control), topk, generator=generator).argsort(1)
    found = []
    for i in range(width):
        slot = (i * len(control) // width + shift) % len(control)
        pick = int(order[slot, sum(j * len(control) // width == i * len(control) // width for j in range(i))])
        candidate = list(control)
        candidate[slot] = sorted(writable, key=lambda t: float(grad[len(before) + slot, t]))[pick]
        row = before + candidate + after
        if tiny.ids(tiny.tokenizer.decode(row)) == row:
            with torch.no_grad():
                found.append((float(loss(table[torch.tensor(row + affirmative)])), tiny.tokenizer.decode(candidate)))

    assert len(found) > 5
    assert ask.chat == user(TEA.prompt + min(found)[1], TEA.system)


def test_what_is_asked_is_the_best_control_that_was_evaluated(tiny: "HF") -> None:
    model = Recorder(tiny)
    assert isinstance(model, WhiteBox)
    steps = gcg(TEA, context(model), num_steps=6, search_width=16, topk=16, optim_str_init=BEGIN, test_steps=2)
    frame = tiny.frame(user(TEA.prompt, TEA.system), BEGIN, TEA.affirmative)
    ask, reply = next(steps)[0], Verdict("refusal", False)
    for number in (1, 2, 3):
        assert len(model.seen) == 2 * number
        rows, losses = (torch.cat([seen[i] for seen in model.seen]) for i in (0, 1))
        best = rows[losses.argmin()].tolist()
        start, stop = len(frame.before), len(frame.before) + len(frame.control)
        assert ask.chat == user(TEA.prompt + tiny.tokenizer.decode(best[start:stop]), TEA.system)
        # And the target reads it as the very tokens that were evaluated.
        assert tiny.prompt_ids(ask.chat) + frame.affirmative.tolist() == best
        if number < 3:
            (ask,) = steps.send([Reply(ask, Completion("No."), reply)])


def test_equal_candidates_are_evaluated_once(tiny: "HF") -> None:
    model = Recorder(tiny)
    asks(gcg(TEA, context(model), num_steps=2, search_width=64, topk=2, optim_str_init=BEGIN, test_steps=2))

    for rows, _ in model.seen:
        assert len(rows) == len(rows.unique(dim=0)) <= 12


def test_it_stops_where_the_search_judge_says_unsafe(tiny: "HF") -> None:
    few = {"search_width": 4, "topk": 8, "optim_str_init": BEGIN}

    assert len(asks(gcg(TEA, context(tiny), num_steps=7, test_steps=2, **few))) == 4  # after steps 2, 4, 6 and the last
    assert len(asks(gcg(TEA, context(tiny), num_steps=7, test_steps=2, **few), unsafe_at=2)) == 2


def test_the_seed_decides_the_run(tiny: "HF") -> None:
    first, again, other = (
        asks(gcg(TEA, context(tiny, seed), num_steps=3, search_width=8, optim_str_init=BEGIN, test_steps=1)) for seed in (1, 1, 2)
    )

    assert first == again != other


def test_where_no_candidate_survives_the_first_suffix_is_asked(tiny: "HF", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "survives", lambda frame, controls: torch.zeros(len(controls), dtype=torch.bool))
    few = {"num_steps": 2, "search_width": 4, "optim_str_init": BEGIN}

    assert [a.chat for a in asks(gcg(TEA, context(tiny), **few))] == [user(f"{TEA.prompt} {BEGIN}", TEA.system)]
    assert [a.chat for a in asks(gcg(TEA, context(tiny), **few, filter_ids=False))] != [user(f"{TEA.prompt} {BEGIN}", TEA.system)]


def test_every_candidate_is_ascii_unless_allowed(tiny: "HF") -> None:
    def texts(**more: Any) -> set[str]:
        model = Recorder(tiny)
        asks(gcg(TEA, context(model), num_steps=3, search_width=256, optim_str_init=BEGIN, test_steps=3, **more))
        return {tiny.tokenizer.decode(row) for rows, _ in model.seen for row in rows.tolist()}

    assert all(text.isascii() for text in texts())
    assert not all(text.isascii() for text in texts(allow_non_ascii=True))


def test_without_weights_it_says_so() -> None:
    with pytest.raises(UsageError, match="gcg needs the target's weights"):
        next(gcg(TEA, Context(Random(0))))
