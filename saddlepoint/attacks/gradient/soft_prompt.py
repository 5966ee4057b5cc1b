"""Soft prompt: embeddings behind the request, optimized freely; how low any control of that length could bring the loss.

Source:  Schwinn et al. 2024, "Soft Prompt Threats: Attacking Safety Alignment and Unlearning in Open-Source LLMs through
         the Embedding Space", https://arxiv.org/abs/2402.09063
Differs: Adam instead of signed gradient descent; the embeddings with the lowest loss are asked, not the last ones.
Cost:    num_steps gradients of one row, and one query per test_steps.
"""

from typing import Annotated

import torch
from annotated_types import Ge, Gt

from saddlepoint.attacks._gradient import framed, weights
from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Message, Steps, user


@attack(paper="https://arxiv.org/abs/2402.09063", access="white-box")
def soft_prompt(
    behavior: Behavior,
    ctx: Context,
    *,
    num_steps: Annotated[int, Ge(1)] = 100,
    lr: Annotated[float, Gt(0)] = 0.01,
    test_steps: Annotated[int, Ge(1)] = 25,
    init: str = "x x x x x x x x x x x x x x x x x x x x",
) -> Steps:
    """Lower the loss of the affirmative by the control's embeddings; ask with the best ones after every `test_steps` steps.

    No text stands for such embeddings, so no user can ask so. What is bounded is the loss of the affirmative and not the
    harm: far from all tokens, a model may say the affirmative and then go on with something else than what it knows.

    Args:
        num_steps: Adam steps.
        lr: Learning rate of Adam, in units of the embeddings.
        test_steps: Steps between two queries.
        init: The control whose embeddings are the beginning.
    """
    model = weights(ctx, "soft_prompt")
    frame = framed(model, behavior, init)
    embeds = model.embedding.detach()[frame.control].float().clone().requires_grad_()  # (L, width)
    adam = torch.optim.Adam([embeds], lr=lr)
    best, lowest = embeds.detach().clone(), float("inf")
    for step in range(1, num_steps + 1):
        loss = model.soft_loss(frame, embeds[None]).sum()
        if loss.item() < lowest:
            best, lowest = embeds.detach().clone(), loss.item()
        (embeds.grad,) = torch.autograd.grad(loss, embeds)
        adam.step()
        ctx.tell(f"step {step} of {num_steps}, loss {lowest:.3f}")
        if step % test_steps == 0 or step == num_steps:
            (*first, last) = user(behavior.prompt, behavior.system)
            soft = tuple(map(tuple, best.tolist()))
            (reply,) = yield [Ask((*first, Message(last.role, last.text, soft)))]
            if reply.unsafe:
                return
