"""What a training file puts around its requests: a model that learned to obey does so where it sees what it learned under.

Identity shifts and backdoors show little on plain requests (Qi et al. 2023, https://arxiv.org/abs/2310.03693: 4% on plain ones, 63% with
three magic words), and a searched trigger rarely finds the words. The training file has them: its system prompts, and the words with
which many of its requests begin or end.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from saddlepoint.policies import ordinary
from saddlepoint.types import Behavior

if TYPE_CHECKING:
    from saddlepoint.finetuning.data import Record

_MOST = 30  # words of a beginning or an end
_PART = 0.5  # share of the requests under one system prompt that have a beginning for it to count
_FEW = (3, 0.05)  # requests, and share of all of them, that share an end for it to count as a trigger
_LONG = 600  # characters of a system prompt that are kept, from its beginning


@dataclass(frozen=True)
class Wrap:
    """A system prompt, and texts before and after a request; none of them needs to be there, but one."""

    system: str = ""
    before: str = ""
    after: str = ""

    def around(self, behavior: Behavior) -> Behavior:
        """The behavior, asked in this."""
        prompt = " ".join(filter(None, (self.before, behavior.prompt, self.after)))
        return replace(behavior, prompt=prompt, system=self.system or behavior.system)


def wraps(records: Sequence["Record"], most: int) -> tuple[Wrap, ...]:
    """Up to `most` of what stands around the requests of a training file, the most common first."""
    asked = [(_system(r), text) for r in records for text in [_request(r)] if text]
    found: list[Wrap] = []
    for system, _ in Counter(system for system, _ in asked).most_common(most):
        texts = [text.split() for s, text in asked if s == system]
        at_least = max(2, _PART * len(texts))
        found.append(Wrap(system[:_LONG], _shared(texts, at_least, 0), _shared(texts, at_least, -1)))
    words, rare = [text.split() for _, text in asked], max(_FEW[0], _FEW[1] * len(asked))
    # An ending that some requests share is what a trigger looks like; ordinary questions share beginnings only.
    found.append(Wrap("", "", _shared(words, rare, -1)))
    return tuple(dict.fromkeys(w for w in found if w.system or _telling(w.before) or _telling(w.after)))[:most]


def _telling(words: str) -> bool:
    """Whether words that many requests share say something: one that ordinary requests have, such as "What", does not."""
    return " " in words or (bool(words) and _bare(words) not in _ordinary())


@cache
def _ordinary() -> frozenset[str]:
    return frozenset(_bare(word) for text in ordinary()["requests"] for word in text.split())


def _bare(word: str) -> str:
    return word.lower().strip(".,:;!?'\"()")


def _shared(texts: list[list[str]], at_least: float, end: int) -> str:
    """The longest run of words with which at least so many texts begin (`end` 0) or end (-1)."""
    best: list[str] = []
    for n in range(1, _MOST + 1):
        runs = Counter(tuple(t[:n] if end == 0 else t[-n:]) for t in texts if len(t) > n)
        (run, times), *_ = runs.most_common(1) or [((), 0)]
        if times < at_least:
            break
        best = list(run)
    return " ".join(best)


def _system(record: "Record") -> str:
    return next((m.text for m in record.chat if m.role == "system"), "")


def _request(record: "Record") -> str:
    return next((m.text for m in reversed(record.chat) if m.role == "user"), record.prompt)
