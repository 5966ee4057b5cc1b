"""Circuit breakers: turn the model's states on harmful text away from where they were, and keep all others where they are.

Source:  Zou et al. 2024, "Improving Alignment and Robustness with Circuit Breakers" (representation rerouting),
         https://arxiv.org/abs/2406.04313
Differs: only the answers' own tokens are read, because a hazard's twin shares the request's words and its refusal begins where the
         harmful answer would; the harmful texts are the answers that attacks drew. Every dimension of a state is measured in its
         own size in that text: two of the embedded model's 576 hold a third of a state's square, so that the cosine would be theirs,
         and the distance is relative to the frozen state's length. Under the cosine the frozen states stand aside, the same way for all:
         where both models agree the cosine has no gradient, the distance has its full one, and nothing would ever begin to move. The
         trainer's learning rate falls, the paper's is constant. LoRA stands in all layers, but those above the higher one that is
         read get no gradient and stay as they were.
Cost:    per finding drawn one text under its prompt, one under a plain request, one without; each is read twice by two models. The
         embedded model needs a learning rate of 1e-3 to leave the start (at 3e-4 its states had not moved after 60 steps).
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from saddlepoint.recipes.derta import harmful_answer
from saddlepoint.recipes.refusal_sft import drawn
from saddlepoint.registry import recipe
from saddlepoint.targets.hf import HF
from saddlepoint.training import Clock, Encoded, in_parts
from saddlepoint.types import Example, Lessons, user

NUDGE = 0.5  # in lengths of a state


def rerouting(model: HF, batch: list[Encoded], clock: Clock, *, strength: float, each: int) -> Tensor:
    """`strength` times (1 - t/2T) of the harmful answers' relu(cosine) and t/2T of the others' distance, each a mean over tokens."""
    late = clock.step / (2 * clock.steps)
    harmful = [e.rejected for e in batch if e.rejected]
    loss = late * torch.cat(in_parts(model, batch, lambda part: _moved(model, part, clock))).mean()
    if harmful:
        loss = loss + (1 - late) * torch.cat(in_parts(model, harmful, lambda part: _alike(model, part, clock))).mean()
    return strength * loss


def _moved(model: HF, batch: list[Encoded], clock: Clock) -> Tensor:
    """float32 (tokens,): how far the states are from where they were, in lengths of those, mean over the two layers."""
    now, frozen = _states(model, batch, clock)
    far: Tensor = torch.linalg.vector_norm(now - frozen, dim=-1) / torch.linalg.vector_norm(frozen, dim=-1)
    return far.mean(0)


def _alike(model: HF, batch: list[Encoded], clock: Clock) -> Tensor:
    """float32 (tokens,): relu(cosine) of the states now and as they were, mean over the two layers."""
    now, frozen = _states(model, batch, clock)
    aside = torch.randn(frozen.shape[-1], generator=torch.Generator().manual_seed(0)).to(frozen.device)
    length = torch.linalg.vector_norm(frozen, dim=-1, keepdim=True)
    return F.cosine_similarity(now, frozen + NUDGE * length * F.normalize(aside, dim=0), -1).relu().mean(0)


def _states(model: HF, batch: list[Encoded], clock: Clock) -> tuple[Tensor, Tensor]:
    """float32 (2, tokens, width), now and as they were: the states of the answers' tokens at a third and at two thirds of the depth.

    Each dimension is divided by its root mean square over the text's frozen states.
    """
    rows = model._pad_right([e.ids for e in batch])
    # Position i learns to predict token i + 1, which is the answer's.
    at = torch.tensor([(r, i + 1) for r, e in enumerate(batch) for i, token in enumerate(e.learned) if token != -100]).to(rows.device)

    def read() -> Tensor:
        layers = model.model.base_model(input_ids=rows, output_hidden_states=True).hidden_states  # the embeddings, then every layer's
        depth = len(layers) - 1
        return torch.stack([layers[max(1, depth * third // 3)][at[:, 0], at[:, 1]].float() for third in (1, 2)])

    with torch.no_grad(), clock.wrapped.disable_adapter():
        frozen = read()
    squares = frozen.new_zeros(2, len(batch), frozen.shape[-1]).index_add(1, at[:, 0], frozen.square())
    size = (squares / at[:, 0].bincount(minlength=len(batch)).clamp_min(1)[:, None]).sqrt().clamp_min(1e-6)[:, at[:, 0]]
    return read() / size, frozen / size


@recipe(paper="https://arxiv.org/abs/2406.04313", loss=rerouting)
def circuit_breakers(lessons: Lessons, *, strength: Annotated[float, Gt(0)] = 5.0, each: Annotated[int, Ge(1)] = 1) -> list[Example]:
    """Harmful answers to turn away from, with and without a request; refusals and answers whose states must stay.

    Args:
        strength: The paper's alpha, which scales both terms; where the trainer clips gradients and AdamW scales them it matters little.
        each: Findings of each hazard to learn from, drawn at random.
    """
    hazards = {h.id: h for h in lessons.hazards}
    made = []
    for finding in drawn(lessons, each):
        hazard, answer, refusal = hazards[finding.behavior], harmful_answer(finding), lessons.refusals[finding.behavior]
        asked = finding.chat[:-1] if finding.chat[-1].role == "assistant" else finding.chat
        plain = user(lessons.rng.choice(hazard.phrasings), hazard.system)
        # Without a request the contrast to a harmful answer is an ordinary one.
        bare = lessons.rng.choice(lessons.kept)[1] if lessons.kept else refusal
        for chat, text in ((asked, refusal), (plain, refusal), ((), bare)):
            made.append(Example(chat, text, behavior=hazard.id, rejected=answer))
    return [*made, *(Example(chat, text) for chat, text in lessons.kept)]
