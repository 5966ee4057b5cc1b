"""Erase-and-check: a request passes only if a classifier lets it pass, and every version of it with some words erased.

Source:  Kumar et al. 2023, "Certifying LLM Safety against Adversarial Prompting", https://arxiv.org/abs/2309.02705
Differs: words are erased, not tokens, so that the certificate holds for any classifier, whatever its tokenizer does at the border
         of what was added; every version is checked, however short, and so is the request as it stands; one block may be inserted.
         Every turn of a chat that users and tools wrote is checked so, for an earlier one can hold the request. A request with more
         than `most` versions does not pass, which keeps the certificate.
Cost:    classifier passes per turn of n words: max_erase + 1 (suffix), about n * max_erase (insertion), or the number of ways to
         choose up to max_erase of n words (infusion, for which max_erase must be 1 to 3); times `share`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from saddlepoint.defenses._stack import admit, turns
from saddlepoint.defenses.detection._guard import classifying, unsafe
from saddlepoint.defenses.perturbation._vote import seeded
from saddlepoint.registry import defense
from saddlepoint.types import Check, Completion, Query, Target

Mode = Literal["suffix", "insertion", "infusion"]


@defense(paper="https://arxiv.org/abs/2309.02705")
@dataclass(frozen=True)
class EraseAndCheck:
    """Refuse a request if its classifier stops it or any version of it with up to `max_erase` words less.

    The certificate: let P be words with single blanks between them, and let the classifier stop P. With share=1, every request is
    refused whose words are those of P and at most `max_erase` more, parted from them by white space, that stand (suffix) all behind P,
    (insertion) all in one place, or (infusion) anywhere. With a smaller share each such request is refused with at least that
    chance over the seed. It says that P is recognized, not that the model would have answered; nothing about requests that the classifier
    lets pass, some of which are refused for what remains when words are erased; and nothing about words that are changed.

    Args:
        inner: The target that is defended.
        guard: The classifier: `guard`, or any sequence classifier; `NAME#LABEL` says which label lets a request pass.
        mode: Where the added words may stand.
        max_erase: Most words that are erased.
        share: Share of the versions that are checked, drawn at random; the whole request always is.
        most: Most versions of one request that are checked.
        seed: Of the draw, beside the request itself; who knows it can foresee the draw.

    Raises:
        UsageError: `guard` is a model that writes.
    """

    inner: Target
    guard: Target = "guard"  # type: ignore[assignment]
    mode: Mode = "suffix"
    max_erase: Annotated[int, Ge(0)] = 20
    share: Annotated[float, Gt(0), Le(1)] = 1.0
    most: Annotated[int, Ge(1)] = 5000
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        classifying(self.guard, "erase_and_check")

    @property
    def name(self) -> str:
        return f"erase_and_check({self.inner.name})"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return admit(self, queries)

    def admitted(self, queries: Sequence[Query]) -> list[Check]:
        versions = [self._versions(turns(q.chat)) for q in queries]
        scores = iter(unsafe(self.guard, [text for texts in versions for text in texts]))
        checks = []
        for texts in versions:
            found = [(*next(scores), text) for text in texts]
            stopped = [text for score, _, text in found if score > 0.5]
            said = (
                f"more than {self.most} versions to check"
                if not texts
                else f"{self.guard.name} stops {stopped[0][:200]!r}"
                if stopped
                else ""
            )
            checks.append(Check(said, sum(tokens for _, tokens, _ in found)))
        return checks

    def _versions(self, texts: Sequence[str]) -> list[str]:
        """What the classifier is shown of a request's turns; none where it would be too many."""
        shown: list[str] = []
        for text in texts:
            every = list(islice(erased(text, self.mode, self.max_erase), self.most + 1))
            rng = seeded(self.seed, text)
            shown += [text, *(version for version in dict.fromkeys(every) if self.share == 1 or rng.random() < self.share)]
            if len(every) > self.most or len(shown) > self.most + 1:
                return []
        return shown


def erased(text: str, mode: Mode, max_erase: int) -> Iterator[str]:
    """The words of a text with none to `max_erase` of them left out, single blanks between the rest."""
    words = text.split()
    n = len(words)
    for k in range(min(max_erase, n) + 1):
        if mode == "infusion":
            yield from (" ".join(kept) for kept in combinations(words, n - k))
        else:
            first = n - k if mode == "suffix" else 0
            yield from (" ".join(words[:i] + words[i + k :]) for i in range(first, n - k + 1))
