"""Best-of-N: sample many randomly misspelled copies of the request until one is answered.

Source:  Hughes et al. 2024, "Best-of-N Jailbreaking", https://arxiv.org/abs/2412.03556; its code was read:
         https://github.com/jplhughes/bon-jailbreaking (e85898235)
Differs: n is 16, not up to 10,000. White space is kept and never noised, so words stay apart (the code joins them by
         single spaces). Letters outside ASCII are left as they are; the code deletes those that it picks to capitalize.
Cost:    at most `n` queries, `batch` at a time, no gradients, no memory.
"""

import re
from random import Random
from typing import Annotated

from annotated_types import Ge, Le

from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Steps, user


@attack(paper="https://arxiv.org/abs/2412.03556", access="black-box")
def best_of_n(
    behavior: Behavior,
    ctx: Context,
    *,
    n: Annotated[int, Ge(1)] = 16,
    batch: Annotated[int, Ge(1)] = 4,
    sigma: Annotated[float, Ge(0), Le(1)] = 0.4,
    temperature: Annotated[float, Ge(0)] = 1.0,
) -> Steps:
    """Ask altered copies, `batch` at a time, until an answer is unsafe or `n` are spent.

    Args:
        n: Most copies to ask, >= 1.
        batch: Copies asked at once, >= 1; a larger batch is faster and may ask more than needed.
        sigma: Strength of the alterations, in [0, 1]; 0 leaves the text as it is.
        temperature: Of the answers, >= 0.
    """
    for asked in range(0, n, batch):
        copies = [augment(behavior.prompt, sigma, ctx.rng) for _ in range(min(batch, n - asked))]
        replies = yield [Ask(user(copy, behavior.system), temperature=temperature) for copy in copies]
        if any(reply.unsafe for reply in replies):
            return


def augment(text: str, sigma: float, rng: Random) -> str:
    """Scramble, recase and noise a text, in this order, as the paper does."""
    return noise(recase(scramble(text, sigma**0.5, rng), sigma**0.5, rng), sigma**3, rng)


def scramble(text: str, rate: float, rng: Random) -> str:
    """Shuffle the inner characters of a share of the words that are longer than three; first and last stay."""

    def shuffled(word: re.Match[str]) -> str:
        inner = word[0][1:-1]
        return word[0][0] + "".join(rng.sample(inner, len(inner))) + word[0][-1] if rng.random() < rate else word[0]

    return re.sub(r"\S{4,}", shuffled, text)


def recase(text: str, rate: float, rng: Random) -> str:
    """Swap the case of a share of the ASCII letters."""
    return re.sub("[A-Za-z]", lambda c: c[0].swapcase() if rng.random() < rate else c[0], text)


def noise(text: str, rate: float, rng: Random) -> str:
    """Move a share of the printable ASCII characters to a neighbor in the ASCII table."""

    def moved(found: re.Match[str]) -> str:
        code = ord(found[0]) + rng.choice((-1, 1)) if rng.random() < rate else ord(found[0])
        return chr(code) if 33 <= code <= 126 else found[0]

    return re.sub("[!-~]", moved, text)
