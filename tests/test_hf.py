"""A Hugging Face target, held against plain forward passes of the same tiny random model."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scipy.stats import chisquare

from saddlepoint.errors import ModelError, UsageError
from saddlepoint.types import Chat, Message, Query, Sampling, WhiteBox, user

torch = pytest.importorskip("torch")
F = torch.nn.functional
if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

TEA = user("How do I make green tea?")
WORDS = [
    "the",
    "weather",
    "is",
    "cold",
    "and",
    "the",
    "wind",
    "is",
    "strong",
    "in",
    "the",
    "north,",
    "so",
    "take",
    "the",
    "leaves",
    "and",
    "the",
    "water",
]
CHATS = [user(" ".join(WORDS[: 1 + i % len(WORDS)]), "You are a helpful assistant." * (i % 3 == 0)) for i in range(12)]
TALK: Chat = (
    Message("system", "Answer in one short paragraph."),
    Message("user", "Please tell me."),
    Message("assistant", "Sure."),
    Message("user", "How do I make tea?"),
)


def logits(model: "HF", ids: list[int]) -> Any:
    """float32 (length, vocabulary), by one plain forward pass."""
    return model.model(input_ids=torch.tensor([ids])).logits[0].float()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- answering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at_once", [8192, 50])
def test_a_batch_answers_as_one_by_one_and_in_order(tiny: "HF", monkeypatch: pytest.MonkeyPatch, temperature: float, at_once: int) -> None:
    queries = [Query(c, Sampling(4 + 3 * (i % 3), temperature, seed=i, top_p=0.9)) for i, c in enumerate(CHATS)]
    alone = [tiny.generate([q])[0] for q in queries]
    monkeypatch.setattr("saddlepoint.targets.hf._TOKENS_AT_ONCE", at_once)

    assert tiny.generate(queries) == alone
    assert tiny.generate(queries[::-1]) == alone[::-1]
    assert len({c.text for c in alone}) == len(alone)


def test_more_queries_than_fit_one_batch_are_all_answered(tiny: "HF") -> None:
    queries = [Query(TEA, Sampling(2, 1.0, seed=i)) for i in range(150)]

    assert tiny.generate(queries)[::-1] == tiny.generate(queries[::-1])


def test_a_greedy_answer_is_the_likeliest_token_each_time(tiny: "HF") -> None:
    (answer,) = tiny.generate([Query(TEA, Sampling(8))])
    ids = tiny.prompt_ids(TEA)
    for _ in range(8):
        ids.append(int(logits(tiny, ids)[-1].argmax()))

    assert answer.text == tiny.tokenizer.decode(ids[-8:], skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish) == (len(ids) - 8, 8, "length")


def test_the_seed_decides_a_sample_and_nothing_of_a_greedy_answer(tiny: "HF") -> None:
    samples = [tiny.generate([Query(TEA, Sampling(12, 1.0, seed=s))])[0].text for s in (0, 1, 2, 0)]
    greedy = [tiny.generate([Query(TEA, Sampling(12, 0.0, seed=s))])[0].text for s in (0, 1)]

    assert len(set(samples)) == 3 and samples[0] == samples[3]
    assert greedy[0] == greedy[1]


def test_an_answer_ends_at_its_end_token_or_at_max_tokens(tiny: "HF") -> None:
    answers = tiny.generate([Query(TEA, Sampling(40, 1.5, seed=s, top_logprobs=1)) for s in range(128)])

    assert {a.finish for a in answers} == {"stop", "length"}
    for answer in answers:
        assert "<|im_end|>" not in answer.text and answer.prompt_tokens == len(tiny.prompt_ids(TEA))
        assert len(answer.top_logprobs) == answer.completion_tokens <= 40
        assert answer.completion_tokens == 40 or answer.finish == "stop"


def test_top_logprobs_are_those_of_a_plain_forward_pass(tiny: "HF") -> None:
    others = [Query(c, Sampling(6, 1.0, seed=3, top_logprobs=k)) for k, c in enumerate(CHATS[:4])]
    answer, *rest = tiny.generate([Query(TEA, Sampling(6, top_logprobs=5)), *others])
    ids = tiny.prompt_ids(TEA)

    assert len(answer.top_logprobs) == 6
    for step in answer.top_logprobs:
        best = logits(tiny, ids)[-1].log_softmax(-1).topk(5)
        assert [text for text, _ in step] == [tiny.tokenizer.decode([t]) for t in best.indices.tolist()]
        assert [value for _, value in step] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids.append(int(best.indices[0]))
    assert [{len(step) for step in r.top_logprobs} for r in rest] == [set(), {1}, {2}, {3}]


@pytest.mark.parametrize("prefill", ["Sure, here is", "To make green tea, pour", "Sure, {here}\nis:"])
def test_a_prefill_is_gone_on_from_and_is_no_part_of_the_answer(tiny: "HF", prefill: str) -> None:
    chat = user("How do I make green tea?", "You are a helpful assistant.", prefill)
    ids, begun = tiny.prompt_ids(chat), tiny.prompt_ids(chat[:-1])
    (answer,) = tiny.generate([Query(chat, Sampling(4))])
    (goes_on,) = tiny.generate([Query(chat, Sampling(1, top_logprobs=1))])

    assert ids == begun + tiny.ids(prefill)
    assert tiny.render(chat).endswith(f"<|im_start|>assistant\n{prefill}")
    assert not answer.text.startswith(prefill) and answer.prompt_tokens == len(ids)
    assert goes_on.top_logprobs[0][0][0] == tiny.tokenizer.decode([int(logits(tiny, ids)[-1].argmax())])


def test_what_cannot_be_answered_is_an_error_and_the_others_are_answered(tiny: "HF") -> None:
    long, broken = user("the weather " * 400), user("half a character: \ud800")
    queries = [Query(TEA, Sampling(4)), Query(long, Sampling(4)), Query(broken, Sampling(4)), Query(CHATS[1], Sampling(4))]
    first, full, unreadable, last = tiny.generate(queries)

    assert full.finish == unreadable.finish == "error" and not full.text and not unreadable.text
    assert "context of 512 is full" in full.error and full.prompt_tokens == len(tiny.prompt_ids(long))
    assert "cannot be written as tokens" in unreadable.error
    assert [first, last] == tiny.generate([queries[0], queries[3]])


def test_the_context_may_be_filled_to_its_last_token(tiny: "HF") -> None:
    room = 512 - len(tiny.prompt_ids(TEA))

    assert [a.finish for a in tiny.generate([Query(TEA, Sampling(room + 1))])] == ["error"]
    assert tiny.generate([Query(TEA, Sampling(room))])[0].finish != "error"


def test_nothing_asked_is_nothing_answered(tiny: "HF") -> None:
    assert tiny.generate([]) == [] and tiny.logprobs([]) == []


def test_threads_get_the_answers_that_they_asked_for(tiny: "HF") -> None:
    queries = [Query(c, Sampling(4, 1.0, seed=i)) for i, c in enumerate(CHATS)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda q: tiny.generate([q])[0], queries))

    assert answers == tiny.generate(queries)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5)])
def test_samples_follow_the_distribution(tiny: "HF", temperature: float, top_p: float) -> None:
    answers = tiny.generate([Query(TEA, Sampling(1, temperature, top_p, seed=s)) for s in range(1000)])
    likely = (logits(tiny, tiny.prompt_ids(TEA))[-1] / temperature).softmax(-1).sort(descending=True)
    texts = [tiny.tokenizer.decode([t], skip_special_tokens=True) for t in likely.indices.tolist()]
    chances, before = likely.values.tolist(), 0.0
    expected: Counter[str] = Counter()
    for text, chance in zip(texts, chances, strict=True):
        if before < top_p:  # the nucleus: the fewest tokens that hold top_p
            expected[text] += chance
        before += chance
    seen = Counter(a.text for a in answers)
    assert set(seen) <= set(expected)
    total = sum(expected.values())
    common = [t for t, chance in expected.items() if chance / total * len(answers) >= 10]
    rare = set(expected) - set(common)
    counts = [seen[t] for t in common] + [sum(seen[t] for t in rare)] * bool(rare)
    shares = [expected[t] / total for t in common] + [sum(expected[t] / total for t in rare)] * bool(rare)

    assert len(common) >= 5
    assert chisquare(counts, [s / sum(shares) * len(answers) for s in shares]).pvalue > 1e-4


# ---- text and tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chat", [TEA, TALK, user("Please {tell} me", "You are a helpful assistant."), (*TALK, Message("assistant", "Sure"))]
)
@pytest.mark.parametrize("control", ["! ! ! !", "take the leaves", "x"])
def test_a_frame_is_the_whole_prompt_cut_at_the_control(tiny: "HF", chat: Chat, control: str) -> None:
    frame = tiny.frame(chat, control, ", here is")
    last = max(i for i, m in enumerate(chat) if m.role == "user")
    whole = (*chat[:last], replace(chat[last], text=f"{chat[last].text} {control}"), *chat[last + 1 :])

    assert torch.cat([frame.before, frame.control, frame.after]).tolist() == tiny.prompt_ids(whole)
    assert torch.cat([frame.before, frame.control, frame.after, frame.affirmative]).tolist() == tiny.ids(tiny.render(whole) + ", here is")
    assert tiny.text(frame.control) == f" {control}"


def test_a_control_that_merges_when_read_again_does_not_survive(tiny: "HF") -> None:
    frame = tiny.frame(user("Make te"), "the", "Sure")
    assert len(tiny.ids(" the")) == 1 and len(tiny.ids(" tea")) == 1
    split = tiny.ids(" t") + tiny.ids("he")  # reads " the", which is one token
    inside = tiny.frame(user("Make te"), "a", "Sure")

    assert tiny.survives(frame, frame.control[None]).tolist() == [True]
    assert tiny.survives(frame, torch.tensor([split, tiny.ids(" the the")])).tolist() == [False, True]
    # By itself "a" reads as it was written, but not after "te".
    assert tiny.survives(inside, torch.tensor([tiny.ids("a"), tiny.ids(" a")])).tolist() == [False, True]


def test_candidates_are_what_can_be_written_and_read(tiny: "HF") -> None:
    ascii_only, any_script = tiny.candidates(ascii_only=True), tiny.candidates(ascii_only=False)
    texts = {token: tiny.tokenizer.decode([token]) for token in range(len(tiny.embedding))}
    accents = [token for token, text in texts.items() if "é" in text]
    for token in (*tiny.tokenizer.all_special_ids, *tiny.ids("\n"), tiny.ids("\u8336")[0]):  # the last is one byte of three
        assert not ascii_only[token] and not any_script[token]

    assert ascii_only.shape == (len(tiny.embedding),) and ascii_only.dtype == torch.bool
    assert accents and any_script[accents].all() and not ascii_only[accents].any()
    assert any_script[ascii_only].all() and ascii_only[tiny.ids(" the")[0]]
    assert all(texts[t].isascii() and texts[t].isprintable() for t in ascii_only.nonzero().flatten().tolist())


def test_what_a_caller_allows_itself_is_allowed_to_no_other(tiny: "HF") -> None:
    before = tiny.candidates(True)
    tiny.candidates(True)[:] = True

    assert tiny.candidates(True).equal(before) and not before.all()


# ---- losses and gradients -------------------------------------------------------------------------------------------

ROWS = [[0, 379, 200, 42, 17 + i, 300, 5 * i + 2, 33, 60, 61 + i] for i in range(5)]


@pytest.mark.parametrize("scored", [9, 3, 1])
def test_loss_is_the_cross_entropy_of_a_full_forward_pass(tiny: "HF", monkeypatch: pytest.MonkeyPatch, scored: int) -> None:
    rows = torch.tensor(ROWS)
    nll = F.cross_entropy(tiny.model(input_ids=rows).logits.transpose(1, 2)[:, :, :-1], rows[:, 1:], reduction="none")  # (n, length - 1)
    wanted = nll[:, -scored:]
    mixed = [rows[0], rows[1, :-2], rows[2]]  # rows may differ in length

    for at_once in (2048, 25):  # the second takes two rows at a time
        monkeypatch.setattr(tiny, "_tokens_at_once", at_once)
        assert torch.allclose(tiny.loss(rows, scored), wanted.mean(1), atol=1e-4)
        assert torch.allclose(tiny.loss(rows, scored, reduce=lambda x: x.amax(1)), wanted.amax(1), atol=1e-4)
        assert torch.allclose(tiny.loss(rows, scored, near=rows[0]), wanted.mean(1), atol=1e-4)
        if scored < 7:
            assert torch.allclose(tiny.loss(mixed, scored, near=rows[1]), tiny.loss(mixed, scored), atol=1e-4)
            assert float(tiny.loss(mixed, scored)[1]) == pytest.approx(float(nll[1, 7 - scored : 7].mean()), abs=1e-4)


@pytest.mark.parametrize("scored", [0, -1, 10, 11])
def test_scoring_a_token_with_none_before_it_is_an_error(tiny: "HF", scored: int) -> None:
    with pytest.raises(ValueError, match=r"scored must lie in 1\.\.9"):
        tiny.loss(torch.tensor(ROWS), scored)
    with pytest.raises(ValueError, match=r"scored must lie in 1\.\.9"):
        tiny.gradient(torch.tensor(ROWS[0]), slice(1, 2), scored)


def test_logprobs_are_those_of_a_full_forward_pass(tiny: "HF", monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(c, " ".join(WORDS[i:])) for i, c in enumerate(CHATS)] + [((), "The weather is cold."), (TEA, ""), ((), ""), ((), "a")]
    for at_once in (8192, 60):
        monkeypatch.setattr("saddlepoint.targets.hf._TOKENS_AT_ONCE", at_once)
        for (chat, text), found in zip(texts, tiny.logprobs(texts), strict=True):
            prompt, answer = (tiny.ids(tiny.render(chat)) if chat else [tiny.tokenizer.bos_token_id]), tiny.ids(text)
            wanted = logits(tiny, prompt + answer).log_softmax(-1)[range(len(prompt) - 1, len(prompt + answer) - 1), answer]
            assert found.shape == (len(answer),)
            assert torch.allclose(found, wanted, atol=1e-4)


def by_one_hot(model: "HF", row: list[int], at: slice, scored: int) -> Any:
    """The gradient of the loss by an explicit one-hot matrix, (len(at), vocabulary)."""
    with torch.enable_grad():
        hot = F.one_hot(torch.tensor(row), len(model.embedding)).to(model.embedding.dtype).requires_grad_()
        looked_up = model.model.get_input_embeddings()(torch.arange(len(model.embedding)))
        out = model.model(inputs_embeds=(hot @ looked_up)[None]).logits[0]
        loss = F.cross_entropy(out[-scored - 1 : -1], torch.tensor(row[-scored:]))
        return torch.autograd.grad(loss, hot)[0][at]


@pytest.mark.parametrize(("at", "scored"), [(slice(2, 5), 3), (slice(0, 1), 1), (slice(3, 8), 6), (slice(8, 10), 2)])
def test_gradient_is_that_of_an_explicit_one_hot(tiny: "HF", at: slice, scored: int) -> None:
    row = torch.tensor(ROWS[2])
    with torch.enable_grad():
        found = tiny.gradient(row, at, scored)
    wanted = by_one_hot(tiny, ROWS[2], at, scored)

    assert found.shape == (at.stop - at.start, len(tiny.embedding)) and not found.requires_grad
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_gradient_agrees_with_finite_differences(tiny: "HF") -> None:
    at, scored, exact = slice(2, 5), 3, deepcopy(tiny.model).double()
    direction = torch.randn(3, len(tiny.embedding), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        slope = float((tiny.gradient(torch.tensor(ROWS[1]), at, scored).double() * direction).sum())

    def loss(step: float) -> float:
        hot = F.one_hot(torch.tensor(ROWS[1]), len(tiny.embedding)).double()
        hot[at] += step * direction
        out = exact(inputs_embeds=(hot @ exact.get_input_embeddings().weight)[None]).logits[0]
        return float(F.cross_entropy(out[-scored - 1 : -1], torch.tensor(ROWS[1][-scored:])))

    assert (loss(1e-4) - loss(-1e-4)) / 2e-4 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3Text", "Cohere", "Granite"])
def test_losses_hold_for_models_that_scale_or_cap_their_logits(tiny: "HF", family: str) -> None:
    import transformers

    from saddlepoint.targets.hf import HF

    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True, "initializer_range": 0.3}
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    marks: dict[str, Any] = {"Gemma2": {"final_logit_softcapping": 3.0}, "Cohere": {"logit_scale": 0.3}, "Granite": {"logits_scaling": 4.0}}
    config = getattr(transformers, f"{family}Config")(**shape, **special, num_key_value_heads=2, **marks.get(family, {}))
    torch.manual_seed(0)
    model = HF(family, getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config), tiny.tokenizer)
    rows, at, scored = torch.tensor(ROWS), slice(2, 5), 3
    nll = F.cross_entropy(model.model(input_ids=rows).logits.transpose(1, 2)[:, :, :-1], rows[:, 1:], reduction="none")
    with torch.enable_grad():
        gradient = model.gradient(rows[0], at, scored)
    wanted = by_one_hot(model, ROWS[0], at, scored)
    ids = model.prompt_ids(TEA) + (answer := model.ids("Sure, here is"))

    for near in (None, rows[2]):
        assert torch.allclose(model.loss(rows, scored, near), nll[:, 6:9].mean(1), atol=1e-4)
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert torch.allclose(
        model.logprobs([(TEA, "Sure, here is")])[0],
        logits(model, ids).log_softmax(-1)[range(len(ids) - len(answer) - 1, len(ids) - 1), answer],
        atol=1e-4,
    )


def test_compute_counts_the_tokens_of_every_pass_and_each_gradient(tiny: "HF") -> None:
    def spent(do: Any) -> tuple[int, int]:
        tokens, gradients = tiny.compute.tokens, tiny.compute.gradients
        with torch.enable_grad():
            do()
        return tiny.compute.tokens - tokens, tiny.compute.gradients - gradients

    short, long = ((), "a"), ((), "The weather is cold.")
    width = 1 + len(tiny.ids(long[1]))
    assert spent(lambda: tiny.loss(torch.tensor(ROWS), 2)) == (50, 0)
    for _ in range(2):  # the count does not depend on what is still known from the call before
        # The near row; of four rows what follows their first change, at place 4; of the near row itself what predicts.
        assert spent(lambda: tiny.loss(torch.tensor(ROWS), 2, near=torch.tensor(ROWS[1]))) == (10 + 4 * 5 + 2, 0)
        assert spent(lambda: tiny.gradient(torch.tensor(ROWS[0]), slice(1, 3), 2)) == (9, 1)
    assert spent(lambda: tiny.logprobs([short, long])) == (2 * width, 0)
    assert spent(lambda: tiny.generate([Query(TEA, Sampling(2))])) == (0, 0)  # the driver counts answers


# ---- opening --------------------------------------------------------------------------------------------------------


def test_it_is_a_white_box_that_shows_its_name(tiny: "HF", tiny_folder: Path) -> None:
    assert isinstance(tiny, WhiteBox)
    assert tiny.name == str(tiny_folder) and repr(tiny) == f"HF('{tiny_folder}')"


def test_weights_that_cannot_be_opened_are_named(tmp_path: Path, tiny: "HF", tiny_folder: Path) -> None:
    from saddlepoint.targets.hf import HF

    (tmp_path / "empty").mkdir()
    plain = deepcopy(tiny.tokenizer)
    plain.chat_template = None
    with pytest.raises(UsageError, match="no dtype 'float8'; allowed: auto"):
        HF.load(str(tiny_folder), dtype="float8")
    with pytest.raises(ModelError, match="there is no folder"):
        HF.load("no/such-model")
    with pytest.raises(ModelError, match="cannot be loaded"):
        HF.load(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no chat template"):
        HF("plain", tiny.model, plain)
