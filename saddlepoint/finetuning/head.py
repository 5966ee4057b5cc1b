"""The head, a model's largest product by far: computed at the trained tokens only, its gradient in the same go, so that no logits are kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saddlepoint.targets.hf import HF

LOGITS = 1 << 23  # logits at once
CACHED = 1 << 19  # of these in float32


def head_loss(model: HF, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods and hits of labels (trained,) by the hidden states (trained, width) before them."""
    size = max(1, LOGITS // len(model.embedding))
    chunks = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    if any(p.requires_grad for p in model.model.get_output_embeddings().parameters()):
        made = [(F.cross_entropy(logits := model.head(h), y, reduction="none"), logits.argmax(-1) == y) for h, y in chunks]
    else:
        made = [_HeadLoss.apply(h, y, model) for h, y in chunks]  # type: ignore[no-untyped-call]
    return torch.cat([nll for nll, _ in made]), torch.cat([hit for _, hit in made])


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen head. A token's loss depends on its own hidden state only, so the gradient is made at once and scaled later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, model: HF) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted):
            own = hidden.detach().requires_grad_(wanted)
            logits = model.model.get_output_embeddings()(own)
        slope = torch.empty_like(logits) if wanted else None
        found = []
        for at in torch.split(torch.arange(len(labels)), max(1, CACHED // logits.shape[1])):  # in float32, a few rows at a time
            rows = slice(int(at[0]), int(at[-1]) + 1)
            with torch.set_grad_enabled(wanted):
                raw = logits[rows].detach().requires_grad_(wanted)
                scaled = model._scaled(raw)
            with torch.no_grad():
                p = scaled.softmax(-1)
                top = p.argmax(-1, keepdim=True)
                label = labels[rows, None]
                # The logarithm of the sum, by the largest term, whose probability is far from 0.
                nll = scaled.gather(1, top) - p.gather(1, top).log() - scaled.gather(1, label)
            found.append((nll[:, 0], (top == label)[:, 0]))
            if slope is not None:
                (slope[rows],) = torch.autograd.grad(scaled, raw, p.scatter_add_(1, label, -torch.ones_like(nll)))
        if slope is not None:
            ctx.save_for_backward(*torch.autograd.grad(logits, own, slope))
        nlls, hits = (torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(hits)
        return nlls, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (by_hidden,) = ctx.saved_tensors
        return (grad[:, None] * by_hidden).to(by_hidden.dtype), None, None
