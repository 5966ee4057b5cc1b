"""Layers whose weights do not learn, each as one operation with a gradient of our own.

A linear layer with its LoRA is y = x W' + scale (x A') B', where only A and B learn. Beside what autograd would do for peft's layers, no
intermediate but x A' (tokens, rank) is kept, the small product is added to the large one inside the product, and so is its share of the
gradient. Layers with anything else (dropout, DoRA, several adapters, quantized weights) are left as they are. So are norms that turn out
to compute anything but x / rms(x) times a weight.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse(wrapped: nn.Module) -> tuple[int, int]:
    """Let every plain LoRA layer and every plain norm of a peft model compute so; how many there are of each."""
    layers = [module for module in wrapped.modules() if _plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    norms = [module for module in wrapped.modules() if type(module).__name__.endswith("RMSNorm") and _is_norm(module)]
    for norm in norms:
        norm.forward = partial(_normed, norm)
    return len(layers), len(norms)


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


def _is_norm(module: Any) -> bool:
    """Whether a module gives what our norm gives: tried out, since their names say little."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad or weight.ndim != 1 or not hasattr(module, "variance_epsilon"):
        return False
    x = torch.linspace(-3, 5, 3 * len(weight), device=weight.device).sin().mul(2).view(1, 3, -1).to(weight.dtype)
    with torch.no_grad():
        return torch.equal(module(x), _normed(module, x))


def _normed(module: Any, x: Tensor) -> Tensor:
    made: Tensor = _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return made


class _Norm(torch.autograd.Function):
    """(..., width), normalized in float32, rounded, and times the weight (width,), as Llama's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).to(x.dtype).mul_(weight) if wide is not x else (wide * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        g = (grad * weight).float()
        unit = x * scale  # float32
        along = (g * unit).mean(-1, keepdim=True)
        return g.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), None, None
