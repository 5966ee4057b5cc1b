"""UAT-LM: a universal trigger that the language model itself finds likely, so that it reads as text.

Source:  Mehrabi et al. 2022, "Robust Conversational Agents against Imperceptible Toxicity Triggers",
         https://arxiv.org/abs/2205.02392
Differs: the trigger's own loss is that under the target, in its place in the chat, and enters the gradient of every step,
         not only the choice among candidates: through what each token predicts and through how well it is predicted;
         the loss of each request's affirmative stands for that of the paper's fixed toxic texts; a candidate must come
         back unchanged when each prompt is decoded and tokenized again.
Cost:    restarts * sweeps * length * batch * (2 gradients + candidates losses of affirmative and trigger), once for a
         campaign; then 1 query per behavior.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from saddlepoint.attacks._gradient import (
    artifact_chat,
    best_tokens,
    different_starts,
    framed,
    gradient,
    losses,
    random_control,
    sample,
    slots,
    survivors,
    swapped,
    weights,
)
from saddlepoint.registry import attack
from saddlepoint.types import Artifact, Ask, Behavior, Context, Frame, Place, Steps, WhiteBox


def find(
    behaviors: Sequence[Behavior],
    ctx: Context,
    *,
    weight: float,
    place: Place,
    length: int,
    sweeps: int,
    candidates: int,
    batch: int,
    restarts: int,
    ascii_only: bool,
) -> Artifact:
    """From random tokens, change one slot after the other where that lowers the sum, until a sweep changes nothing."""
    model = weights(ctx, "uat_lm")
    generator = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
    allowed = model.candidates(ascii_only)
    every = [framed(model, b, "the", place) for b in behaviors]
    seen: list[tuple[float, Tensor]] = []  # (loss over all behaviors, trigger) at the start and after each sweep

    def total(frames: Sequence[Frame], controls: Tensor, near: Tensor) -> Tensor:
        own = weight * fluency(model, frames, controls) if weight else 0.0
        return losses(model, frames, controls, near) + own

    for restart in range(restarts):
        trigger = random_control(model, every, allowed, length, place, generator)  # (L,)
        every = [replace(f, control=trigger) for f in every]
        frames = sample(every, batch, ctx)
        seen.append((float(total(every, trigger[None], trigger)), trigger))
        for sweep in range(sweeps):
            begun = trigger
            for slot in range(len(trigger)):
                grad = gradient(model, frames, trigger) + (weight * fluency_gradient(model, frames, trigger) if weight else 0)
                tokens = best_tokens(grad, allowed, candidates)[slot]
                tried = torch.cat([trigger[None], survivors(model, every, swapped(trigger, slot, tokens), place)])
                found = total(frames, tried, trigger)
                trigger = tried[found.argmin()] if float(found.min()) < float(found[0]) else trigger
            seen.append((float(total(every, trigger[None], trigger)), trigger))
            ctx.tell(f"start {restart + 1} of {restarts}, sweep {sweep + 1} of at most {sweeps}, loss {seen[-1][0]:.3f}")
            if trigger.equal(begun):
                break
    best = min(seen, key=lambda scored: scored[0])[1]
    falls = tuple(accumulate((loss for loss, _ in seen), min))
    return Artifact("uat_lm", model.text(best), place, (model.name,), tuple(b.id for b in behaviors), falls)


@attack(paper="https://arxiv.org/abs/2205.02392", access="white-box", fit=find)
def uat_lm(
    behavior: Behavior,
    ctx: Context,
    *,
    weight: Annotated[float, Ge(0)] = 1.0,
    place: Place = "prefix",
    length: Annotated[int, Ge(1)] = 6,
    sweeps: Annotated[int, Ge(1)] = 5,
    candidates: Annotated[int, Ge(1)] = 40,
    batch: Annotated[int, Ge(1)] = 8,
    restarts: Annotated[int, Ge(1)] = 1,
    ascii_only: bool = True,
) -> Steps:
    """Ask once with the trigger that the search found on train behaviors.

    Args:
        weight: Weight of the trigger's own loss; 0 leaves the affirmative's alone.
        place: Where the trigger stands.
        length: Tokens of the trigger.
        sweeps: Passes over all slots, at most.
        candidates: Tokens per slot that the gradient names and whose true loss is computed.
        batch: Train behaviors in one search.
        restarts: Searches from random tokens, of which the best trigger is taken.
        ascii_only: Whether the trigger holds ASCII only.
    """
    yield [Ask(artifact_chat(behavior, ctx, "uat_lm"))]


def fluency(model: WhiteBox, frames: Sequence[Frame], controls: Tensor) -> Tensor:
    """float32 (n,): mean negative log-likelihood in nats of the tokens of `controls` (n, L), mean over what stands before them."""
    begun = [torch.cat([f.before.expand(len(controls), -1), controls], dim=1) for f in different_starts(frames)]
    return torch.stack([model.loss(rows, controls.shape[1], rows[0]) for rows in begun]).mean(0)


def fluency_gradient(model: WhiteBox, frames: Sequence[Frame], control: Tensor) -> Tensor:
    """float32 (L, vocabulary): gradient of that by the one-hots of `control` (L,), both as inputs and as what is predicted."""
    found = []
    with torch.no_grad():
        for f in different_starts(frames):
            predicted = -model.soft_logprobs(f, model.embedding[control][None], slots(f))[0]  # (L, vocabulary)
            if len(control) > 1:
                predicted = predicted + (len(control) - 1) * model.gradient(torch.cat([f.before, control]), slots(f), len(control) - 1)
            found.append(predicted / len(control))
    return torch.stack(found).mean(0)
