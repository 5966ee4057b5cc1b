"""What defenses of one kind do alike: ask the inner target only what may pass, and withhold what may not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from saddlepoint.types import Chat, Check, Completion, Defense, InputGuard, OutputGuard, Query, Rewriter, Target

REFUSED = "Sorry, I can't help with that."


def admit(guard: InputGuard, queries: Sequence[Query]) -> list[Completion]:
    """What a guard of the input answers: the inner target is asked only what is admitted."""
    checks = guard.admitted(queries)
    passed = [q for q, check in zip(queries, checks, strict=True) if not check.reason]
    answers = iter(guard.inner.generate(passed) if passed else [])
    return [withheld(guard, check) if check.reason else charged(next(answers), check.tokens) for check in checks]


def rewrite(rewriter: Rewriter, queries: Sequence[Query]) -> list[Completion]:
    """What a defense answers that asks something else instead."""
    asked = rewriter.rewritten(queries)
    answers = rewriter.inner.generate([query for query, _ in asked])
    return [charged(answer, tokens) for answer, (_, tokens) in zip(answers, asked, strict=True)]


def release(guard: OutputGuard, queries: Sequence[Query]) -> list[Completion]:
    """What a guard of the output answers. What failed, or was withheld further in, is not checked."""
    answers = guard.inner.generate(queries)
    there = [i for i, answer in enumerate(answers) if answer.finish not in ("error", "filter")]
    checks = guard.released([queries[i] for i in there], [answers[i] for i in there]) if there else []
    for i, check in zip(there, checks, strict=True):
        answers[i] = withheld(guard, check, answers[i]) if check.reason else charged(answers[i], check.tokens)
    return answers


def withheld(defense: Defense, check: Check, answer: Completion = Completion("")) -> Completion:
    """A refusal in the place of an answer, which has cost what it has cost."""
    reason = f"{label(defense)}: {check.reason}"
    extra = answer.extra_tokens + check.tokens
    return Completion(REFUSED, answer.prompt_tokens, answer.completion_tokens, "filter", blocked=reason, extra_tokens=extra)


def charged(answer: Completion, tokens: int) -> Completion:
    return replace(answer, extra_tokens=answer.extra_tokens + tokens) if tokens else answer


def label(defense: Target) -> str:
    """A defense's registered name."""
    return str(getattr(type(defense), "__saddlepoint__").name)  # noqa: B009  mypy knows no such attribute


def layers(target: Target) -> Iterator[Target]:
    """A stack from the outermost defense to the bare target."""
    yield target
    while isinstance(target, Defense):
        target = target.inner
        yield target


def request(chat: Chat) -> str:
    """The text of the last user message; "" where there is none."""
    return next((m.text for m in reversed(chat) if m.role == "user"), "")


def turns(chat: Chat) -> list[str]:
    """What was written between one answer and the next: the texts of users and tools that follow one another, by lines; [""] where none is.

    A guard reads them all: whoever sends a chat can put a request into an earlier message, or cut it into two.
    """
    runs = groupby((m for m in chat if m.role != "system"), lambda m: m.role in ("user", "tool"))
    return ["\n".join(m.text for m in run) for written, run in runs if written] or [""]


def with_request(chat: Chat, text: str, ids: tuple[int, ...] = ()) -> Chat:
    """The chat with another text, or other token ids of it, for its last user message; as it is where there is none."""
    last = max((i for i, m in enumerate(chat) if m.role == "user"), default=None)
    return chat if last is None else (*chat[:last], replace(chat[last], text=text, ids=ids), *chat[last + 1 :])
