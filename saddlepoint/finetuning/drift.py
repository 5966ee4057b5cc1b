"""How far fine-tuning moved the first tokens of answers: a sign of lost safety that needs no judge and no attack.

Source: Qi et al. 2024, "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", https://arxiv.org/abs/2406.05946: most of
        what safety training does lies in the first tokens of an answer, and harmful fine-tuning moves those most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saddlepoint.targets.hf import HF
from saddlepoint.types import Chat

_ROWS = 16  # chats of one pass


@torch.inference_mode()
def drift(base: HF, tuned: HF, answered: Sequence[tuple[Chat, str]], tokens: int) -> list[float]:
    """KL(tuned || base) in nats, mean over the first `tokens` tokens of each answer, which is the base's own.

    Args:
        tuned: It reads the same tokens as `base`.
    """
    found: list[float] = []
    for start in range(0, len(answered), _ROWS):
        for p, q in zip(*(_first(m, answered[start : start + _ROWS], tokens) for m in (tuned, base)), strict=True):
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def _first(model: HF, answered: Sequence[tuple[Chat, str]], tokens: int) -> list[Tensor]:
    """For each answer: float32 (at most `tokens`, vocabulary), the log-probabilities at its first tokens."""
    cut = [(model.prompt_ids(chat), model.ids(text)[:tokens]) for chat, text in answered]
    hidden = model.model.base_model(input_ids=model._pad_right([a + b for a, b in cut])).last_hidden_state
    at = [slice(len(a) - 1, len(a) - 1 + max(1, len(b))) for a, b in cut]  # an empty answer has its first token all the same
    return [model.head(hidden[r, s]).float().log_softmax(-1) for r, s in enumerate(at)]
