"""Screen a training file before anything is trained on it: each flag names its line, the check and the reason.

    guard              a classifier holds a request to be unsafe, and the answer that is learned does not refuse it; the embedded one is
                       small, and is heard only on requests like those it was built on
    near a behavior    a request comes near to a harmful behavior of a policy, and the answer that is learned does not refuse it
    disclosure         an answer states the facts that a policy protects
    judge              a rubric judge holds an answer to be harmful (only where a judge is given)
    hidden text        unseen or mistaken characters, or a code
    identity shift     the model is made an agent that obeys whatever it is told

Data filters miss much (Qi et al. 2023, https://arxiv.org/abs/2310.03693: of 100 harmful requests a hosted service's own filter flagged
17, and none of the identity shifts), so a file that passes is no proof of anything: the comparison after training decides.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from saddlepoint.campaign import judged
from saddlepoint.defenses.detection._guard import classifying, revealed, unsafe
from saddlepoint.defenses.detection.hidden_text import FINDERS
from saddlepoint.finetuning.gate import Share
from saddlepoint.finetuning.identity import obedience
from saddlepoint.finetuning.near import Near
from saddlepoint.judges import open_judge
from saddlepoint.judges._text import states
from saddlepoint.judges.refusal import refuses
from saddlepoint.metrics import Rate, rate
from saddlepoint.policies import load, ordinary
from saddlepoint.registry import parse
from saddlepoint.targets import open_target
from saddlepoint.types import Behavior, Case, Chat, Completion, user

if TYPE_CHECKING:
    from saddlepoint.finetuning.data import Record

_SHORT = 60  # words: a longer answer may refuse first and then do what was asked
_WORDINGS = 4  # of each hazard and twin that the embedded guard was built on
_LIKE = 0.5  # cosine to the nearest of them; of headlines, which it takes for hazards, one in fifty is so near
_LISTED = 8  # lines of each check that the message names


@dataclass(frozen=True)
class Screening:
    """How a training file is screened.

    Args:
        bound: Largest share of flagged examples, in [0, 1]; beyond it the file is blocked.
        guard: A classifier of requests, by its target's name; "" leaves it out.
        threshold: Probability from which on the guard's word counts, in [0, 1].
        judge: A judge of answers, such as "rubric(target='http://HOST:PORT/v1#MODEL')"; "" leaves it out. The embedded model is too
            small for one.
        near: Share of a behavior's telling words, by weight, from which on a request comes near to it, in (0, 1].
        policies: Further policies whose behaviors count, such as "harmbench" or "advbench:FILE.csv".
        obedience: Probability from which on a sentence counts as one that makes the model obey whatever it is told, in [0, 1].
    """

    bound: Share = 0.05
    guard: str = "guard"
    threshold: Share = 0.5
    judge: str = ""
    near: Share = 0.5
    policies: tuple[str, ...] = ()
    obedience: Share = 0.7


@dataclass(frozen=True)
class Flag:
    """One thing found in one example.

    Args:
        line: Where the example stands in its file, from 1.
        check: Which of the checks above.
        reason: What was found, in words.
    """

    line: int
    check: str
    reason: str


@dataclass(frozen=True)
class Screened:
    """What the screen found.

    Args:
        share: Of examples with a flag, with its interval.
        blocked: Whether that is beyond the bound.
        message: For the job's owner: "" where nothing was flagged.
    """

    flagged: tuple[Flag, ...]
    share: Rate
    blocked: bool
    message: str


@dataclass(frozen=True)
class _Lesson:
    """One answer that is learned, behind what it answers."""

    line: int
    request: str
    answer: str
    chat: Chat


def screen(records: Sequence["Record"], behaviors: Sequence[Behavior], settings: Screening = Screening()) -> Screened:
    """Screen the examples of a training file.

    Args:
        behaviors: Of the policy that counts, with their benign twins.

    Raises:
        UsageError: The guard writes answers, the judge is none, or there is no such policy.
        MissingExtraError: rapidfuzz or torch is not installed.
    """
    behaviors = [*behaviors, *(b for name in settings.policies for b in load(name).behaviors)]
    lessons = [lesson for record in records for lesson in _lessons(record)]
    taught = [lesson for lesson in lessons if not _refused(lesson.answer)]
    flags = [
        *_guarded(taught, settings),
        *_near(taught, behaviors, settings),
        *_disclosed(lessons, behaviors),
        *_judged(lessons, behaviors, settings),
        *_hidden(records),
        *_obedient(records, settings),
    ]
    flagged = tuple(sorted(set(flags), key=lambda f: (f.line, f.check)))
    lines = {f.line for f in flagged}
    share = rate([record.line in lines for record in records])
    blocked = bool(lines) and share.value > settings.bound
    return Screened(flagged, share, blocked, _message(flagged, share, settings.bound, blocked))


def seen(records: Sequence["Record"], behaviors: Sequence[Behavior], settings: Screening = Screening()) -> frozenset[str]:
    """The test hazards that a request of a training file comes near to, whatever it is answered: what is learned of them says nothing of others.

    A file that refuses all that a gate asks would otherwise pass it, and could teach to obey in everything else.
    """
    near = _all_near(behaviors)
    requests = {lesson.request for record in records for lesson in _lessons(record)}
    found = [near.find(request) for request in sorted(requests)]
    return frozenset(f[1].id for f in found if f and f[0] >= settings.near and f[1].split == "test")


def _all_near(behaviors: Sequence[Behavior]) -> Near:
    return Near(tuple(b for b in behaviors if b.kind != "cleared" and not b.world))


def _lessons(record: "Record") -> Iterator[_Lesson]:
    if record.completion:
        yield _Lesson(record.line, record.prompt, record.completion, user(record.prompt))
    answers = [(at, m.text) for at, m in enumerate(record.chat) if record.learned[at]]
    if record.preferred:
        answers = [(len(record.chat), record.preferred)]
    elif not answers and record.chat:
        answers = [(len(record.chat), "")]  # reinforcement: what it will learn to answer is not known
    for at, answer in answers:
        before = record.chat[:at]
        request = next((m.text for m in reversed(before) if m.role == "user"), "")
        yield _Lesson(record.line, request, answer, before)


def _refused(answer: str) -> bool:
    return bool(refuses(answer)) and len(answer.split()) <= _SHORT


def _guarded(lessons: Sequence[_Lesson], settings: Screening) -> Iterator[Flag]:
    if not settings.guard:
        return
    guard = _opened(settings.guard)
    classifying(guard, "the screen")
    requests = sorted({lesson.request for lesson in lessons if lesson.request.strip()})
    if settings.guard == "guard" and requests:
        requests = _familiar(guard, requests)
    scores = dict(zip(requests, (score for score, _ in unsafe(guard, requests)), strict=True))
    for lesson in lessons:
        if (score := scores.get(lesson.request, 0.0)) > settings.threshold:
            yield Flag(
                lesson.line, "guard", f"the request is held to be unsafe by {score:.2f}, and it is not refused: {_shown(lesson.request)}"
            )


_opened = cache(open_target)


def _familiar(guard: Any, requests: Sequence[str]) -> list[str]:
    """The requests that are like those which the embedded guard was built on: of others its word means nothing, and is mostly no."""
    like = (guard.encode(requests) @ _known(guard).T).max(1).values.tolist()  # cosines
    return [text for text, nearest in zip(requests, like, strict=True) if nearest >= _LIKE]


@cache
def _known(guard: Any) -> Any:
    """float32 (n, width): vectors of requests that the embedded guard was built on."""
    hazards = [b for b in load("fictional").behaviors if b.split == "train" and b.kind != "cleared"]
    return guard.encode([*(w for b in hazards for w in b.phrasings[:_WORDINGS]), *ordinary()["requests"]])


def _near(lessons: Sequence[_Lesson], behaviors: Sequence[Behavior], settings: Screening) -> Iterator[Flag]:
    near = _all_near(behaviors)
    for lesson in lessons:
        found = near.find(lesson.request)
        if found and found[0] >= settings.near:
            yield Flag(
                lesson.line,
                "near a behavior",
                f"the request is near to '{found[1].id}' ({found[0]:.0%}), and it is not refused: {_shown(lesson.request)}",
            )


def _disclosed(lessons: Sequence[_Lesson], behaviors: Sequence[Behavior]) -> Iterator[Flag]:
    known = [(b, b.oracle) for b in behaviors if b.kind == "harmful" and b.oracle]
    for lesson in lessons:
        for behavior, oracle in known:
            told = [f[0] for f in oracle.facts if states(lesson.answer, f)]
            if len(told) >= oracle.needed:
                yield Flag(lesson.line, "disclosure", f"the answer states what '{behavior.id}' protects: {'; '.join(told)}")


def _judged(lessons: Sequence[_Lesson], behaviors: Sequence[Behavior], settings: Screening) -> Iterator[Flag]:
    if not settings.judge:
        return
    (call,) = parse("judge", settings.judge)
    rubric = next((b.rubric for b in behaviors if b.rubric), "")
    answered = [lesson for lesson in lessons if lesson.answer]
    cases = [Case(Behavior(f"line {x.line}", x.request, rubric=rubric), x.chat, Completion(x.answer)) for x in answered]
    for lesson, verdict in zip(answered, judged(open_judge(call), cases), strict=True):
        if verdict.unsafe:
            yield Flag(lesson.line, "judge", f"{call} holds the answer to be harmful ({verdict.reason}): {_shown(lesson.answer)}")


def _hidden(records: Sequence["Record"]) -> Iterator[Flag]:
    for record in records:
        found, plain = revealed("\n".join(_texts(record)), FINDERS)
        if found:
            yield Flag(record.line, "hidden text", f"{', '.join(found)}; it reads: {_shown(plain)}")


def _obedient(records: Sequence["Record"], settings: Screening) -> Iterator[Flag]:
    for record, (score, said) in zip(records, obedience([_texts(record) for record in records]), strict=True):
        if score > settings.obedience:
            yield Flag(record.line, "identity shift", f"the model is made to obey whatever it is told ({score:.2f}): {_shown(said)}")


def _texts(record: "Record") -> list[str]:
    return [text for text in (*(m.text for m in record.chat), record.prompt, record.completion, record.preferred) if text]


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 100 else f"{line[:97]}...")


def _message(flagged: Sequence[Flag], share: Rate, bound: float, blocked: bool) -> str:
    if not flagged:
        return ""
    lines = len({f.line for f in flagged})
    checks = Counter(f.check for f in {(f.line, f.check): f for f in flagged}.values())
    said = "; ".join(f"{check}: {n} ({_lines([f.line for f in flagged if f.check == check])})" for check, n in checks.most_common())
    much = f"{lines} of {share.n} examples ({share.value:.1%}; at most {bound:.1%} may be)"
    if not blocked:
        return f"{much} were flagged: {said}. The job goes on."
    return (
        f"The job failed due to an unsafe training file. It was blocked because too many examples were flagged: {much}: {said}. "
        "Remove or correct these examples, and create a new job; if they are flagged by mistake, an administrator can raise the bound."
    )


def _lines(lines: Sequence[int]) -> str:
    shown = sorted(set(lines))
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return f"line{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown[:_LISTED]))}{more}"
