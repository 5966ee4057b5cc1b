"""Tensor steps that the gradient attacks share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saddlepoint.errors import UsageError
from saddlepoint.types import Behavior, Chat, Context, Frame, Place, Reduce, WhiteBox, user


def weights(ctx: Context, attack: str) -> WhiteBox:
    """The target's weights, or an error that says what to do."""
    if ctx.whitebox is None:
        raise UsageError(f"{attack} needs the target's weights; run it on a local model, and replay what it finds on an endpoint")
    return ctx.whitebox


def framed(model: WhiteBox, behavior: Behavior, control: str, place: Place = "suffix") -> Frame:
    """The behavior's request with a control in its place, and what the model is pushed to answer."""
    return model.frame(user(behavior.prompt, behavior.system), control, behavior.affirmative.strip() or "Sure, here is", place)


def slots(frame: Frame) -> slice:
    """Where the control stands in a row."""
    return slice(len(frame.before), len(frame.before) + len(frame.control))


def row(frame: Frame, control: Tensor) -> Tensor:
    """int64 (length,): the whole prompt and the affirmative, with `control` (L,) in its place."""
    return torch.cat([frame.before, control, frame.after, frame.affirmative])


def rows(frame: Frame, controls: Tensor) -> Tensor:
    """int64 (n, length): the same for `controls` (n, L)."""
    n = len(controls)
    return torch.cat([frame.before.expand(n, -1), controls, frame.after.expand(n, -1), frame.affirmative.expand(n, -1)], dim=1)


def losses(model: WhiteBox, frames: Sequence[Frame], controls: Tensor, near: Tensor | None) -> Tensor:
    """float32 (n,): loss of each of `controls` (n, L), mean over `frames`; `near` (L,) is a control that they resemble."""
    each = [model.loss(rows(f, controls), len(f.affirmative), None if near is None else row(f, near)) for f in frames]
    return torch.stack(each).mean(0)


def gradient(model: WhiteBox, frames: Sequence[Frame], control: Tensor) -> Tensor:
    """float32 (L, vocabulary): gradient of the mean loss over `frames` by the one-hot of each token of `control` (L,)."""
    return torch.stack([model.gradient(row(f, control), slots(f), len(f.affirmative)) for f in frames]).mean(0)


def averaged_gradient(model: WhiteBox, frame: Frame, slot: int, drawn: Tensor) -> Tensor:
    """float32 (vocabulary,): gradient of the loss by the one-hot in `slot`, averaged over the tokens `drawn` (k,) put there."""
    embeds = model.embedding.detach()[swapped(frame.control, slot, drawn)].requires_grad_()  # (k, L, width)
    (by_embedding,) = torch.autograd.grad(model.soft_loss(frame, embeds).sum(), embeds)
    return (by_embedding[:, slot].mean(0) @ model.embedding.detach().T).float()


def best_tokens(grad: Tensor, allowed: Tensor, k: int) -> Tensor:
    """int64 (L, k): for each slot the `k` allowed tokens whose gradient promises the lowest loss, best first."""
    return (-grad).masked_fill(~allowed, -torch.inf).topk(min(k, int(allowed.sum())), dim=1).indices


def propose(control: Tensor, grad: Tensor, allowed: Tensor, width: int, topk: int, n_replace: int, generator: torch.Generator) -> Tensor:
    """Draw different candidates that differ from `control` in `n_replace` slots, evenly over the slots (GCG).

    Args:
        control: int64 (L,).
        grad: float32 (L, vocabulary), gradient of the loss by each one-hot.
        allowed: bool (vocabulary,).
        topk: Tokens per slot from which candidates are drawn.

    Returns:
        int64 (at most width, L).
    """
    length = len(control)
    top = best_tokens(grad, allowed, topk)
    # Evenly spaced slots, as in the authors' code: each gets width / length candidates. They begin anywhere, because
    # with fewer candidates than slots some slots would else never change.
    number = torch.arange(width)
    even = number * length // width
    first = even + torch.randint(length, (1,), generator=generator)
    places = torch.stack([(first + k * max(1, length // n_replace)) % length for k in range(n_replace)], dim=1)  # (width, n_replace)
    picks = torch.randint(top.shape[1], places.shape, generator=generator)
    # The first of the changed tokens is drawn without replacement, so that no candidate is drawn twice.
    order = torch.rand(length, top.shape[1], generator=generator).argsort(1)
    picks[:, 0] = order[places[:, 0], (number - (even * width + length - 1) // length) % top.shape[1]]  # the how-manieth of its slot
    drawn = control.repeat(width, 1).scatter(1, places.to(control.device), top[places, picks].to(control.device))
    different: Tensor = torch.unique(drawn, dim=0)
    return different


def is_sure(model: WhiteBox, frame: Frame, control: Tensor | None = None) -> bool:
    """Whether every token of the affirmative is more likely than all others together, so that greedy decoding writes it."""
    whole = row(frame, frame.control if control is None else control)
    return float(model.loss([whole], len(frame.affirmative), reduce=lambda losses: losses.amax(1))) < math.log(2)


def mellowmax(alpha: float) -> Reduce:
    """A soft maximum over the tokens' losses: log(mean(exp(alpha * x))) / alpha (Asadi and Littman 2017)."""
    return lambda losses: (torch.logsumexp(alpha * losses, dim=1) - math.log(losses.shape[1])) / alpha


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two float tensors (n,), in [-1, 1]; 0 where one of them is constant."""
    if len(a) < 2 or float(a.std()) == 0 or float(b.std()) == 0:
        return 0.0
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def draft_losses(draft: WhiteBox, model: WhiteBox, behavior: Behavior, controls: Tensor) -> Tensor:
    """float32 (n,): losses of controls (n, L) of `model` under a draft model, which reads them as text with its own tokens."""
    frames = [framed(draft, behavior, model.text(control).strip()) for control in controls]
    return draft.loss([row(f, f.control) for f in frames], len(frames[0].affirmative), row(frames[0], frames[0].control)).to(
        controls.device
    )


def swapped(control: Tensor, slot: int, tokens: Tensor) -> Tensor:
    """int64 (k, L): `control` (L,) with each of `tokens` (k,) in `slot`."""
    many = control.repeat(len(tokens), 1)
    many[:, slot] = tokens
    return many


def survivors(model: WhiteBox, frames: Sequence[Frame], controls: Tensor, place: Place | None = None) -> Tensor:
    """int64 (m, L): those of `controls` (n, L), each once and in order, that are read in every one of `frames` as they are written.

    With a `place` the model must also read them as these tokens where `Artifact.applied` puts their text, with its own spaces.
    """
    once = controls[sorted({tuple(c): i for i, c in reversed(list(enumerate(controls.tolist())))}.values())]
    for frame in frames:
        once = once[model.survives(frame, once)] if len(once) else once
    if place is None:
        return once
    texts = [model.text(control).lstrip() for control in once]
    return once[[bool(t) and model.frame(user("."), t, ".", place).control.equal(c) for c, t in zip(once, texts, strict=True)]]


def random_tokens(allowed: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """int64 of that shape: tokens drawn evenly from `allowed`, bool (vocabulary,)."""
    pool = allowed.nonzero().flatten()
    return pool[torch.randint(len(pool), shape, generator=generator).to(pool.device)]


def random_control(
    model: WhiteBox, frames: Sequence[Frame], allowed: Tensor, length: int, place: Place, generator: torch.Generator
) -> Tensor:
    """int64 (length,): random allowed tokens that survive in `frames`; the frames' own control where 256 draws hold none."""
    found = survivors(model, frames, random_tokens(allowed, (256, length), generator), place)
    return found[0] if len(found) else frames[0].control


def sample(frames: Sequence[Frame], n: int, ctx: Context) -> list[Frame]:
    """At most `n` of the frames, drawn at random."""
    return ctx.rng.sample(list(frames), min(n, len(frames)))


def different_starts(frames: Sequence[Frame]) -> list[Frame]:
    """The frames whose tokens before the control differ: one of all for a control that stands before every request."""
    return list({tuple(f.before.tolist()): f for f in frames}.values())


def artifact_chat(behavior: Behavior, ctx: Context, attack: str) -> Chat:
    """The request with what the attack's own search found, or an error that says that there is nothing."""
    if ctx.artifact is None:
        raise UsageError(f"{attack} asks with the text that its search finds on train behaviors, and there is none; run it in a campaign")
    return user(ctx.artifact.applied(behavior.prompt), behavior.system)
