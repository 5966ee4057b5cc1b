"""One pass over examples of any lengths without padding: their tokens lie behind one another in one row.

Only the attention needs to know where an example begins; it is registered with transformers under a name of ours and lays the
examples out side by side for itself. A model that does not take its attention from there reads padded rows. The head, the largest
product by far, is computed at the trained tokens only, and its gradient in the same go, so that no logits are kept.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saddlepoint.targets._tree import NotShared
from saddlepoint.targets.hf import HF
from saddlepoint.training import Encoded

NAME = "saddlepoint_packed"
PART = 1024  # tokens of one pass: enough for the cores, little memory, and it ends within a second or two
LOGITS = 1 << 23  # logits at once
_now = threading.local()


def parts(batch: Sequence[Encoded]) -> list[list[Encoded]]:
    """A batch cut, in order, into parts of at most `PART` tokens, or of one example."""
    made: list[list[Encoded]] = []
    for example in batch:
        if made and sum(len(e.ids) for e in made[-1]) + len(example.ids) <= PART:
            made[-1].append(example)
        else:
            made.append([example])
    return made


def losses(model: HF, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """float32 (trained,), differentiable: the negative log-likelihood of every trained token, in nats, in order; bool (trained,): whether
    it was the most likely one."""
    rows = [e.ids[: max(i for i, token in enumerate(e.learned) if token != -100) + 1] for e in batch]  # nothing is read off what follows
    lengths = [len(row) for row in rows]
    labels = [e.learned[:n] for e, n in zip(batch, lengths, strict=True)]
    if getattr(model.model, "_supports_attention_backend", False):
        try:
            ids, places = ([x for row in part for x in row] for part in (rows, map(range, lengths)))
            with _packed(model.model.config, lengths):
                at = torch.tensor([places], device=model.device)
                hidden = model.model.base_model(input_ids=torch.tensor([ids], device=model.device), position_ids=at, use_cache=False)
            flat = torch.tensor([x for row in labels for x in row], device=model.device)
            return _head(model, hidden.last_hidden_state[0][flat != -100], flat[flat != -100])
        except NotShared:
            pass
    hidden = model.model.base_model(input_ids=model._pad_right(rows), use_cache=False).last_hidden_state
    width = hidden.shape[1]
    padded = torch.tensor([row + [-100] * (width - len(row)) for row in labels], device=model.device)
    return _head(model, hidden[padded != -100], padded[padded != -100])


@contextmanager
def _packed(config: Any, lengths: list[int]) -> Iterator[None]:
    """While it is open, the model of `config` takes its one row for examples of these lengths."""
    before = config._attn_implementation
    config._attn_implementation, _now.lengths = NAME, lengths
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **other: Any
) -> tuple[Tensor, None]:
    lengths = _now.lengths
    n, width = len(lengths), max(lengths)
    window = other.get("sliding_window")
    if other.get("softcap") is not None or other.get("s_aux") is not None or (window and width > window):
        raise NotShared
    at = torch.cat([torch.arange(r * width, r * width + length) for r, length in enumerate(lengths)]).to(query.device)
    # (1, heads, tokens, width) -> (examples, heads, longest, width). What is filled in stands behind an example, so it sees but is not seen.
    q, k, v = (
        _Spread.apply(x[0].transpose(0, 1), at, n * width).view(n, width, *x.shape[1:2], -1).transpose(1, 2) for x in (query, key, value)
    )
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return _Gather.apply(o.transpose(1, 2).reshape(n * width, *o.shape[1:2], -1), at)[None], None


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


def _head(model: HF, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods and hits of labels (trained,) by the hidden states (trained, width) before them."""
    size = max(1, LOGITS // len(model.embedding))
    chunks = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    if any(p.requires_grad for p in model.model.get_output_embeddings().parameters()):
        made = [(F.cross_entropy(logits := model.head(h), y, reduction="none"), logits.argmax(-1) == y) for h, y in chunks]
    else:
        made = [_HeadLoss.apply(h, y, model.head) for h, y in chunks]
    return torch.cat([nll for nll, _ in made]), torch.cat([hit for _, hit in made])


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen head. A token's loss depends on its own hidden state only, so the gradient is made at once and scaled later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted):
            own = hidden.detach().requires_grad_(wanted)
            logits = head(own)
            nll = F.cross_entropy(logits, labels, reduction="none")
            if wanted:
                ctx.save_for_backward(*torch.autograd.grad(nll.sum(), own))
        hit = logits.detach().argmax(-1) == labels
        ctx.mark_non_differentiable(hit)
        return nll.detach(), hit

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (by_hidden,) = ctx.saved_tensors
        return (grad[:, None] * by_hidden).to(by_hidden.dtype), None, None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
