"""One pass over examples of any lengths without padding: their tokens lie behind one another in one row.

What all of them begin with, such as a system prompt, is computed once. Only the attention needs to know where an example begins; it is
registered with transformers under a name of ours and lays the examples out side by side for itself. Whether that gives what the model
gives otherwise is tried out when it is loaded (`packs`); a model that mixes tokens elsewhere too reads padded rows. The head, the largest
product by far, is computed at the trained tokens only, and its gradient in the same go, so that no logits are kept.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saddlepoint.finetuning.head import head_loss
from saddlepoint.targets._tree import NotShared
from saddlepoint.targets.hf import HF
from saddlepoint.training import Encoded

NAME = "saddlepoint_packed"
PART = 1024  # tokens of one pass: enough for a core, little memory, and it ends within a second or two
SHORT = 256  # up to so many tokens, products of whole rows are several times faster on a processor than the fused kernel's blocks
_now = threading.local()


@dataclass(frozen=True)
class Layout:
    """How a part lies in its row: first what all examples begin with, then the rest of each.

    Args:
        shared: Tokens that all begin with.
        lengths: How many follow, of each example.
        at: int64 (tokens - shared,): their places among examples laid out side by side, each as wide as the longest.
    """

    shared: int
    lengths: tuple[int, ...]
    at: Tensor

    @property
    def width(self) -> int:
        return max(self.lengths)


def parts(batch: Sequence[Encoded], streams: int = 1) -> list[list[Encoded]]:
    """A batch cut into parts of at most `PART` tokens, or of one example, that `streams` may compute side by side.

    Examples that begin alike come together; so the order of a batch is not kept. Of many streams each takes less, for the memory.
    """
    ordered = sorted(batch, key=lambda e: e.ids)
    tokens, most = sum(len(e.ids) for e in ordered), min(PART, max(1, 4 * PART // streams))
    share = -(-tokens // (streams * max(1, -(-tokens // (streams * most)))))
    made: list[list[Encoded]] = []
    room = 0
    for example in ordered:
        if room <= 0 or (made and sum(len(e.ids) for e in made[-1]) + len(example.ids) > most):
            made.append([])
            room = share
        made[-1].append(example)
        room -= len(example.ids)
    return made


def packs(model: HF) -> bool:
    """Let a model read packed rows from now on, if it then computes what it computes of each row by itself."""
    before = model.model.config._attn_implementation
    rows = [[(7 * i + 3 * r) % 97 + 1 if i > 4 else i for i in range(12 + 5 * r)] for r in range(3)]
    with torch.no_grad():
        alone = torch.cat(
            [model.model.base_model(input_ids=model._pad_right([row]), use_cache=False).last_hidden_state[0, 5:] for row in rows]
        )
        model.model.config._attn_implementation = NAME
        try:
            together = _hidden(model, rows, 5)[5:] if getattr(model.model, "_supports_attention_backend", False) else alone * 2
        except NotShared:
            together = alone * 2
    if float((alone - together).norm() / alone.norm()) < (0.02 if model.model.dtype != torch.float32 else 1e-3):
        return True
    model.model.config._attn_implementation = before
    return False


def losses(model: HF, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """float32 (trained,), differentiable: the negative log-likelihood of every trained token, in nats, in order; bool (trained,): whether
    it was the most likely one."""
    rows = [e.ids[: max(i for i, token in enumerate(e.learned) if token != -100) + 1] for e in batch]  # nothing is read off what follows
    labels = [e.learned[: len(row)] for e, row in zip(batch, rows, strict=True)]
    if model.model.config._attn_implementation == NAME:
        shared = _beginning(rows, labels)
        hidden = _hidden(model, rows, shared)[shared:]
        flat = torch.tensor([token for own in labels for token in own[shared:]], device=model.device)
    else:
        states: Tensor = model.model.base_model(input_ids=model._pad_right(rows), use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1)
        flat = torch.tensor([token for own in labels for token in (own + [-100] * states.shape[1])[: states.shape[1]]], device=model.device)
    at = (flat != -100).nonzero().flatten()
    return head_loss(model, hidden[at], flat[at])


def _beginning(rows: Sequence[list[int]], labels: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with alike, before anything is trained in any of them."""
    first, last = min(rows), max(rows)  # what these two share, all share
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(map(len, rows)))
    shared = min(alike, *(next(i for i, token in enumerate(own) if token != -100) for own in labels))
    return shared if len(rows) > 1 and max(map(len, rows)) - shared <= SHORT else 0


def _hidden(model: HF, rows: Sequence[list[int]], shared: int) -> Tensor:
    """(tokens, width): the last hidden states of what the rows begin with, then of the rest of each."""
    lengths = tuple(len(row) - shared for row in rows)
    width = max(lengths)
    at = torch.cat([torch.arange(r * width, r * width + n, device=model.device) for r, n in enumerate(lengths)])
    _now.layout = Layout(shared, lengths, at)
    ids = [*rows[0][:shared], *(token for row in rows for token in row[shared:])]
    places = [*range(shared), *(i for row in rows for i in range(shared, len(row)))]
    given = {"input_ids": torch.tensor([ids], device=model.device), "position_ids": torch.tensor([places], device=model.device)}
    hidden: Tensor = model.model.base_model(**given, use_cache=False).last_hidden_state[0]
    return hidden


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **other: Any
) -> tuple[Tensor, None]:
    if any(other.get(name) is not None for name in ("softcap", "s_aux", "sliding_window")):
        raise NotShared
    layout: Layout = _now.layout
    n, width, shared = len(layout.lengths), layout.width, layout.shared
    scale = scaling or query.shape[-1] ** -0.5
    near, own = zip(*(torch.split(x[0], [shared, x.shape[2] - shared], dim=1) for x in (query, key, value)), strict=True)
    # (heads, tokens, width) -> (examples, heads, longest, width). What is filled in stands behind an example: it sees but is not seen.
    q, k, v = (
        _Spread.apply(x.transpose(0, 1), layout.at, n * width).view(n, width, x.shape[0], -1).transpose(1, 2)  # type: ignore[no-untyped-call]
        for x in own
    )
    made = _causal(q, k, v, scale, (near[1], near[2]) if shared else None).transpose(1, 2)
    rest = _Gather.apply(made.reshape(n * width, *made.shape[2:]), layout.at)  # type: ignore[no-untyped-call]
    if not shared:
        return rest[None], None
    first = _causal(near[0][None], near[1][None], near[2][None], scale)[0].transpose(0, 1)
    return torch.cat([first, rest])[None], None


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, near: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(n, heads, m, width): every token sees what stands before it in its row and all of `near`, keys and values (groups, c, width)."""
    n, heads, m, width = q.shape
    groups = k.shape[1]
    if m > SHORT:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != groups)
    q = (q * scale).reshape(n, groups, -1, width)  # query heads that read one key head are more rows of it
    scores = (q @ k.transpose(2, 3)).view(n, heads, m, m)
    later = torch.ones(m, m, dtype=torch.bool, device=q.device).triu_(1)
    scores = scores.float().masked_fill_(later, -torch.inf).view(n, groups, -1, m)
    if near is None:
        return (scores.softmax(-1).to(v.dtype) @ v).view(n, heads, m, -1)
    c = near[0].shape[1]
    folded = q.transpose(0, 1).reshape(groups, -1, width)
    far = (folded @ near[0].transpose(1, 2)).view(groups, n, -1, c).transpose(0, 1)
    p = torch.cat([far.float(), scores], -1).softmax(-1).to(v.dtype)
    seen = (p[..., :c].transpose(0, 1).reshape(groups, -1, c) @ near[1]).view(groups, n, -1, v.shape[-1]).transpose(0, 1)
    return (seen + p[..., c:] @ v).reshape(n, heads, m, -1)


class _Spread(torch.autograd.Function):
    """Rows (tokens, ...) laid out at `at` among `size` rows, the others zero. Its backward pass is a plain look-up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(at)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """The transpose of `_Spread`: the rows at `at`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.size = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
