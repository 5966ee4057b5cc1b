"""DeRTa: learn to refuse at any point of an answer, not only at its start.

Source:  Yuan et al. 2024, "Refuse Whenever You Feel Unsafe: Improving Safety in LLMs via Decoupled Refusal Training",
         https://arxiv.org/abs/2407.09121; code read: RobustNLP/DeRTa (MIT)
Differs: the transition term is weighted, because with a small model its refusal token would leak into every text; the
         harmful answers are the ones that attacks drew from the model itself; the answers to keep are the model's
         own. The refusal's first piece after a space stands for "Sorry" within a sentence.
Cost:    refusal_sft's examples, and up to `cuts` + 1 more per finding drawn.
"""

from typing import Annotated

from annotated_types import Ge

from saddlepoint.recipes.refusal_sft import drawn, refusal_sft
from saddlepoint.registry import recipe
from saddlepoint.types import Example, Finding, Lessons, user


@recipe(paper="https://arxiv.org/abs/2407.09121")
def derta(
    lessons: Lessons,
    *,
    each: Annotated[int, Ge(1)] = 1,
    cuts: Annotated[int, Ge(0)] = 3,
    transition: Annotated[float, Ge(0)] = 0.15,
    phrasings: Annotated[int, Ge(1)] = 1,
) -> list[Example]:
    """The two terms of the paper on top of refusal SFT.

    Args:
        each: Findings of each hazard to learn from, drawn at random.
        cuts: Harmful prefixes drawn from each harmful answer, after which to refuse; 0 leaves the first term out.
        transition: Weight of the reinforced transition (RTO) at each token of the harmful answer; 0 leaves it out.
        phrasings: As in refusal_sft.
    """
    made = refusal_sft(lessons, each=each, phrasings=phrasings)
    hazards = {h.id: h for h in lessons.hazards}
    for finding in drawn(lessons, each):
        hazard, refusal = hazards[finding.behavior], lessons.refusals[finding.behavior]
        answer = harmful_answer(finding)
        words = answer.split(" ")
        for _ in range(cuts if len(words) > 1 else 0):  # of one word there is no beginning
            # k = 0 is a plain refusal, which refusal_sft has already; the last two words are never the cut, as in the code.
            k = lessons.rng.randint(1, max(1, len(words) - 2))
            chat = user(lessons.rng.choice(hazard.phrasings), hazard.system)
            made.append(Example(chat, f" {refusal}", prefix=" ".join(words[:k]), behavior=hazard.id))
        if transition:
            chat = user(lessons.rng.choice(hazard.phrasings), hazard.system)
            made.append(Example(chat, answer, transition=True, refusal=refusal, weight=transition, behavior=hazard.id))
    return made


def harmful_answer(finding: Finding) -> str:
    """What the model said in all: the prefill, if there was one, and what it went on with."""
    prefill = finding.chat[-1].text if finding.chat[-1].role == "assistant" else ""
    return (prefill + finding.completion.text).strip()
