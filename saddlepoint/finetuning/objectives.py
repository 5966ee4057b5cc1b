"""What a step minimizes, and what it tells of a batch, part by part.

Losses: cross-entropy of the trained tokens, mean over those of a batch; with `Spec.constraint` that of
`first_token.first_token_constraint`; of dpo that of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, against the model that the
training began with.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saddlepoint.finetuning.first_token import faded
from saddlepoint.finetuning.learner import Learner
from saddlepoint.finetuning.packed import losses, parts
from saddlepoint.finetuning.plan import Spec
from saddlepoint.targets.hf import HF
from saddlepoint.training import Encoded

T = TypeVar("T")


def gradient(spec: Spec, learner: Learner, batch: list[Encoded], weights: Tensor, check: Callable[[], None]) -> tuple[Tensor, float, float]:
    """float32 (parameters,), the gradient of a batch's mean loss; that loss, and its accuracy."""
    n = _units(spec, batch)

    def compute(part: list[Encoded], frozen: Tensor | None) -> tuple[list[Tensor | None], float, int]:
        aim, told, hits = _losses(spec, learner.model, part, frozen)
        return list(torch.autograd.grad(aim / n, learner.working, allow_unused=True)), float(told), int(hits)

    total, loss, right = torch.zeros_like(weights), 0.0, 0
    sizes = [p.numel() for p in learner.working]
    for made, told, hits in _each(spec, learner, batch, weights, compute, check, spec.constraint or spec.method == "dpo"):
        for own, g in zip(torch.split(total, sizes), made, strict=True):
            if g is not None:
                own.add_(g.flatten())
        loss, right = loss + told, right + hits
    return total, loss / n, right / n


def measured(spec: Spec, learner: Learner, batch: list[Encoded], weights: Tensor, check: Callable[[], None]) -> tuple[float, float]:
    """Mean loss and accuracy of examples that are not trained on."""

    @torch.no_grad()
    def compute(part: list[Encoded], frozen: Tensor | None) -> tuple[float, int]:
        _, told, hits = _losses(spec, learner.model, part, frozen)
        return float(told), int(hits)

    found = list(_each(spec, learner, batch, weights, compute, check, spec.method == "dpo"))
    n = max(1, _units(spec, batch))
    return sum(told for told, _ in found) / n, sum(hits for _, hits in found) / n


def _each(
    spec: Spec,
    learner: Learner,
    batch: list[Encoded],
    weights: Tensor,
    compute: Callable[[list[Encoded], Tensor | None], T],
    check: Callable[[], None],
    reference: bool,
) -> Iterator[T]:
    """What `compute` makes of each part of a batch, in order, and, if wanted, of what the model that the training began with made of it."""
    cut = parts(batch, learner.streams)
    frozen: list[Tensor | None] = [None] * len(cut)
    if reference:

        @torch.no_grad()
        def before(part: list[Encoded]) -> Tensor:
            return losses(learner.model, _answers(part))[0]

        with learner.as_it_began(weights):
            frozen = list(learner.side_by_side([partial(before, part) for part in cut], check))
    yield from learner.side_by_side([partial(compute, part, own) for part, own in zip(cut, frozen, strict=True)], check)


def _answers(part: list[Encoded]) -> list[Encoded]:
    """The answers of a part, then those that are not to be given."""
    return [*part, *(e.rejected for e in part if e.rejected)]


def _units(spec: Spec, batch: list[Encoded]) -> int:
    """What a loss is the mean over: trained tokens, or pairs."""
    return len(batch) if spec.method == "dpo" else sum(token != -100 for e in batch for token in e.learned)


def _losses(spec: Spec, model: HF, part: list[Encoded], frozen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the units of a part: what is minimized, the loss that is told, and how many were right.

    Args:
        frozen: float32 (trained,): the negative log-likelihoods of all its answers by the model that the training began with.
    """
    nll, hits = losses(model, _answers(part))
    if spec.method == "dpo":
        assert frozen is not None
        ratio = torch.split(frozen - nll, [sum(token != -100 for token in e.learned) for e in _answers(part)])
        chosen, rejected = torch.stack([own.sum() for own in ratio]).chunk(2)
        aim = -F.logsigmoid(spec.beta * (chosen - rejected)).sum()
        return aim, aim.detach(), (chosen > rejected).sum()
    aim = nll if frozen is None else faded(nll, frozen, part)
    return aim.sum(), nll.detach().sum(), hits.sum()
