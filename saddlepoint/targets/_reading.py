"""What a model makes of a text without answering: how likely each token of it is, and one vector for all of it."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from saddlepoint.targets.hf import HF

_AT_ONCE = 64  # positions whose logits are computed at once
_ROWS = 16  # texts that are read at once


@torch.inference_mode()
def likelihoods(model: HF, ids: Sequence[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of each token but the first: its log-probability in nats behind those before it, and the `top` likeliest tokens with theirs."""
    found = []
    row = torch.tensor(ids, device=model.device)
    with model._lock:
        hidden = model.model.base_model(input_ids=row[None, :-1], use_cache=False).last_hidden_state[0]
        for states, drawn in zip(torch.split(hidden, _AT_ONCE), torch.split(row[1:], _AT_ONCE), strict=True):
            spread = model.head(states).log_softmax(-1)
            own, best = spread.gather(1, drawn[:, None])[:, 0].tolist(), spread.topk(top)
            likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found += [(p, list(zip(*pair, strict=True))) for p, pair in zip(own, likely, strict=True)]
    return found


@torch.inference_mode()
def vectors(model: HF, rows: Sequence[Sequence[int]], pooling: Literal["mean", "last"]) -> Tensor:
    """float32 (n, width), each of length 1: the mean, or the last, of the last hidden states of each row's tokens.

    The model was trained to write and not to tell texts apart: near texts lie near one another, and a model made for it does better.
    """
    found = torch.zeros(len(rows), model.embedding.shape[1])
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for batch in (order[i : i + _ROWS] for i in range(0, len(order), _ROWS)):
        padded = model._pad_right([list(rows[i]) for i in batch])
        with model._lock:
            hidden = model.model.base_model(input_ids=padded, use_cache=False).last_hidden_state.float()
        for r, i in enumerate(batch):
            states = hidden[r, : len(rows[i])]
            found[i] = states.mean(0) if pooling == "mean" else states[-1]
    return torch.nn.functional.normalize(found, dim=1)
