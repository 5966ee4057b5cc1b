"""ARCA: coordinate ascent over an input and an output at once, for an output that is looked for and likely after the input.

Source:  Jones et al. 2023, "Automatically Auditing Large Language Models via Discrete Optimization",
         https://arxiv.org/abs/2303.04381
Differs: x is the control behind the request (with request=False alone, as the paper audits), y begins with the
         behavior's affirmative, which stays, and goes on with `outputs` free slots. Where the paper's phi counts toxic
         tokens, phi(y) counts the different tokens of `words` in the free slots: an attacker knows the topic, but not the
         answer. The best candidate is only taken where it raises the objective. A control must come back unchanged when
         the prompt is decoded and tokenized again; an output need not, for it is never written.
Cost:    sweeps * (length + outputs) * (1 gradient of `averaged` rows + up to `candidates` losses), and at most one query
         per sweep.
"""

from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from saddlepoint.attacks._gradient import averaged_gradient, best_tokens, framed, random_tokens, row, slots, survivors, swapped, weights
from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Frame, Steps, WhiteBox, user


@attack(paper="https://arxiv.org/abs/2303.04381", access="white-box")
def arca(
    behavior: Behavior,
    ctx: Context,
    *,
    sweeps: Annotated[int, Ge(1)] = 10,
    outputs: Annotated[int, Ge(0)] = 4,
    candidates: Annotated[int, Ge(1)] = 32,
    averaged: Annotated[int, Ge(1)] = 8,
    lam: Annotated[float, Ge(0)] = 0.5,
    words: str = "",
    request: bool = True,
    init: str = "! ! ! ! ! ! ! !",
    ascii_only: bool = True,
) -> Steps:
    """Raise phi(y) + lam * log p(y | x) slot by slot; after each sweep that changed the control, ask with it.

    Args:
        sweeps: Passes over all slots of the control and of the output, at most.
        outputs: Free slots of the output behind the affirmative.
        candidates: Best tokens of a slot whose objective is computed exactly (the paper's 32 or 64).
        averaged: Random tokens over which a slot's gradient is averaged (the paper's k).
        lam: Weight of the log-probability of the output, in 1 / nats.
        words: What the output should speak of; the words of the request if empty.
        request: Whether the request stands before the control; without it, the control alone must bring the output out.
        init: The control to begin with; its token count stays.
        ascii_only: Whether new tokens hold ASCII only.
    """
    model = weights(ctx, "arca")
    asked_for = behavior.prompt if request else ""
    frame = framed(model, replace(behavior, prompt=asked_for), init)
    generator = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
    wanted = _tokens_of(model, words or behavior.prompt)
    writable = model.candidates(ascii_only)
    y = torch.cat([frame.affirmative, random_tokens(writable, (outputs,), generator)])
    opening = len(frame.affirmative)
    x, asked = frame.control, None
    best = objective(model, replace(frame, affirmative=y), x[None], y[None], wanted, opening, lam)[0]
    for sweep in range(1, sweeps + 1):
        for slot in range(len(x) + outputs):
            joint = replace(frame, control=x, affirmative=y)
            drawn = random_tokens(writable, (averaged,), generator)
            if slot < len(x):
                allowed = writable.index_fill(0, y, False)  # else the control would only say the output first
                top = best_tokens(averaged_gradient(model, joint, slot, drawn)[None], allowed, candidates)[0]
                xs = survivors(model, [frame], swapped(x, slot, top))
                ys = y.expand(len(xs), -1)
            else:
                at = opening + slot - len(x)
                scores = lam * output_scores(model, joint, at, drawn) + gain(y, at, wanted, opening)
                ys = swapped(y, at, best_tokens(-scores[None], writable, candidates)[0])
                xs = x.expand(len(ys), -1)
            if len(xs):
                found = objective(model, joint, xs, ys, wanted, opening, lam)
                if float(found.max()) > float(best):
                    best, x, y = found.max(), xs[found.argmax()], ys[found.argmax()]
        ctx.tell(f"sweep {sweep} of {sweeps}, objective {float(best):.3f}, output {model.text(y)!r}")
        text = model.text(x)
        if text != asked:
            asked = text
            (reply,) = yield [Ask(user(asked_for + text, behavior.system))]
            if reply.unsafe:
                return


def objective(model: WhiteBox, frame: Frame, xs: Tensor, ys: Tensor, wanted: Tensor, opening: int, lam: float) -> Tensor:
    """float32 (n,): phi(y) + lam * log p(y | x) in nats, of inputs (n, L) and outputs (n, T) near the control of `frame`."""
    n = len(xs)
    each = torch.cat([frame.before.expand(n, -1), xs, frame.after.expand(n, -1), ys], dim=1)
    likely = -model.loss(each, ys.shape[1], row(frame, frame.control)) * ys.shape[1]
    phi = torch.stack([wanted[y[opening:].unique()].sum() for y in ys])
    return phi + lam * likely


def gain(y: Tensor, at: int, wanted: Tensor, opening: int) -> Tensor:
    """float32 (vocabulary,): what each token at position `at` of the output (T,) would add to phi."""
    others = torch.cat([y[opening:at], y[at + 1 :]])
    return wanted.index_fill(0, others, 0.0)


def output_scores(model: WhiteBox, frame: Frame, at: int, drawn: Tensor) -> Tensor:
    """float32 (vocabulary,): log p(v | what stands before) exactly, and the first-order part of log p of what follows v.

    A token is itself predicted, which is no matter of its embedding, so only what follows it needs a gradient.
    """
    end = slots(frame).stop + len(frame.after) + at
    embeds = model.embedding.detach()[frame.control][None]
    with torch.no_grad():
        exact = model.soft_logprobs(frame, embeds, slice(end, end + 1))[0, 0]
    rest = frame.affirmative[at + 1 :]
    if not len(rest):
        return exact
    # The slot of the output takes the place of a control, and what follows it that of an affirmative.
    begun = torch.cat([frame.before, frame.control, frame.after, frame.affirmative[:at]])
    behind = Frame(begun, frame.affirmative[at : at + 1], frame.after[:0], rest)
    return exact - len(rest) * averaged_gradient(model, behind, 0, drawn)


def _tokens_of(model: WhiteBox, words: str) -> Tensor:
    """float32 (vocabulary,): 1 for each token with which the words of five letters and more are written (or all, if none is), else 0."""
    long = " ".join(w for w in words.split() if sum(c.isalpha() for c in w) >= 5) or words
    ids = model.frame(user("."), long, ".").control
    return torch.zeros(len(model.embedding), device=ids.device).index_fill(0, ids, 1.0)
