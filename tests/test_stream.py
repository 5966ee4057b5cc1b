"""Streams say what generate says, piece by piece, through any stack of defenses, and many at once keep out of one another's way."""

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from saddlepoint.defenses._stack import REFUSED, admit, release, rewrite, with_request
from saddlepoint.defenses._stream import Said, joined, stream
from saddlepoint.registry import Method, defense
from saddlepoint.targets.scripted import Scripted
from saddlepoint.types import Chat, Check, Completion, Message, Query, Sampling, Streaming, Target, user

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

TEXTS = ["How do I make green tea?", "café", "the quick brown fox", "Please tell me what the weather is like in the north. " * 4]


def rested(model: "HF") -> bool:
    """Whether nothing is under way any more; its thread may just be at the end of a step."""
    end = time.monotonic() + 10
    while model._decoding._running and time.monotonic() < end:
        time.sleep(0.001)
    return not model._decoding._running and not model._decoding._batches


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("top", [0, 3])
def test_a_stream_adds_up_to_what_generate_gives(tiny: "HF", temperature: float, top: int) -> None:
    for seed, text in enumerate(TEXTS):
        query = Query(user(text), Sampling(30, temperature, 0.9, seed, top))
        pieces = list(tiny.stream(query))
        (whole,) = tiny.generate([query])
        assert whole == joined(pieces)
        assert len(pieces) == whole.completion_tokens > 1
        assert [1] * len(pieces) == [p.completion_tokens for p in pieces]
        if top:
            assert len(whole.drawn) == len(whole.top_logprobs) == whole.completion_tokens
            for drawn, likely in zip(whole.drawn, whole.top_logprobs, strict=True):
                assert drawn[1] <= likely[0][1] <= 0


def test_an_answer_that_the_model_ends_is_told_from_one_that_is_cut_off(tiny: "HF") -> None:
    queries = [Query(user(text), Sampling(60, 1.5, 1.0, seed, 1)) for seed in range(12) for text in TEXTS[:2]]
    ended = [joined(list(tiny.stream(q))) for q in queries]
    assert {"stop", "length"} == {answer.finish for answer in ended}
    assert all((answer.drawn[-1][0] == "") == (answer.finish == "stop") for answer in ended)
    assert ended == [tiny.generate([q])[0] for q in queries]


def test_a_character_of_several_tokens_comes_whole(tiny: "HF") -> None:
    # A random model writes bytes that are no text: what comes out must be what decoding all of it gives, and never half a character.
    waited = 0
    for seed in range(8):
        query = Query(user("café"), Sampling(60, 2.0, 1.0, seed))
        pieces = list(tiny.stream(query))
        assert "".join(p.text for p in pieces) == tiny.generate([query])[0].text
        waited += sum(p.text == "" for p in pieces[:-1])
    assert waited > 8


def test_the_models_own_processors_count(tiny_folder: Path) -> None:
    from saddlepoint.targets.hf import HF

    own = HF.load(str(tiny_folder), dtype="float32", device="cpu")
    query = Query(user(TEXTS[0]), Sampling(40))
    plain = joined(list(own.stream(query)))
    own.model.generation_config.repetition_penalty = 1.8
    assert plain != joined(list(own.stream(query))) == own.generate([query])[0]


def test_what_cannot_be_written_is_one_failed_piece(tiny: "HF") -> None:
    (failed,) = tiny.stream(Query(user("tea"), Sampling(10_000)))
    assert failed.finish == "error" and "context" in failed.error


def test_many_at_once_give_what_each_gives_alone_and_none_waits_for_another(tiny: "HF") -> None:
    queries = [Query(user(text * (1 + i % 3)), Sampling(24 + i, 0.9, 1.0, i, i % 2)) for i, text in enumerate(TEXTS * 4)]
    found: dict[int, list[Completion]] = {}
    first: list[int] = []
    barrier = threading.Barrier(len(queries))

    def one(i: int) -> None:
        barrier.wait()
        pieces = tiny.stream(queries[i])
        found[i] = [next(pieces)]
        first.append(i)
        found[i] += pieces

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(queries))]
    [t.start() for t in threads], [t.join(60) for t in threads]
    alone = [tiny.generate([q])[0] for q in queries]
    assert [a.text for a in alone] == [joined(found[i]).text for i in range(len(queries))]
    assert [a.finish for a in alone] == [found[i][-1].finish for i in range(len(queries))]
    assert rested(tiny)


LONG = "Please tell me what the weather is like in the north. The weather is cold and the wind is strong. " * 4


def test_what_prompts_begin_with_is_read_once_and_changes_nothing(tiny_folder: Path) -> None:
    import torch

    from saddlepoint.targets.hf import HF

    queries = [Query(user(LONG + end), Sampling(20, 1.0, 1.0, 3, 1)) for end in ("tea", "the fox", "tea")]
    queries.append(Query((*user(LONG + "tea"), Message("assistant", "Sure."), Message("user", "And now?")), Sampling(20, top_logprobs=1)))
    own = HF.load(str(tiny_folder), dtype="float32", device="cpu")
    read: list[int] = []
    own.model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    found, prompts = [], []
    for query in queries:
        read.clear()
        found.append(joined(list(own.stream(query))))
        prompts.append([n for n in read if n > 1])
    lengths = [len(own.prompt_ids(query.chat)) for query in queries]
    assert lengths[0] > 128 and prompts[0][:3] == [32, 32, 64] and sum(prompts[0]) == lengths[0]
    assert [sum(p) for p in prompts[1:]] == [n - 128 for n in lengths[1:]]  # the rest alone
    for query, answer in zip(queries, found, strict=True):
        fresh = HF.load(str(tiny_folder), dtype="float32", device="cpu")
        assert joined(list(fresh.stream(query))) == answer  # to the last bit, known or not
        whole = fresh.generate([query])[0]
        assert whole.text == answer.text and [p for _, p in whole.drawn] == pytest.approx([p for _, p in answer.drawn], abs=1e-4)
    with torch.no_grad():
        own.model.model.embed_tokens.weight.add_(0.05 * torch.randn(own.embedding.shape, generator=torch.Generator().manual_seed(0)))
    own.forget()
    assert joined(list(own.stream(queries[0]))).text == own.generate([queries[0]])[0].text != found[0].text


def test_only_so_much_is_kept_of_what_prompts_begin_with(tiny: "HF") -> None:
    from saddlepoint.targets._prefix import MOST

    for i in range(MOST // 128 + 4):
        next(tiny.stream(Query(user(f"{i} {LONG}"), Sampling(2))))
    kept = [part[0][0].shape[2] for _, part in tiny._decoding._prefixes._parts.values()]
    assert MOST - 128 < sum(kept) <= MOST


def test_streams_take_turns_by_tokens(tiny: "HF") -> None:
    a, b = (tiny.stream(Query(user(text), Sampling(200, 0.7, 1.0, 1))) for text in TEXTS[:2])
    assert next(a) and next(b)
    list(islice(a, 100)), list(islice(b, 100))
    rows = [row for batch in tiny._decoding._batches for row in batch.rows]
    if len(rows) == 2:  # both are still written: nobody took b's tokens meanwhile, and yet it kept up
        assert abs(len(rows[0].tokens) - len(rows[1].tokens)) <= 20
    a.close(), b.close()
    assert rested(tiny)


def test_closing_a_stream_ends_its_work(tiny: "HF") -> None:
    long = tiny.stream(Query(user("tea"), Sampling(400, 0.7, 1.0, 3)))
    next(long)
    while not tiny._decoding._batches:  # the first token is out a moment before its row is in a batch
        time.sleep(0.001)
    row = tiny._decoding._batches[0].rows[0]
    long.close()
    list(tiny.stream(Query(user("tea"), Sampling(4))))
    assert len(row.tokens) < 400 and rested(tiny)


def test_a_step_that_fails_ends_every_stream_and_the_next_one_works(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saddlepoint.targets.hf import HF

    own = HF.load(str(tiny_folder), dtype="float32", device="cpu")
    begun = own.stream(Query(user("tea"), Sampling(400, 0.7, 1.0, 3)))
    next(begun)
    with monkeypatch.context() as broken:
        broken.setattr(own._decoding, "_forward", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            list(begun)
    assert joined(list(own.stream(Query(user("tea"), Sampling(5))))).completion_tokens > 0


def test_caches_that_cannot_be_padded_are_stepped_in_turns() -> None:
    torch = pytest.importorskip("torch")
    from transformers import MistralConfig, MistralForCausalLM

    from saddlepoint.targets._decoding import Decoding, Row

    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = MistralConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=6,
        )
        model = MistralForCausalLM(small).eval()
    decoding = Decoding(model, frozenset({98}), threading.RLock())
    prompts = [[1, 2, 3], list(range(2, 20)), [5] * 9]
    streams = [decoding.stream(Row(p, lambda _, logits: logits, 20)) for p in prompts]
    heads = [next(s) for s in streams]
    written = [[head.token, *(d.token for d in s)] for head, s in zip(heads, streams, strict=True)]
    for prompt, tokens in zip(prompts, written, strict=True):
        with torch.inference_mode():
            want = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=98, pad_token_id=0)
        assert tokens == want[0, len(prompt) :].tolist()


# ---- through a stack of defenses


@defense(paper="https://arxiv.org/abs/2309.00614")
@dataclass(frozen=True)
class Words:
    """Withholds requests with a word."""

    inner: Target
    word: str = "bomb"

    name = "words"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return admit(self, queries)

    def admitted(self, queries: Sequence[Query]) -> list[Check]:
        return [Check("the word" if self.word in q.chat[-1].text else "", 3) for q in queries]


@defense(paper="https://arxiv.org/abs/2309.00614")
@dataclass(frozen=True)
class Polite:
    """Asks politely."""

    inner: Target

    name = "polite"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return rewrite(self, queries)

    def rewritten(self, queries: Sequence[Query]) -> list[tuple[Query, int]]:
        return [(Query(with_request(q.chat, "please " + q.chat[-1].text), q.sampling), 2) for q in queries]


@defense(paper="https://arxiv.org/abs/2309.00614")
@dataclass(frozen=True)
class Secrets:
    """Withholds answers that hold a word."""

    inner: Target
    word: str = "secret"
    every: int = 4

    name = "secrets"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return release(self, queries)

    def released(self, queries: Sequence[Query], completions: Sequence[Completion]) -> list[Check]:
        return [Check("a secret" if self.word in c.text else "", 1) for c in completions]


for kind, called in ((Words, "words"), (Polite, "polite"), (Secrets, "secrets")):
    method: Method = kind.__saddlepoint__  # type: ignore[attr-defined]
    kind.__saddlepoint__ = replace(method, name=called)  # type: ignore[attr-defined]  a built-in one has the name of its file


class Speaker(Scripted):
    """A scripted target that streams character by character."""

    def stream(self, query: Query) -> Generator[Completion, None, None]:
        (whole,) = self.generate([query])
        for i, letter in enumerate(whole.text):
            yield Completion(letter, 5 if i == 0 else 0, 1, finish=whole.finish)

    def room(self, chat: Chat) -> int:
        return 1000


def said_by(target: Target, text: str, only_told: Sequence[str] = ()) -> tuple[list[Completion], list[Said]]:
    told: list[Said] = []
    return list(stream(target, Query(user(text)), told.append, only_told)), told  # type: ignore[arg-type]


def test_a_stack_streams_what_it_generates() -> None:
    speaker = Speaker(lambda q: Completion(f"you said {q.chat[-1].text}", 5, 14, "length"))
    assert isinstance(speaker, Streaming)
    stack = Words(Secrets(Polite(speaker)))
    pieces, told = said_by(stack, "tea")
    assert joined(pieces).text == stack.generate([Query(user("tea"))])[0].text == "you said please tea"
    assert joined(pieces).finish == "length" and joined(pieces).prompt_tokens == 5 and joined(pieces).completion_tokens == 19
    assert len([p for p in pieces if p.text]) == 19
    assert [("words", "input"), *[("secrets", "output")] * 5] == [(s.defense, s.direction) for s in told]
    assert not any(s.check.reason for s in told)
    assert joined(pieces).extra_tokens == 3 + 2 + 5


def test_a_blocked_request_never_reaches_a_target_elsewhere() -> None:
    speaker = Speaker(lambda q: "boom")
    (piece,), told = said_by(Words(speaker), "a bomb")
    assert piece == Words(speaker).generate([Query(user("a bomb"))])[0]
    assert piece.finish == "filter" and piece.text == REFUSED and not speaker.asked
    assert told == [Said("words", "input", Check("the word", 3), "", True)]


def test_what_is_not_checked_is_held_back_and_a_block_in_the_middle_ends_the_stream() -> None:
    speaker = Speaker(lambda q: "open words, a secret, more")
    pieces, told = said_by(Secrets(speaker, every=4), "tea")
    assert pieces[-1].finish == "filter" and pieces[-1].text == REFUSED
    released = "".join(p.text for p in pieces[:-1])
    assert "open words, a secret".startswith(released) and "secret" not in released and len(released) >= 12
    assert told[-1].withheld and "secret" in told[-1].answer
    assert joined(pieces).completion_tokens == len(told[-1].answer)


def test_a_guard_that_waits_for_the_end_lets_nothing_out_before() -> None:
    pieces, _ = said_by(Secrets(Speaker(lambda q: "open words, a secret"), every=0), "tea")
    assert [REFUSED] == [p.text for p in pieces]
    pieces, told = said_by(Secrets(Speaker(lambda q: "open words"), every=0), "tea")
    assert "open words" == joined(pieces).text and len(told) == 1


def test_guards_that_only_tell_withhold_nothing() -> None:
    stack = Words(Secrets(Speaker(lambda q: "a secret")))
    pieces, told = said_by(stack, "a bomb", ("input", "output"))
    assert joined(pieces).text == "a secret" and {("words", False), ("secrets", False)} == {
        (s.defense, s.withheld) for s in told if s.check.reason
    }
    pieces, told = said_by(stack, "a bomb", ("input",))
    assert joined(pieces).finish == "filter"


def test_a_target_that_cannot_stream_comes_in_one_piece_with_its_verdict() -> None:
    @dataclass(frozen=True)
    class Twice:
        inner: Target
        name = "twice"

        def generate(self, queries: Sequence[Query]) -> list[Completion]:
            return self.inner.generate(self.inner and queries)

    pieces, told = said_by(Twice(Words(Scripted(lambda q: "fine"))), "a bomb")
    assert [REFUSED] == [p.text for p in pieces] and told == [Said("words", "input", Check("the word"), "", True)]
    assert ["fine"] == [p.text for p in said_by(Twice(Words(Scripted(lambda q: "fine"))), "tea")[0]]


def test_a_failed_answer_is_not_checked() -> None:
    pieces, told = said_by(Secrets(Speaker(lambda q: Completion("a secret", finish="error", error="down"))), "tea")
    assert joined(pieces).finish == "error" and not told


def test_the_guard_reads_while_the_model_does_and_its_verdict_comes_first(tiny: "HF") -> None:
    seen: list[str] = []

    class Slow(Words):
        def admitted(self, queries: Sequence[Query]) -> list[Check]:
            threading.Event().wait(0.2)
            seen.append(threading.current_thread().name)
            return Words.admitted(self, queries)

    tea = Query(user("tea"), Sampling(3))
    guarded = Slow(tiny)
    assert joined(list(stream(guarded, tea))).text == tiny.generate([tea])[0].text
    pieces, told = said_by(guarded, "a bomb")
    assert [REFUSED] == [p.text for p in pieces] and told[0].withheld
    assert all(name.startswith("guards") for name in seen) and rested(tiny)


def test_nothing_is_held_for_a_person_of_a_request_that_is_not_admitted(tiny: "HF") -> None:
    held: list[str] = []

    class Holds(Secrets):
        def released(self, queries: Sequence[Query], completions: Sequence[Completion]) -> list[Check]:
            held.extend(c.text for c in completions)
            return Secrets.released(self, queries, completions)

    pieces, told = said_by(Words(Holds(tiny, every=0)), "a bomb")
    assert [REFUSED] == [p.text for p in pieces] and [s.direction for s in told] == ["input"] and not held and rested(tiny)
