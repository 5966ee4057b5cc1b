"""One forward pass over many rows that resemble one row: what they share with it is taken from its keys and values.

Every row's own tokens are packed behind one another, without padding; a token attends to the keys of the near row that
stand before it and are not replaced, and to its own row's tokens up to itself. The rest of the model sees one long row.
It serves any model that takes its attention from the transformers registry; `NotShared` says that one does not.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "saddlepoint_tree"
BLOCK = 128  # tokens whose keys are computed, kept and used again together
_now = threading.local()


class NotShared(Exception):
    """The model's attention cannot be computed this way; compute the rows in full."""


@dataclass
class Keys:
    """The keys and values of one row: a (1, heads, tokens, width) pair for each layer."""

    row: Tensor  # int64 (tokens,)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def beginning(a: Tensor, b: Tensor) -> int:
    """How many tokens two rows begin with alike."""
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).int().cumprod(0).sum())


@dataclass(frozen=True)
class Branch:
    """Rows that compute as many positions each. Their tokens lie packed at `start`, row after row."""

    start: int
    own: Tensor  # int64 (n, m): the positions that each row computes, rising
    kept: Tensor  # int64 (c,): the positions whose keys are taken from the near row
    bias: Tensor  # (n or 1, m, c + m): 0 where a token may look, else -inf

    @property
    def stop(self) -> int:
        return self.start + self.own.numel()


def branch(start: int, own: Tensor, kept: Tensor, dtype: torch.dtype, hidden: Tensor | None = None) -> Branch:
    """A branch whose rows see of the near row what stands before and is not their own.

    Args:
        own: int64 (n, m).
        kept: int64 (c,).
        hidden: int64 (n,): a position of the near row that a row does not see either; -1 for none.
    """
    rows = own if hidden is not None or bool((own != own[:1]).any()) else own[:1]
    near = (kept[None, None] < rows[:, :, None]) & ~(kept[None, :, None] == rows[:, None]).any(2)[:, None]
    if hidden is not None:
        near = near & (kept[None] != hidden[:, None])[:, None]
    sees = torch.cat([near, rows[:, None] <= rows[:, :, None]], dim=2)
    return Branch(start, own, kept, torch.zeros(sees.shape, dtype=dtype, device=own.device).masked_fill_(~sees, -torch.inf))


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """While it is open, the model of `config` attends as the thread's branches say."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def shared(near: Keys | None, branches: Sequence[Branch], collect: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While it is open, these are the thread's branches, and its own keys are collected if wanted."""
    caught: list[tuple[Tensor, Tensor]] = []
    _now.near, _now.branches, _now.caught = near, branches, caught if collect else None
    try:
        yield caught
    finally:
        _now.near = _now.branches = _now.caught = None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **other: Any
) -> tuple[Tensor, None]:
    window = other.get("sliding_window")
    if (
        other.get("softcap") is not None
        or other.get("s_aux") is not None
        or (window and any(int(b.own.max()) >= window for b in _now.branches))
    ):
        raise NotShared
    if _now.caught is not None:
        _now.caught.append((key, value))
    _, heads, tokens, width = query.shape
    groups = key.shape[1]
    folded = heads // groups  # query heads that read one key head; they are laid out as more rows of it
    parts = []
    for b in _now.branches:
        n, m = b.own.shape
        span = slice(b.start, b.stop)
        q = query[0, :, span].reshape(groups, folded, n, m, width).permute(2, 0, 1, 3, 4).reshape(n, groups, folded * m, width)
        k, v = (x[0, :, span].reshape(groups, n, m, x.shape[-1]).transpose(0, 1) for x in (key, value))
        near_k, near_v = (x[0, :, b.kept] for x in _now.near.layers[module.layer_idx]) if len(b.kept) else (k[0, :, :0], v[0, :, :0])
        bias = b.bias.repeat(1, folded, 1)[:, None]
        if not (query.is_cuda or torch.is_grad_enabled()):
            o = _apart(q, k, v, near_k, near_v, bias, scaling or width**-0.5)
        else:
            k, v = (torch.cat([x.expand(n, -1, -1, -1), own], dim=2) for x, own in ((near_k, k), (near_v, v)))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
        parts.append(o.reshape(n, groups, folded, m, v.shape[-1]).permute(0, 3, 1, 2, 4).reshape(n * m, heads, v.shape[-1]))
    return torch.cat(parts)[None], None


def _apart(q: Tensor, k: Tensor, v: Tensor, near_k: Tensor, near_v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attention (n, g, r, width) with the near keys (g, c, width) never copied for each of the n rows.

    On a processor, and where each row has a mask of its own, it takes half the time of the fused kernel.
    """
    n, g, r, width = q.shape
    c = near_k.shape[1]
    q = q.float() * scaling  # scores in float32, as the fused kernel has them
    scores = torch.empty(n, g, r, c + k.shape[2])
    scores[..., :c] = torch.bmm(q.transpose(0, 1).reshape(g, n * r, width), near_k.float().transpose(1, 2)).view(g, n, r, c).transpose(0, 1)
    scores[..., c:] = torch.matmul(q, k.float().transpose(2, 3))
    p = scores.add_(bias).softmax(-1).to(v.dtype)
    far = torch.bmm(p[..., :c].transpose(0, 1).reshape(g, n * r, c), near_v).view(g, n, r, -1).transpose(0, 1)
    return far + torch.matmul(p[..., c:], v)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
