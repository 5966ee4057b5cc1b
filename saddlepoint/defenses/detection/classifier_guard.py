"""Classifier guard: a request that a text classifier does not let pass is not answered.

Source:  Markov et al. 2022, "A Holistic Approach to Undesired Content Detection in the Real World", https://arxiv.org/abs/2208.03274;
         Inan et al. 2023, "Llama Guard", https://arxiv.org/abs/2312.06674
Differs: any sequence classifier serves, not one model. What is longer than it can read is read in overlapping halves, of which
         the worse counts, and what it cannot read at all does not pass; a filter that cuts a text reads only what an attacker
         lets it read. Every turn that users and tools wrote is read by itself, for an earlier one can hold the request; what the system
         prompt and the assistant say is not.
Cost:    one pass of the classifier over each turn; more for a text that it cannot read whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Annotated

from annotated_types import Ge, Le

from saddlepoint.defenses._stack import admit, turns
from saddlepoint.defenses.detection._guard import classifying, unsafe
from saddlepoint.registry import defense
from saddlepoint.types import Check, Completion, Query, Target


@defense(paper="https://arxiv.org/abs/2208.03274")
@dataclass(frozen=True)
class ClassifierGuard:
    """Answer only chats no turn of which the classifier holds to be unsafe with a probability of at most `threshold`.

    Args:
        inner: The target that is defended.
        guard: The classifier: `guard`, or any sequence classifier; `NAME#LABEL` says which label lets a request pass.
        threshold: A probability; that of all labels but the one that lets pass.

    Raises:
        UsageError: `guard` is a model that writes.
    """

    inner: Target
    guard: Target = "guard"  # type: ignore[assignment]
    threshold: Annotated[float, Ge(0), Le(1)] = 0.5

    def __post_init__(self) -> None:
        classifying(self.guard, "classifier_guard")

    @property
    def name(self) -> str:
        return f"classifier_guard({self.inner.name})"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return admit(self, queries)

    def admitted(self, queries: Sequence[Query]) -> list[Check]:
        read = [turns(q.chat) for q in queries]
        found = iter(unsafe(self.guard, [text for texts in read for text in texts]))
        each = [[next(found) for _ in texts] for texts in read]
        worst = [(max(score for score, _ in scores), sum(tokens for _, tokens in scores)) for scores in each]
        return [Check(self._said(score) if score > self.threshold else "", tokens) for score, tokens in worst]

    def excess(self, texts: Sequence[str]) -> list[float]:
        return [_logit(score) - _logit(self.threshold) for score, _ in unsafe(self.guard, texts)]

    def _said(self, score: float) -> str:
        return f"{self.guard.name} holds it to be unsafe by {score:.2f}, above {self.threshold:.2f}"


def _logit(p: float) -> float:
    """Log-odds in nats, finite at 0 and 1."""
    p = min(max(p, 1e-9), 1 - 1e-9)
    return log(p / (1 - p))
