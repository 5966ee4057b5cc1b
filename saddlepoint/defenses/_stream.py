"""An answer through a stack of defenses as it is written: what each kind of defense lets through, and when.

An input guard checks, then the answer streams on; a rewriter rewrites, then it streams on; an output guard holds back what it has
not checked yet. Any other defense, and a target that cannot stream, gives its answer in one piece.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Literal

from saddlepoint.defenses._stack import charged, label, layers, withheld
from saddlepoint.types import Check, Completion, Defense, InputGuard, OutputGuard, Query, Rewriter, Streaming, Target, WhiteBox

Direction = Literal["input", "output"]


@dataclass(frozen=True)
class Said:
    """What one guard of a stack said of a request or of its answer.

    Args:
        defense: The guard's registered name.
        answer: What was to be released, as far as it was there; "" for the input.
        withheld: Whether it was withheld, and not only told.
    """

    defense: str
    direction: Direction
    check: Check
    answer: str
    withheld: bool


def stream(
    target: Target, query: Query, tell: Callable[[Said], None] = lambda _: None, only_told: Sequence[Direction] = ()
) -> Generator[Completion, None, None]:
    """The answer to one query in pieces; `joined` makes of them what `target.generate` gives.

    A withheld answer ends with a piece whose finish is "filter"; its text, the refusal, stands in place of what was not released.

    Args:
        tell: Is told each verdict of a guard; of an output guard the last one counts.
        only_told: Directions in which guards tell their verdict and withhold nothing.
    """
    if isinstance(target, Defense) and sum(isinstance(target, kind) for kind in (InputGuard, Rewriter, OutputGuard)) == 1:
        if isinstance(target, InputGuard):
            yield from _admitted(target, query, tell, only_told)
        elif isinstance(target, Rewriter):
            ((asked, tokens),) = target.rewritten([query])
            yield charged(Completion(""), tokens)
            yield from stream(target.inner, asked, tell, only_told)
        elif isinstance(target, OutputGuard):
            yield from _released(target, query, tell, only_told)
    elif isinstance(target, Streaming):
        yield from target.stream(query)
    else:
        (answer,) = target.generate([query])
        if answer.blocked:
            name, _, reason = answer.blocked.partition(": ")
            inputs = [label(layer) for layer in layers(target) if isinstance(layer, InputGuard)]
            tell(Said(name, "input" if name in inputs else "output", Check(reason), "", True))
        yield answer


def _admitted(
    guard: InputGuard, query: Query, tell: Callable[[Said], None], only_told: Sequence[Direction]
) -> Generator[Completion, None, None]:
    # Where the model is on this machine it reads the request while the guard does, and its first piece waits for the verdict;
    # elsewhere nothing leaves before the verdict. Nor does the model begin where its first piece would cost a whole window or answer,
    # which other models, or a person, would be asked about.
    *between, bare = layers(guard)
    beside = isinstance(bare, WhiteBox) and isinstance(bare, Streaming) and all(isinstance(d, InputGuard | Rewriter) for d in between)
    pending = _aside().submit(guard.admitted, [query]) if beside else None
    with closing(stream(guard.inner, query, tell, only_told)) as inner:
        first = [next(inner)] if beside else []
        (check,) = pending.result() if pending else guard.admitted([query])
        stops = bool(check.reason) and "input" not in only_told
        tell(Said(label(guard), "input", check, "", stops))
        if stops:
            yield withheld(guard, check)
            return
        yield charged(Completion(""), check.tokens)
        yield from chain(first, inner)


def _released(
    guard: OutputGuard, query: Query, tell: Callable[[Said], None], only_told: Sequence[Direction]
) -> Generator[Completion, None, None]:
    held: list[Completion] = []
    whole = Completion("")
    checked, tokens = 0, 0
    with closing(stream(guard.inner, query, tell, only_told)) as inner:
        for piece in inner:
            held.append(piece)
            whole = joined([whole, piece])
            if guard.every and len(whole.text) - checked >= guard.every and piece.finish not in ("error", "filter"):
                (check,) = guard.released([query], [whole])
                checked, tokens = len(whole.text), tokens + check.tokens
                stops = bool(check.reason) and "output" not in only_told
                tell(Said(label(guard), "output", check, whole.text, stops))
                if stops:
                    yield withheld(guard, replace(check, tokens=tokens), joined(held))
                    return
                yield from held
                held = []
    if whole.finish not in ("error", "filter") and (len(whole.text) > checked or not checked):
        (check,) = guard.released([query], [whole])
        tokens += check.tokens
        stops = bool(check.reason) and "output" not in only_told
        tell(Said(label(guard), "output", check, whole.text, stops))
        if stops:
            yield withheld(guard, replace(check, tokens=tokens), joined(held))
            return
    yield Completion("", finish=whole.finish, error=whole.error, extra_tokens=tokens)
    yield from held


def joined(pieces: Sequence[Completion]) -> Completion:
    """One completion of its pieces: texts, tokens and costs add up, and it ends as the last one does."""
    last = pieces[-1] if pieces else Completion("")
    return replace(
        last,
        text="".join(p.text for p in pieces),
        prompt_tokens=sum(p.prompt_tokens for p in pieces),
        completion_tokens=sum(p.completion_tokens for p in pieces),
        extra_tokens=sum(p.extra_tokens for p in pieces),
        top_logprobs=tuple(chain.from_iterable(p.top_logprobs for p in pieces)),
        drawn=tuple(chain.from_iterable(p.drawn for p in pieces)),
    )


@cache
def _aside() -> ThreadPoolExecutor:
    """Threads in which guards read a request while the model does."""
    return ThreadPoolExecutor(8, thread_name_prefix="guards")
