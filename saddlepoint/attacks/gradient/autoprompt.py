"""AutoPrompt: a universal trigger that changes one random slot at a time, and only where fresh behaviors agree.

Source:  Shin et al. 2020, "AutoPrompt: Eliciting Knowledge from Language Models with Automatically Generated Prompts",
         https://arxiv.org/abs/2010.15980
Differs: the loss is that of the request's affirmative, token by token, where the paper sums the probabilities of label
         words at one mask; one gradient over `batch` behaviors stands for the paper's accumulation over batches, because
         it is the same mean; the trigger begins with `init`, since a causal model has no [MASK]; a part of the train
         behaviors is set aside to pick the final trigger (with a single one, it serves for everything); fresh behaviors
         are drawn among those that the gradient did not see, where there are enough; a candidate must come back
         unchanged when each prompt is decoded and tokenized again.
Cost:    num_steps * batch * (1 gradient + up to candidates + 1 losses), once for a campaign, and the losses of
         the dev behaviors after each change; then 1 query per behavior.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt

from saddlepoint.attacks._gradient import artifact_chat, best_tokens, framed, gradient, losses, sample, survivors, swapped, weights
from saddlepoint.registry import attack
from saddlepoint.types import Artifact, Ask, Behavior, Context, Place, Steps


def find(
    behaviors: Sequence[Behavior],
    ctx: Context,
    *,
    place: Place,
    num_steps: int,
    candidates: int,
    batch: int,
    dev: float,
    init: str,
    ascii_only: bool,
) -> Artifact:
    """Change one random slot in each step, keep it if fresh behaviors agree, and pick the trigger by the dev behaviors."""
    model = weights(ctx, "autoprompt")
    generator = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
    allowed = model.candidates(ascii_only)
    every = [framed(model, b, init, place) for b in behaviors]
    mixed = sample(every, len(every), ctx)
    held = max(1, round(dev * len(mixed)))
    devs, trains = mixed[:held], mixed[held:] or mixed
    trigger = best = every[0].control  # (L,)
    lowest = float(losses(model, devs, best[None], best))
    falls = [lowest]
    for step in range(1, num_steps + 1):
        seen = sample(trains, batch, ctx)
        unseen = [f for f in trains if all(f is not s for s in seen)]
        fresh = sample(unseen if len(unseen) >= len(seen) else trains, batch, ctx)
        slot = int(torch.randint(len(trigger), (1,), generator=generator))
        grad = gradient(model, seen, trigger)  # (L, vocabulary), mean over all batches
        top = best_tokens(grad, allowed, candidates)[slot]
        tried = torch.cat([trigger[None], survivors(model, every, swapped(trigger, slot, top), place)])
        found = losses(model, fresh, tried, trigger)
        if float(found.min()) < float(found[0]):
            trigger = tried[found.argmin()]
            loss = float(losses(model, devs, trigger[None], trigger))
            if loss < lowest:
                lowest, best = loss, trigger
        falls.append(lowest)
        ctx.tell(f"step {step} of {num_steps}, loss on dev behaviors {lowest:.3f}")
    return Artifact("autoprompt", model.text(best), place, (model.name,), tuple(b.id for b in behaviors), tuple(falls))


@attack(paper="https://arxiv.org/abs/2010.15980", access="white-box", fit=find)
def autoprompt(
    behavior: Behavior,
    ctx: Context,
    *,
    place: Place = "suffix",
    num_steps: Annotated[int, Ge(1)] = 100,
    candidates: Annotated[int, Ge(1)] = 10,
    batch: Annotated[int, Ge(1)] = 8,
    dev: Annotated[float, Gt(0), Lt(1)] = 0.25,
    init: str = "! ! ! ! ! ! ! ! ! !",
    ascii_only: bool = True,
) -> Steps:
    """Ask once with the trigger that the search found on train behaviors.

    Args:
        place: Where the trigger stands; the paper puts it between text and mask, that is behind the request.
        num_steps: Slots tried.
        candidates: Tokens that the gradient names for a slot and whose true loss is computed.
        batch: Behaviors over which the gradient is accumulated, and again as many fresh ones on which candidates are scored.
        dev: Share of the train behaviors that only picks the final trigger.
        init: The trigger to begin with; its token count stays.
        ascii_only: Whether the trigger holds ASCII only.
    """
    yield [Ask(artifact_chat(behavior, ctx, "autoprompt"))]
