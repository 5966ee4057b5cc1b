"""GCG-Multi: one suffix for many behaviors, and for several models at once, so that it transfers.

Source:  Zou et al. 2023, "Universal and Transferable Adversarial Attacks on Aligned Language Models", algorithm 2,
         https://arxiv.org/abs/2307.15043
Differs: the next behavior is added when every token of all present affirmatives is more likely than not, or when its share
         of the steps is spent, so that each is reached; models that read other tokens score a suffix as text; a candidate
         must survive decoding and tokenizing in each request.
Cost:    num_steps * behaviors * models * (1 gradient + up to search_width candidates) once for a campaign, then 1 query.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from saddlepoint.attacks._gradient import artifact_chat, framed, is_sure, propose, row, slots, weights
from saddlepoint.registry import attack
from saddlepoint.types import Artifact, Ask, Behavior, Context, Frame, Steps, WhiteBox


def find(
    behaviors: Sequence[Behavior],
    ctx: Context,
    *,
    num_steps: int,
    search_width: int,
    topk: int,
    n_behaviors: int,
    progressive: bool,
    also: tuple[WhiteBox, ...],
    optim_str_init: str,
    allow_non_ascii: bool,
) -> Artifact:
    """Search the suffix on some of `behaviors`; see `gcg_multi` for the parameters."""
    models = (weights(ctx, "gcg_multi"), *also)
    generator = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
    chosen = ctx.rng.sample(list(behaviors), min(n_behaviors, len(behaviors)))
    share = max(1, num_steps // len(chosen))
    text = best = optim_str_init
    lowest, active, spent, curve = float("inf"), 1 if progressive else len(chosen), 0, []
    for step in range(1, num_steps + 1):
        frames = {model: [framed(model, b, text) for b in chosen[:active]] for model in models}
        pool = [
            c for readers in _same_tokens(frames) for c in _candidates(readers, frames, search_width, topk, not allow_non_ascii, generator)
        ]
        if pool:
            losses = torch.stack([_losses(model, frames[model], chosen[0], pool) for model in models]).mean(0)
            text = pool[int(losses.argmin())]
            if float(losses.min()) < lowest:
                lowest, best = float(losses.min()), text
        curve.append(lowest)
        ctx.tell(f"step {step} of {num_steps}, {active} of {len(chosen)} behaviors, loss {lowest:.3f}")
        spent += 1
        sure = all(is_sure(model, f) for model in models for f in (framed(model, b, best) for b in chosen[:active]))
        if sure and active == len(chosen):
            break
        if active < len(chosen) and (sure or spent >= share):
            active, spent, lowest = active + 1, 0, float("inf")  # losses over other behaviors do not compare
    return Artifact("gcg_multi", best.strip(), "suffix", tuple(m.name for m in models), tuple(b.id for b in behaviors), tuple(curve))


@attack(paper="https://arxiv.org/abs/2307.15043", access="white-box", fit=find)
def gcg_multi(
    behavior: Behavior,
    ctx: Context,
    *,
    num_steps: Annotated[int, Ge(1)] = 100,
    search_width: Annotated[int, Ge(1)] = 64,
    topk: Annotated[int, Ge(1)] = 256,
    n_behaviors: Annotated[int, Ge(1)] = 8,
    progressive: bool = True,
    also: tuple[WhiteBox, ...] = "",  # type: ignore[assignment]
    optim_str_init: str = "x x x x x x x x x x x x x x x x x x x x",
    allow_non_ascii: bool = False,
) -> Steps:
    """Ask with the suffix that was found on train behaviors.

    Args:
        num_steps: Gradient steps in all.
        search_width: Candidates drawn in each step for each vocabulary.
        topk: Tokens per slot from which candidates are drawn.
        n_behaviors: Train behaviors that the suffix is searched on.
        progressive: Begin with one behavior and add the others one by one.
        also: Further models on which the suffix must work, as text with commas: 'organism, path/to/another'.
        optim_str_init: The suffix to begin with.
        allow_non_ascii: Whether candidates may hold other characters.
    """
    yield [Ask(artifact_chat(behavior, ctx, "gcg_multi"))]


def _same_tokens(frames: dict[WhiteBox, list[Frame]]) -> list[list[WhiteBox]]:
    """The models in groups that read the suffix as the same tokens of the same vocabulary."""
    groups: dict[tuple[int, ...], list[WhiteBox]] = {}
    for model, (first, *_) in frames.items():
        groups.setdefault((len(model.embedding), *first.control.tolist()), []).append(model)
    return list(groups.values())


def _candidates(
    readers: list[WhiteBox], frames: dict[WhiteBox, list[Frame]], width: int, topk: int, ascii_only: bool, generator: torch.Generator
) -> list[str]:
    """Suffixes drawn by the readers' gradients, each divided by its norm per slot and then summed."""
    control = frames[readers[0]][0].control
    grads = [model.gradient(row(f, control), slots(f), len(f.affirmative)) for model in readers for f in frames[model]]
    total = torch.stack([g / g.norm(dim=1, keepdim=True).clamp_min(1e-12) for g in grads]).sum(0)
    drawn = propose(control, total, readers[0].candidates(ascii_only), width, topk, 1, generator)
    alive = torch.stack([model.survives(f, drawn) for model in readers for f in frames[model]]).all(0)
    return [readers[0].text(c).strip() for c in drawn[alive]]


def _losses(model: WhiteBox, frames: list[Frame], first: Behavior, pool: list[str]) -> Tensor:
    """float32 (n,): loss of each suffix, mean over the frames."""
    controls = [framed(model, first, text).control for text in pool]
    return torch.stack([model.loss([row(f, c) for c in controls], len(f.affirmative), near=row(f, f.control)) for f in frames]).mean(0)
