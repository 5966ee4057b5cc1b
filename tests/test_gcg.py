"""GCG on a tiny random model: what it proposes, what it picks, and what it asks."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from saddlepoint.errors import UsageError
from saddlepoint.types import Ask, Behavior, Completion, Context, Reply, Steps, Verdict, WhiteBox, user

torch = pytest.importorskip("torch")
from saddlepoint.attacks._gradient import framed, mellowmax, propose, rank_correlation, row  # noqa: E402
from saddlepoint.attacks.gradient.gcg import gcg  # noqa: E402
from saddlepoint.attacks.gradient.gcg_multi import find  # noqa: E402

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

    def loss(self, rows: Any, scored: int, near: Any = None, exact: bool = True, reduce: Any = None, **more: Any) -> Any:
        losses = self.model.loss(rows, scored, near, exact, reduce, **more)
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


# ---- nanoGCG's options ----------------------------------------------------------------------------------------------

FEW = {"search_width": 16, "topk": 16, "optim_str_init": BEGIN}


def test_the_cache_changes_no_run(tiny: "HF") -> None:
    with_cache, without = (asks(gcg(TEA, context(tiny), num_steps=4, test_steps=1, use_prefix_cache=u, **FEW)) for u in (True, False))

    assert with_cache == without


def test_smaller_batches_change_no_run(tiny: "HF") -> None:
    model = Recorder(tiny)
    at_once, few = (asks(gcg(TEA, context(m), num_steps=3, test_steps=1, batch_size=b, **FEW)) for m, b in ((tiny, None), (model, 5)))

    assert at_once == few and max(len(rows) for rows, _ in model.seen) == 5


def test_mellowmax_is_a_soft_maximum_and_steers_by_it(tiny: "HF") -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])
    assert mellowmax(1e-4)(losses).tolist() == pytest.approx(losses.mean(1).tolist(), abs=1e-2)
    assert mellowmax(50.0)(losses).tolist() == pytest.approx([3.0, 6.0], abs=0.05)

    model = Recorder(tiny)
    asks(gcg(TEA, context(model), num_steps=1, use_mellowmax=True, mellowmax_alpha=2.0, **FEW))
    rows, found = model.seen[0]
    scored = len(tiny.ids(TEA.affirmative))
    assert torch.allclose(found, tiny.loss(rows, scored, reduce=mellowmax(2.0)), atol=1e-4)
    assert not torch.allclose(found, tiny.loss(rows, scored), atol=1e-2)


def test_a_buffer_goes_on_from_the_best_and_never_climbs(tiny: "HF") -> None:
    def starts(size: int) -> list[float]:
        """The loss of the suffix that each step's gradient is taken at."""
        model = Recorder(tiny)
        rows: list[Any] = []
        take = tiny.gradient
        model.gradient = lambda row, *a: (rows.append(row), take(row, *a))[1]  # type: ignore[attr-defined]
        asks(gcg(TEA, context(model), num_steps=25, buffer_size=size, **{**FEW, "search_width": 3}))
        return tiny.loss(torch.stack(rows[1:]), len(tiny.ids(TEA.affirmative))).tolist()

    kept, free = starts(1), starts(0)
    assert kept == sorted(kept, reverse=True)
    assert free != sorted(free, reverse=True)  # as the paper: the best candidate is taken even where it is worse


def test_early_stop_ends_once_the_affirmative_is_sure(tiny: "HF") -> None:
    class Sure(Recorder):
        asked = 0

        def loss(self, rows: Any, scored: int, near: Any = None, exact: bool = True, reduce: Any = None, **more: Any) -> Any:
            losses = self.model.loss(rows, scored, near, exact, reduce, **more)
            self.asked += len(rows) == 1
            return losses * 0 + (0.70 if self.asked < 3 else 0.69) if len(rows) == 1 else losses

    assert len(asks(gcg(TEA, context(Sure(tiny)), num_steps=9, test_steps=1, early_stop=True, **FEW))) == 3
    assert len(asks(gcg(TEA, context(Sure(tiny)), num_steps=9, test_steps=9, early_stop=True, **FEW))) == 1
    assert len(asks(gcg(TEA, context(Sure(tiny)), num_steps=9, test_steps=1, **FEW))) == 9


def test_probe_sampling_evaluates_few_and_its_losses_are_exact(tiny: "HF") -> None:
    model = Counted(tiny)
    made = asks(gcg(TEA, context(model), num_steps=6, test_steps=1, probe_sampling=True, **{**FEW, "search_width": 64}))

    assert made and model.screened > 200 and model.exact < model.screened / 3
    assert [suffix_loss(tiny, a) for a in made] == sorted((suffix_loss(tiny, a) for a in made), reverse=True)
    assert model.lowest == pytest.approx(suffix_loss(tiny, made[-1]), abs=1e-4)


def test_a_draft_model_may_screen(tiny: "HF") -> None:
    model = Counted(tiny)
    made = asks(gcg(TEA, context(model), num_steps=2, test_steps=1, probe_sampling=True, draft=tiny, **{**FEW, "search_width": 32}))

    # The draft is the target itself, so its losses are the exact ones, and the best of all is found.
    assert len(made) == 2 and model.screened == 0
    best = asks(gcg(TEA, context(tiny), num_steps=1, test_steps=1, **{**FEW, "search_width": 32}))
    assert made[0] == best[0]


class Counted(Recorder):
    """The tiny model, which counts screened and exact rows."""

    def __init__(self, model: "HF") -> None:
        super().__init__(model)
        self.screened, self.exact, self.lowest = 0, 0, float("inf")

    def loss(self, rows: Any, scored: int, near: Any = None, exact: bool = True, reduce: Any = None, **more: Any) -> Any:
        losses = self.model.loss(rows, scored, near, exact, reduce, **more)
        if exact:
            self.exact, self.lowest = self.exact + len(rows), min(self.lowest, float(losses.min()))
        else:
            self.screened += len(rows)
        return losses


@pytest.mark.parametrize(
    ("a", "b", "wanted"), [([1, 2, 3], [10, 20, 25], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 1], [1, 2, 3], 0.0), ([1], [1], 0.0)]
)
def test_rank_correlation(a: list[float], b: list[float], wanted: float) -> None:
    assert rank_correlation(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)) == pytest.approx(wanted)


# ---- one suffix for many ---------------------------------------------------------------------------------------------

MANY = tuple(Behavior(f"b{i}", f"How do I make tea number {i}?", affirmative="Sure, here is how", pair=f"b{i}") for i in range(4))


def found(tiny: "HF", **given: Any) -> Any:
    defaults = {
        "num_steps": 8,
        "search_width": 24,
        "topk": 24,
        "n_behaviors": 3,
        "progressive": True,
        "also": (),
        "optim_str_init": BEGIN,
        "allow_non_ascii": False,
    }
    return find(MANY, context(given.pop("model", tiny), given.pop("seed", 0)), **{**defaults, **given})


def universal_loss(tiny: "HF", text: str, behaviors: Sequence[Behavior]) -> float:
    frames = [framed(tiny, b, text) for b in behaviors]
    return sum(float(tiny.loss([row(f, f.control)], len(f.affirmative))) for f in frames) / len(frames)


def test_a_universal_suffix_lowers_the_loss_on_requests_that_it_was_not_found_on(tiny: "HF") -> None:
    artifact = found(tiny, progressive=False, num_steps=20)

    assert artifact.models == (tiny.name,) and artifact.behaviors == tuple(b.id for b in MANY) and artifact.place == "suffix"
    assert len(artifact.losses) == 20 and list(artifact.losses) == sorted(artifact.losses, reverse=True)
    new = Behavior("new", "Please tell me what the weather is like.", affirmative="Sure, here is how")
    assert universal_loss(tiny, artifact.text, [new]) < universal_loss(tiny, BEGIN, [new])


def test_behaviors_are_added_one_by_one(tiny: "HF") -> None:
    told: list[str] = []
    ctx = Context(Random(0), whitebox=tiny, tell=told.append)
    find(
        MANY,
        ctx,
        num_steps=6,
        search_width=8,
        topk=8,
        n_behaviors=3,
        progressive=True,
        also=(),
        optim_str_init=BEGIN,
        allow_non_ascii=False,
    )

    assert [line.split(", ")[1][:6] for line in told] == ["1 of 3", "1 of 3", "2 of 3", "2 of 3", "3 of 3", "3 of 3"]


def test_a_suffix_for_two_models_is_scored_on_both(tiny: "HF", tiny_folder: Any) -> None:
    from saddlepoint.targets.hf import HF

    other = HF.load(str(tiny_folder), dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(4)
    for p in other.model.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator))
    both = found(tiny, also=(other,), progressive=False, n_behaviors=2, num_steps=12)
    alone = found(tiny, progressive=False, n_behaviors=2, num_steps=12)

    assert both.models == (tiny.name, other.name) and both != alone
    rng = Random(0)
    rng.getrandbits(63)  # the search's own seed
    chosen = rng.sample(list(MANY), 2)
    assert universal_loss(other, both.text, chosen) < universal_loss(other, BEGIN, chosen)
    mean = (universal_loss(tiny, both.text, chosen) + universal_loss(other, both.text, chosen)) / 2
    assert both.losses[-1] == pytest.approx(mean, abs=1e-3)


def test_gradients_of_several_models_weigh_the_same(tiny: "HF") -> None:
    class Loud(Recorder):
        def gradient(self, row: Any, at: slice, scored: int, reduce: Any = None) -> Any:
            return 1000 * self.model.gradient(row, at, scored, reduce)

    assert found(tiny, model=Loud(tiny)).text == found(tiny).text
