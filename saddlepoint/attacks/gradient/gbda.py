"""GBDA: a distribution over the control's tokens, trained by Gumbel-softmax so that its samples bring the affirmative out.

Source:  Guo et al. 2021, "Gradient-based Adversarial Attacks against Text Transformers",
         https://arxiv.org/abs/2104.13733
Differs: the control is optimized, not the request. The margin loss is taken over the affirmative's tokens, not over two
         classes. The fluency term uses the target itself as the language model, with the request before the control.
         The similarity term is not BERTScore: it matches each token of `init` with its nearest token of the control in
         the model's own input embeddings, by cosine, without contexts and without weights of words; it is off by
         default, because an appended control has no meaning to keep. The best samples are asked in the order of their
         loss, and a sample must come back unchanged when the whole prompt is decoded and tokenized again.
Cost:    num_steps gradients of `samples` rows, then `draws` losses and up to `queries` queries.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from saddlepoint.attacks._gradient import framed, row, rows, slots, survivors, weights
from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Frame, Steps, WhiteBox, user


@attack(paper="https://arxiv.org/abs/2104.13733", access="white-box")
def gbda(
    behavior: Behavior,
    ctx: Context,
    *,
    num_steps: Annotated[int, Ge(1)] = 100,
    samples: Annotated[int, Ge(1)] = 4,
    lr: Annotated[float, Gt(0)] = 0.3,
    temperature: Annotated[float, Gt(0)] = 1.0,
    start: Annotated[float, Ge(0)] = 12.0,
    loss: Literal["ce", "margin"] = "ce",
    kappa: Annotated[float, Ge(0)] = 5.0,
    fluency: Annotated[float, Ge(0)] = 0.1,
    similarity: Annotated[float, Ge(0)] = 0.0,
    draws: Annotated[int, Ge(1)] = 100,
    queries: Annotated[int, Ge(1)] = 3,
    init: str = "! ! ! ! ! ! ! ! ! !",
    ascii_only: bool = True,
) -> Steps:
    """Train the distribution for `num_steps`, draw `draws` controls from it, and ask with the best ones until one succeeds.

    Args:
        num_steps: Adam steps.
        samples: Gumbel samples in a step (the paper's 10).
        lr: Learning rate of Adam.
        temperature: Of the Gumbel-softmax; towards 0 its samples are one-hots.
        start: Logit of the tokens of `init` at the beginning, where all others have 0 (the paper's 15).
        loss: "ce" is the negative log-likelihood of the affirmative; "margin" ends where each token leads by `kappa`.
        kappa: That lead, in logits.
        fluency: Weight of the control's own negative log-likelihood (the paper's 1).
        similarity: Weight of 1 - the control's similarity to `init` (the paper's 1).
        draws: Hard samples drawn from the final distribution.
        queries: How many of them are asked, at most.
        init: The control to begin with; its token count stays.
        ascii_only: Whether the control holds ASCII only.
    """
    model = weights(ctx, "gbda")
    frame = framed(model, behavior, init)
    generator = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
    allowed = model.candidates(ascii_only)
    allowed[frame.control] = True
    tokens = allowed.nonzero().flatten()  # (v,): the distribution is over these alone
    table = model.embedding.detach()[tokens].float()  # (v, width)
    theta = start * (frame.control[:, None] == tokens).float()  # (L, v)
    theta.requires_grad_()
    adam = torch.optim.Adam([theta], lr=lr)
    for step in range(1, num_steps + 1):
        noise = -torch.empty(samples, *theta.shape).exponential_(generator=generator).log().to(theta.device)
        soft = ((theta + noise) / temperature).softmax(-1)  # (samples, L, v)
        adversarial, unlikely, unlike = terms(model, frame, soft, tokens, table, kappa if loss == "margin" else None)
        total = (adversarial + fluency * unlikely + similarity * unlike).mean()
        (theta.grad,) = torch.autograd.grad(total, theta)
        adam.step()
        ctx.tell(f"step {step} of {num_steps}, soft loss {float(adversarial.detach().mean()):.3f}")
    with torch.no_grad():
        drawn = torch.multinomial(theta.softmax(-1).cpu(), draws, replacement=True, generator=generator).T.to(tokens.device)
        hard = tokens[torch.cat([theta.argmax(-1)[None], drawn])]  # (draws + 1, L)
        read = survivors(model, [frame], torch.cat([frame.control[None], hard]))
        if not len(read):
            read = frame.control[None]
        order = model.loss(rows(frame, read), len(frame.affirmative), row(frame, hard[0])).argsort()[:queries]
    for control in read[order]:
        (reply,) = yield [Ask(user(behavior.prompt + model.text(control), behavior.system))]
        if reply.unsafe:
            return


def terms(model: WhiteBox, frame: Frame, soft: Tensor, tokens: Tensor, table: Tensor, kappa: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of the loss for soft controls, each float32 (n,) and differentiable by them.

    Args:
        soft: float32 (n, L, v), probabilities of the `tokens` in each slot.
        tokens, table: int64 (v,) and their embeddings, float32 (v, width).
        kappa: Lead in logits that is enough; None takes the negative log-likelihood.

    Returns:
        The affirmative's loss; the control's soft negative log-likelihood in nats per token; 1 - its similarity to the start.
    """
    embeds = soft @ table  # (n, L, width)
    at, end = slots(frame), len(row(frame, frame.control))
    logprobs = model.soft_logprobs(frame, embeds, slice(at.start, end))  # (n, L + after + affirmative, vocabulary)
    said = logprobs[:, -len(frame.affirmative) :]
    wanted = said.gather(2, frame.affirmative.expand(len(soft), -1)[..., None])[..., 0]  # (n, affirmative)
    if kappa is None:
        adversarial = -wanted.mean(1)
    else:
        others = said.scatter(2, frame.affirmative.expand(len(soft), -1)[..., None], -torch.inf).amax(2)
        adversarial = (others - wanted + kappa).clamp(min=0).mean(1)
    own = logprobs[:, : soft.shape[1]].index_select(2, tokens)
    unlikely = -(soft * own).sum(2).mean(1)
    begun = F.normalize(model.embedding.detach()[frame.control].float(), dim=-1)  # (L, width)
    matched = (F.normalize(embeds, dim=-1) @ begun.T).amax(1)  # (n, L): for each token of `init`, its nearest slot
    return adversarial, unlikely, 1 - matched.mean(1)
