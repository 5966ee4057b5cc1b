"""A linear layer with its LoRA as one operation: y = x W' + scale (x A') B', where only A and B learn.

Beside what autograd would do for peft's layers, no intermediate but x A' (tokens, rank) is kept, the small product is added to the large
one inside the product, and so is its share of the gradient. Layers with anything else (dropout, DoRA, several adapters, quantized
weights) are left as they are.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse(wrapped: nn.Module) -> int:
    """Let every plain LoRA layer of a peft model compute so; how many there are."""
    found = [module for module in wrapped.modules() if _plain(module)]
    for layer in found:
        layer.forward = partial(_forward, layer)
    return len(found)


def _plain(module: nn.Module) -> bool:
    if not isinstance(module, Linear) or type(module.base_layer) is not nn.Linear or len(module.active_adapters) != 1:
        return False
    (name,) = module.active_adapters
    simple = isinstance(module.lora_dropout[name], nn.Identity) and not module.lora_bias[name] and not module.lora_variant
    return simple and not module.fan_in_fan_out and not module.base_layer.weight.requires_grad


def _forward(layer: Any, x: Tensor) -> Tensor:
    (name,) = layer.active_adapters
    base = layer.base_layer
    if layer.disable_adapters:
        return F.linear(x, base.weight, base.bias)
    made: Tensor = _LoRA.apply(x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])  # type: ignore[no-untyped-call]
    return made


class _LoRA(torch.autograd.Function):
    """(..., in) to (..., out); weight (out, in), a (rank, in), b (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale = scale
        return F.linear(rows, weight, bias).addmm_(low, b.T, alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, weight, a, b, low = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        by_low = (g @ b).mul_(ctx.scale)
        by_rows = (g @ weight).addmm_(by_low, a).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return by_rows, None, None, by_low.T @ rows, (g.T @ low).mul_(ctx.scale), None
