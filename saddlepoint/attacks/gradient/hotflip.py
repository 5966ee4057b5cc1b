"""HotFlip: a beam search over flips, insertions and deletions of tokens, each chosen by its directional derivative.

Source:  Ebrahimi et al. 2018, "HotFlip: White-Box Adversarial Examples for Text Classification",
         https://arxiv.org/abs/1712.06751
Differs: the symbols are the model's tokens, not characters, and only the control may change, not the request. A run of
         flips ends at the token behind the control, whose slot an insertion fills and a deletion empties, as the paper's
         words end at their padding. The loss is that of the affirmative (of a classifier: of the wanted label), to be
         lowered. Every member of the beam is ranked by its true loss, not by the sum of estimates; a candidate must come
         back unchanged when the prompt is decoded and tokenized again; the paper's limits on meaning (embedding
         cosine, part of speech) have no sense for an appended control.
Cost:    edits * beam * (1 gradient + up to `candidates` losses), and at most one query per edit.
"""

from math import sqrt
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from saddlepoint.attacks._gradient import framed, row, slots, weights
from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Frame, Steps, WhiteBox, user

Scored = tuple[float, Tensor]  # (loss in nats, control (L,))


@attack(paper="https://arxiv.org/abs/1712.06751", access="white-box")
def hotflip(
    behavior: Behavior,
    ctx: Context,
    *,
    edits: Annotated[int, Ge(1)] = 20,
    beam: Annotated[int, Ge(1)] = 2,
    candidates: Annotated[int, Ge(1)] = 48,
    operations: Literal["all", "flip"] = "all",
    init: str = "! ! ! ! ! ! ! ! ! !",
    ascii_only: bool = True,
) -> Steps:
    """Edit the control `edits` times; try the best one on the model whenever an edit has made it better.

    Args:
        edits: Edits in a row (the paper's r).
        beam: Controls that are kept after each edit (the paper's b).
        candidates: Most promising edits of each control whose true loss is computed.
        operations: "all" flips, inserts and deletes; "flip" keeps the length.
        init: The control to begin with.
        ascii_only: Whether new tokens hold ASCII only.
    """
    model = weights(ctx, "hotflip")
    frame = framed(model, behavior, init)
    allowed = model.candidates(ascii_only)
    start = frame.control
    kept: list[Scored] = [(float(model.loss([row(frame, start)], len(frame.affirmative))), start)]
    best, asked, seen = kept[0], None, {tuple(start.tolist())}
    for step in range(1, edits + 1):
        tried: list[Scored] = []
        for _, control in kept:
            promising = _edited(model, frame, control, allowed, operations, candidates, seen)
            if promising:
                near = row(frame, control)
                losses = model.loss([row(frame, c) for c in promising], len(frame.affirmative), near)
                tried += zip(losses.tolist(), promising, strict=True)
        kept = sorted(tried, key=lambda scored: scored[0])[:beam]
        best = min([best, *kept], key=lambda scored: scored[0])
        ctx.tell(f"edit {step} of {edits}, loss {best[0]:.3f}")
        text = model.text(best[1])
        if text != asked:
            asked = text
            (reply,) = yield [Ask(user(behavior.prompt + text, behavior.system))]
            if reply.unsafe:
                return
        if not kept:
            return


def _edited(
    model: WhiteBox, frame: Frame, control: Tensor, allowed: Tensor, operations: str, n: int, seen: set[tuple[int, ...]]
) -> list[Tensor]:
    """The `n` most promising edits of a control that survive and were not made before; they are noted in `seen`."""
    at = slots(frame)
    behind = frame.after[:1]  # its slot is the last of every run
    grad = model.gradient(row(frame, control), slice(at.start, at.start + len(control) + len(behind)), len(frame.affirmative))
    flips, inserts, deletes = gains(grad, torch.cat([control, behind]), len(control))
    flips, inserts = (g.masked_fill(~allowed, -torch.inf) for g in (flips, inserts))
    all_gains = [flips.flatten(), *([inserts.flatten(), deletes] if operations == "all" else [])]
    best = torch.cat(all_gains).topk(min(4 * n, sum(map(len, all_gains)))).indices.tolist()  # four times as many: some do not survive
    found: list[Tensor] = []
    for edit in best:
        slot, token = divmod(edit, len(allowed))
        word = control.new_tensor([token])
        if edit < flips.numel():
            new = torch.cat([control[:slot], word, control[slot + 1 :]]) if allowed[token] else control
        elif edit < flips.numel() + inserts.numel():
            slot -= len(flips)
            new = torch.cat([control[:slot], word, control[slot:]]) if allowed[token] else control
        else:
            slot = edit - flips.numel() - inserts.numel()
            new = torch.cat([control[:slot], control[slot + 1 :]])
        if len(found) < n and len(new) and tuple(new.tolist()) not in seen and bool(model.survives(frame, new[None])):
            seen.add(tuple(new.tolist()))
            found.append(new)
    return found


def gains(grad: Tensor, tokens: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """First-order fall of the loss by each edit, divided by the length sqrt(2 N) of its change of N one-hots.

    Args:
        grad: float32 (length or length + 1, vocabulary), gradient of the loss by each one-hot.
        tokens: int64, the control (length,) and, where there is one, the token behind it.

    Returns:
        Flips (length, vocabulary); insertions before each slot and at the end (length + 1, vocabulary); deletions (length,).
    """
    n = len(tokens)
    own = grad.gather(1, tokens[:, None])  # (n, 1): derivative of the present token of each slot
    to = own - grad  # (n, vocabulary): fall of the loss when the slot takes a token
    changes = (torch.arange(grad.shape[1], device=grad.device) != tokens[:, None]).float()
    # Moving each token one slot to the right (into slots 1..n-1) or to the left (into slots 0..n-2), summed to the end.
    moved = (tokens[1:] != tokens[:-1]).float()
    right, left = to[1:].gather(1, tokens[:-1, None])[:, 0], to[:-1].gather(1, tokens[1:, None])[:, 0]
    ends = to.new_zeros(1)
    sum_right, sum_left, sum_moved = (torch.cat([x.flip(0).cumsum(0).flip(0), ends]) for x in (right, left, moved))  # (n,)
    inserts = (to + sum_right[:, None]) / (2 * (changes + sum_moved[:, None])).clamp(min=2).sqrt()
    if n == length:  # nothing stands behind the control: an insertion at its end has no derivative
        inserts = torch.cat([inserts, torch.full_like(inserts[:1], -torch.inf)])
    deletes = (sum_left / (2 * sum_moved).clamp(min=2).sqrt())[:length]
    return to[:length] / sqrt(2), inserts, deletes
