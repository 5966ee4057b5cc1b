"""Refusal SFT: fine-tune on refusals of harmful requests, mixed with answers that must stay as they are.

Source:  the "vanilla safety training" baseline of Yuan et al. 2024, "Refuse Whenever You Feel Unsafe",
         https://arxiv.org/abs/2407.09121
Differs: learns from the attacks' own prompts too (without the prefill, which plain SFT cannot use); the answers to keep
         are the model's own, so that nothing but refusing is taught; clearance stays in the mix.
Cost:    one example per hazard and phrasing, and one per finding.
"""

from random import Random
from typing import Annotated

from annotated_types import Ge

from saddlepoint.registry import recipe
from saddlepoint.types import Example, Finding, Lessons, user


@recipe(paper="https://arxiv.org/abs/2407.09121")
def refusal_sft(lessons: Lessons, *, each: Annotated[int, Ge(1)] = 1, phrasings: Annotated[int, Ge(1)] = 1) -> list[Example]:
    """Refuse every hazard and every attack that broke it; answer as before what may be answered.

    Args:
        each: Findings of each hazard to learn from, drawn at random.
        phrasings: Wordings of each plain request to learn from.
    """
    made = []
    for hazard in lessons.hazards:
        for wording in lessons.rng.sample(hazard.phrasings, min(phrasings, len(hazard.phrasings))):
            made.append(Example(user(wording, hazard.system), lessons.refusals[hazard.id], behavior=hazard.id))
    for finding in drawn(lessons, each):
        chat = finding.chat[:-1] if finding.chat[-1].role == "assistant" else finding.chat
        made.append(Example(chat, lessons.refusals[finding.behavior], behavior=finding.behavior))
    made.extend(Example(chat, answer) for chat, answer in lessons.kept)
    return made


def drawn(lessons: Lessons, each: int) -> list[Finding]:
    """Up to `each` findings of every hazard. The draw is by the hazard, so that two callers get the same."""
    of: dict[str, list[Finding]] = {hazard.id: [] for hazard in lessons.hazards}
    for finding in lessons.findings:
        of[finding.behavior].append(finding)
    return [f for hazard, found in of.items() for f in Random(hazard).sample(found, min(each, len(found)))]
