"""Ask the plain request, with no attack: the baseline that every other attack is measured against.

Source:  the "direct request" baseline of Mazeika et al. 2024, "HarmBench: A Standardized Evaluation Framework for
         Automated Red Teaming and Robust Refusal", https://arxiv.org/abs/2402.04249
Differs: in nothing for plain requests; HarmBench's contextual and multimodal behaviors are not covered.
Cost:    1 query, no gradients, no memory.
"""

from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Steps, user


@attack(paper="https://arxiv.org/abs/2402.04249", access="black-box")
def direct(behavior: Behavior, ctx: Context) -> Steps:
    """Ask the request as it is."""
    yield [Ask(user(behavior.prompt, behavior.system))]
