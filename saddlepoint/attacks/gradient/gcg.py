"""GCG: a suffix found token by token with gradients, so that the model begins its answer with the affirmative.

Source:  Zou et al. 2023, "Universal and Transferable Adversarial Attacks on Aligned Language Models",
         https://arxiv.org/abs/2307.15043
Differs: a candidate must come back unchanged when the whole prompt, not the suffix alone, is decoded and tokenized
         again, because tokens merge with their neighbors; the best suffix seen is tested, not the last; equal candidates
         are evaluated once; the search judge's word on a whole answer ends it, not a match of the first tokens.
Cost:    num_steps * (1 gradient + up to search_width forward passes), and one query per test_steps.
"""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from saddlepoint.errors import UsageError
from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Steps, user


@attack(paper="https://arxiv.org/abs/2307.15043", access="white-box")
def gcg(
    behavior: Behavior,
    ctx: Context,
    *,
    num_steps: Annotated[int, Ge(1)] = 100,
    search_width: Annotated[int, Ge(1)] = 64,
    topk: Annotated[int, Ge(1)] = 256,
    n_replace: Annotated[int, Ge(1)] = 1,
    optim_str_init: str = "! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !",
    allow_non_ascii: bool = False,
    filter_ids: bool = True,
    test_steps: Annotated[int, Ge(1)] = 10,
) -> Steps:
    """Search a suffix by greedy coordinate gradient; try the best one on the model after every `test_steps` steps.

    Args:
        num_steps: Gradient steps.
        search_width: Candidates drawn in each step (the paper's B, 512).
        topk: Tokens per slot from which candidates are drawn.
        n_replace: Slots changed in one candidate.
        optim_str_init: The suffix to begin with; its token count stays.
        allow_non_ascii: Whether candidates may hold other characters.
        filter_ids: Drop candidates that do not survive decoding and tokenizing.
        test_steps: Steps between two queries.
    """
    model = ctx.whitebox
    if model is None:
        raise UsageError("gcg needs the target's weights; run it on a local model")
    chat = user(behavior.prompt, behavior.system)
    frame = model.frame(chat, optim_str_init, behavior.affirmative.strip() or "Sure, here is")
    generator = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
    allowed = model.candidates(ascii_only=not allow_non_ascii)
    at = slice(len(frame.before), len(frame.before) + len(frame.control))
    span = slice(at.stop + len(frame.after), at.stop + len(frame.after) + len(frame.affirmative))

    control = best = frame.control  # (length,)
    lowest = float("inf")
    for step in range(1, num_steps + 1):
        row = torch.cat([frame.before, control, frame.after, frame.affirmative])
        grad = model.gradient(row, at, span)  # (length, vocabulary)
        drawn = torch.unique(propose(control, grad, allowed, search_width, topk, n_replace, generator), dim=0)
        if filter_ids:
            drawn = drawn[model.survives(frame, drawn)]
        if len(drawn):
            n = len(drawn)
            parts = (frame.before.expand(n, -1), drawn, frame.after.expand(n, -1), frame.affirmative.expand(n, -1))
            losses = model.loss(torch.cat(parts, dim=1), span)  # (n,)
            # The best candidate is taken even where it is worse than the present one: GCG does not climb greedily.
            control = drawn[losses.argmin()]
            if float(losses.min()) < lowest:
                lowest, best = float(losses.min()), control
        if step % test_steps == 0 or step == num_steps:
            (reply,) = yield [Ask(user(behavior.prompt + model.text(best), behavior.system))]
            if reply.unsafe:
                return


def propose(control: Tensor, grad: Tensor, allowed: Tensor, width: int, topk: int, n_replace: int, generator: torch.Generator) -> Tensor:
    """Draw candidates that differ from `control` in `n_replace` slots, evenly over the slots.

    Args:
        control: int64 (length,).
        grad: float32 (length, vocabulary), gradient of the loss by each one-hot.
        allowed: bool (vocabulary,).

    Returns:
        int64 (width, length).
    """
    length = len(control)
    scores = (-grad).masked_fill(~allowed, -torch.inf)
    top = scores.topk(min(topk, int(allowed.sum())), dim=1).indices  # (length, topk)
    rows = control.repeat(width, 1)
    # Evenly spaced slots, as in the authors' code: each gets width / length candidates. They begin anywhere, because
    # with fewer candidates than slots some slots would else never change.
    first = torch.arange(width) * length // width + torch.randint(length, (1,), generator=generator)
    slots = torch.stack([(first + k * max(1, length // n_replace)) % length for k in range(n_replace)], dim=1)  # (width, n_replace)
    picks = torch.randint(top.shape[1], slots.shape, generator=generator)
    return rows.scatter(1, slots.to(rows.device), top[slots, picks].to(rows.device))
