"""UAT: one trigger for every request, found by a beam search over the tokens that the mean gradient of a batch names.

Source:  Wallace et al. 2019, "Universal Adversarial Triggers for Attacking and Analyzing NLP",
         https://arxiv.org/abs/1908.07125
Differs: the loss is that of each request's affirmative after trigger and request, as in the paper's classification
         experiments, not of fixed texts after the trigger alone; a batch is drawn anew for every sweep, and the best
         trigger is the one with the lowest loss over all train behaviors after any sweep; the first restart begins with
         `init` (the paper's repeated "the"), the others with random tokens; a candidate must come back unchanged when
         each prompt is decoded and tokenized again.
Cost:    restarts * sweeps * (beam * length * candidates * batch losses + batch gradients + one loss per behavior), once
         for a campaign; then 1 query per behavior.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge

from saddlepoint.attacks._gradient import (
    artifact_chat,
    best_tokens,
    framed,
    gradient,
    losses,
    random_control,
    sample,
    survivors,
    swapped,
    weights,
)
from saddlepoint.registry import attack
from saddlepoint.types import Artifact, Ask, Behavior, Context, Place, Steps


def find(
    behaviors: Sequence[Behavior],
    ctx: Context,
    *,
    place: Place,
    sweeps: int,
    candidates: int,
    beam: int,
    batch: int,
    restarts: int,
    init: str,
    ascii_only: bool,
) -> Artifact:
    """Sweep over the trigger's slots from left to right until a sweep changes nothing; keep the best trigger of all."""
    model = weights(ctx, "uat")
    generator = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
    allowed = model.candidates(ascii_only)
    every = [framed(model, b, init, place) for b in behaviors]
    best = every[0].control  # (L,)
    lowest = float(losses(model, every, best[None], best))
    falls = [lowest]
    for restart in range(restarts):
        trigger = every[0].control if not restart else random_control(model, every, allowed, len(best), place, generator)
        for sweep in range(sweeps):
            frames = sample(every, batch, ctx)
            grad = gradient(model, frames, trigger)  # (L, vocabulary)
            top = best_tokens(grad, allowed, candidates)  # (L, candidates)
            kept = [(float(losses(model, frames, trigger[None], trigger)), trigger)]
            for slot in range(len(trigger)):
                found = list(kept)  # the present token stays a candidate, so no step makes the trigger worse
                for _, control in kept:
                    tried = survivors(model, every, swapped(control, slot, top[slot]), place)
                    if len(tried):
                        found += zip(losses(model, frames, tried, control).tolist(), tried, strict=True)
                different = {tuple(control.tolist()): (loss, control) for loss, control in reversed(found)}
                kept = sorted(different.values(), key=lambda scored: scored[0])[:beam]
            changed, trigger = not kept[0][1].equal(trigger), kept[0][1]
            loss = float(losses(model, every, trigger[None], trigger))
            if loss < lowest:
                lowest, best = loss, trigger
            falls.append(lowest)
            ctx.tell(f"start {restart + 1} of {restarts}, sweep {sweep + 1} of at most {sweeps}, loss {lowest:.3f}")
            if not changed:
                break
    return Artifact("uat", model.text(best), place, (model.name,), tuple(b.id for b in behaviors), tuple(falls))


@attack(paper="https://arxiv.org/abs/1908.07125", access="white-box", fit=find)
def uat(
    behavior: Behavior,
    ctx: Context,
    *,
    place: Place = "prefix",
    sweeps: Annotated[int, Ge(1)] = 5,
    candidates: Annotated[int, Ge(1)] = 40,
    beam: Annotated[int, Ge(1)] = 1,
    batch: Annotated[int, Ge(1)] = 8,
    restarts: Annotated[int, Ge(1)] = 1,
    init: str = "the the the the the the",
    ascii_only: bool = True,
) -> Steps:
    """Ask once with the trigger that the search found on train behaviors.

    Args:
        place: Where the trigger stands; the paper puts it before the text.
        sweeps: Passes over all slots, at most.
        candidates: Tokens per slot that the gradient names and whose true loss is computed.
        beam: Triggers that are kept from slot to slot.
        batch: Train behaviors in one sweep.
        restarts: Searches, of which the best trigger is taken.
        init: The trigger to begin with; its token count stays.
        ascii_only: Whether the trigger holds ASCII only.
    """
    yield [Ask(artifact_chat(behavior, ctx, "uat"))]
