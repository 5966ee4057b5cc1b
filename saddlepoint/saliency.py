"""Which tokens of a request decide how a model begins its answer, and what to write instead: fast enough to follow typing.

Source:  leave-one-out: Li, Monroe and Jurafsky 2016, https://arxiv.org/abs/1612.08220; gradient times embedding: Denil et al.
         2014, https://arxiv.org/abs/1412.6815; replacements and insertions by gradient: Ebrahimi et al. 2018 (HotFlip),
         https://arxiv.org/abs/1712.06751; as a help for people who write attacks: Wallace et al. 2019,
         https://arxiv.org/abs/1809.02701
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.types import Chat, WhiteBox

Suggestion = tuple[str, float]
"""Text, and by how many nats the gradient expects it to lower the loss of the affirmative (first order)."""


@dataclass(frozen=True)
class Saliency:
    """One token of the last user message.

    Args:
        text: The token as it is written, with its space.
        leave_one_out: By how many nats the loss of the affirmative rises without the token; positive: it helps the affirmative.
        gradient: Gradient times embedding, in nats, with the same sign: what is expected of moving its embedding to zero.
        replacements: Tokens to write in its place, the most promising first.
        insertions: Tokens to write before it.
    """

    text: str
    leave_one_out: float
    gradient: float
    replacements: tuple[Suggestion, ...]
    insertions: tuple[Suggestion, ...]


@dataclass(frozen=True)
class Explained:
    """What decides an answer. `loss` is the mean negative log-likelihood of the affirmative in nats."""

    affirmative: str
    loss: float
    tokens: tuple[Saliency, ...]


def saliency(
    model: WhiteBox, chat: Chat, affirmative: str, *, first: int = 4, suggestions: int = 5, exact: bool = False, ascii_only: bool = True
) -> Explained:
    """Explain by the last user message of `chat` how likely an answer begins with `affirmative`.

    Args:
        chat: A chat whose last message is the user's, and not empty.
        first: How many tokens of the affirmative are explained: the first ones decide whether the others follow.
        suggestions: Replacements and insertions for each token.
        exact: Leave each token out for good, as if it had never been written, which costs some ten times more. Otherwise
            it is hidden from the answer only, and the other tokens keep what they have read from it.
        ascii_only: Suggest only such characters.

    Raises:
        UsageError: There is no user message, it or the affirmative has no tokens, or the context is too short.
    """
    last = max((i for i, m in enumerate(chat) if m.role == "user"), default=-1)
    text = chat[last].text if last >= 0 else ""
    bare = tuple(type(m)(m.role, "") if i == last else m for i, m in enumerate(chat))
    frame = model.frame(bare, text, affirmative)
    said = frame.affirmative[:first]
    row = torch.cat([frame.before, frame.control, frame.after, said])
    start, length, scored = len(frame.before), len(frame.control), len(said)
    grad = model.gradient(row, slice(start, start + length), scored)  # (length, vocabulary)
    shorter = [torch.cat([row[:i], row[i + 1 :]]) for i in range(start, start + length)]
    loss, *without = model.loss([row, *shorter], scored, near=row, exact=exact).tolist()
    now = grad.gather(1, frame.control[:, None])  # (length, 1): gradient times embedding
    allowed = model.candidates(ascii_only)
    swap = _best(model, now - grad, allowed, frame.control, suggestions)
    insert = _best(model, _inserted(grad, frame.control), allowed, None, suggestions)
    return Explained(
        model.text(said),
        loss,
        tuple(Saliency(model.text(frame.control[i : i + 1]), without[i] - loss, -float(now[i]), swap[i], insert[i]) for i in range(length)),
    )


def _inserted(grad: Tensor, control: Tensor) -> Tensor:
    """float32 (length, vocabulary): expected gain of each token before each place: a run of flips, as HotFlip counts it."""
    length = len(control)
    # Writing at place i moves every later token one place on: place j gets what stood at j - 1.
    moved = torch.zeros(length + 1)
    for j in range(length - 1, 0, -1):
        moved[j] = moved[j + 1] + float(grad[j, control[j]] - grad[j, control[j - 1]])
    gain = grad.gather(1, control[:, None]) - grad + moved[1:, None].to(grad.device)
    flips = torch.arange(length, 0, -1, device=grad.device)
    result: Tensor = gain / (2 * flips[:, None]).sqrt()
    return result


def _best(model: WhiteBox, gains: Tensor, allowed: Tensor, own: Tensor | None, k: int) -> Sequence[tuple[Suggestion, ...]]:
    gains = gains.masked_fill(~allowed, -torch.inf)
    if own is not None:  # a token is no replacement of itself
        gains = gains.scatter(1, own[:, None], -torch.inf)
    top = gains.topk(min(k, gains.shape[1]), dim=1)
    found = zip(top.indices, top.values.tolist(), strict=True)
    return [tuple((model.text(i[None]), v) for i, v in zip(ids, values, strict=True) if v > -torch.inf) for ids, values in found]
