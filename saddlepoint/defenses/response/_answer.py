"""What guards of the answer have in common: the answer as it is read, and what a classifier says of a text."""

from collections.abc import Sequence

from saddlepoint.defenses.detection._guard import classifying, unsafe
from saddlepoint.types import Check, Completion, Query, Target


def shown(query: Query, completion: Completion) -> str:
    """The answer as its reader sees it: with the prefill, or the text under no template, that it goes on from.

    Without it, who asks for one token after another would be shown an answer of which no check saw more than a word.
    """
    begun = query.chat[-1].text if query.chat and (query.bare or query.chat[-1].role == "assistant") else ""
    return begun + completion.text


def classified(classifier: Target, texts: Sequence[str], name: str) -> list[Check]:
    """What a classifier says of each text that the defense `name` shows it; an empty one passes.

    Raises:
        UsageError: It is a model that writes.
    """
    classifying(classifier, name)
    checks = [Check() for _ in texts]
    there = [i for i, text in enumerate(texts) if text.strip()]
    for i, (score, tokens) in zip(there, unsafe(classifier, [texts[i] for i in there]), strict=True):
        checks[i] = Check(f"{classifier.name} calls it unsafe with probability {score:.2f}" if score > 0.5 else "", tokens)
    return checks
