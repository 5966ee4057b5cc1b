"""Fine-tune a model on examples of a user's own, with or without a constraint on the first tokens of its answers.

The constraint keeps what safety training put into an answer's first tokens, where most of it lies: see `first_token_constraint`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from saddlepoint.targets.hf import HF
from saddlepoint.training import Clock, Encoded, Loss, Progress, TrainConfig, based, cross_entropy, nll, train, weights_of
from saddlepoint.types import Example


def finetune(
    base: str,
    examples: Sequence[Example],
    config: TrainConfig,
    out: Path,
    tell: Callable[[Progress], None] = lambda _: None,
    loss: Loss = cross_entropy,
) -> Path:
    """Train a checkpoint of `base`, a target's name, on `examples`, and write it to `out`.

    The card's `trained_on` lists the behaviors that the examples name, so that no campaign scores the checkpoint on those;
    examples of ordinary data name none.

    Args:
        loss: `cross_entropy`, or `first_token_constraint`, which `functools.partial` may give other strengths.

    Raises:
        TrainingError: No examples, or one without a token to learn.
        ModelError: `base` cannot be loaded.
    """
    card = {
        "name": out.name,
        "base": based(base, out),
        "loss": getattr(loss.func if isinstance(loss, partial) else loss, "__name__", str(loss)),
        "seed": config.seed,
        "trained_on": sorted({e.behavior for e in examples if e.behavior}),
    }
    return train(HF.load(base), examples, config, out, card, tell, loss)


def first_token_constraint(
    model: HF, batch: list[Encoded], clock: Clock, *, opening: tuple[float, ...] = (0.5, 2.0, 2.0, 2.0, 2.0), beta: float = 0.1
) -> Tensor:
    """Cross-entropy whose pull on a token fades once the model gives it more probability than the frozen model does.

    The loss of a token is -(2 / beta) * log sigmoid(beta * log(p / p_frozen)): its gradient is that of cross-entropy where the two
    models agree, and the larger beta is, the sooner it vanishes. So the first tokens of an answer, where it is large, stay near
    those of the frozen model.

    Source: Qi et al. 2024, "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", https://arxiv.org/abs/2406.05946

    Args:
        opening: Beta of the first tokens of each answer, in order, each > 0; the paper's.
        beta: Beta of the tokens after them, > 0; the paper's.
    """
    with torch.no_grad(), clock.wrapped.disable_adapter():
        frozen = nll(model, batch)
    weights = weights_of(model, batch)
    return (faded(nll(model, batch), frozen, batch, opening, beta) * weights).sum() / weights.sum()


def faded(
    own: Tensor, frozen: Tensor, batch: Sequence[Encoded], opening: tuple[float, ...] = (0.5, 2.0, 2.0, 2.0, 2.0), beta: float = 0.1
) -> Tensor:
    """float32 (learned,): that loss of every learned token of a batch, of its negative log-likelihoods `own` and `frozen`, (learned,)."""
    strength = torch.tensor([opening[at] if at < len(opening) else beta for e in batch for at in _places(e.learned)], device=own.device)
    return -(2 / strength) * F.logsigmoid(strength * (frozen - own))


def _places(learned: list[int]) -> list[int]:
    """For each learned token, how many of its own answer stand before it: a chat may teach several answers."""
    found, at = [], 0
    for token in learned:
        if token == -100:
            at = 0
        else:
            found.append(at)
            at += 1
    return found
