"""Refusal steering: where a request reads like a hazard, the direction of refusing is added to the model's activations.

Source:  Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", https://arxiv.org/abs/2406.11717;
         Turner et al. 2023, "Activation Addition", https://arxiv.org/abs/2308.10248; the condition is that of Lee et al. 2024,
         "Programming Refusal with Conditional Activation Steering", https://arxiv.org/abs/2409.05907
Differs: refusing is told from answering by the same hazards under clearance, where the policy knows one, and else by the twins:
         what differs is then the refusal and not the subject. The condition is a projection for each kind of request that must be
         answered (twins, hazards under clearance, ordinary ones), and all of them must be passed; it is read at the last token
         of the request, before any prefill. Like Arditi's, the addition is made at every position.
Cost:    one forward pass over the request, by itself, so that the decision does not depend on what shares the batch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor

from saddlepoint.defenses._stack import charged
from saddlepoint.defenses.generation._activations import hooked, request_ids, states
from saddlepoint.defenses.generation._decode import bare, below
from saddlepoint.errors import UsageError
from saddlepoint.policies import ordinary
from saddlepoint.registry import defense
from saddlepoint.types import Behavior, Chat, Completion, Query, Target, user

ORDINARY = 25  # requests


@dataclass(frozen=True, eq=False)
class _Found:
    """What calibration has found: float32 tensors (width,).

    Args:
        refusing: From answering to refusing.
        gates: Of each kind that must be answered, the direction to the hazards and the least projection that counts as one.
    """

    refusing: Tensor
    gates: tuple[tuple[Tensor, float], ...]


@defense(paper="https://arxiv.org/abs/2406.11717")
@dataclass(frozen=True)
class RefusalSteering:
    """Add `coefficient` times the refusal direction where a request lies beyond the threshold.

    Args:
        inner: The target that is defended.
        coefficient: In units of the difference of means; 0 changes nothing.
        depth: Which layer's output is read and changed, as a share of all layers.
        threshold: Where a request counts as a hazard, between the mean of the twins or the ordinary requests (0) and of the hazards (1).
        clearance: The same, between the mean of the hazards under clearance (0) and without (1).
    """

    inner: Target
    coefficient: Annotated[float, Ge(0)] = 2.0
    depth: Annotated[float, Ge(0), Le(1)] = 0.7
    threshold: Annotated[float, Ge(0), Le(1)] = 0.45
    clearance: Annotated[float, Ge(0), Le(1)] = 0.2
    _found: _Found | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"refusal_steering({self.inner.name})"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        model = bare(self)

        def answer(prompts: list[list[int]], asked: list[Query]) -> list[Completion]:
            hazards = self.hazards([q.chat for q in asked])
            answers: dict[int, Completion] = {}
            for steered in (False, True):
                if which := [i for i, hazard in enumerate(hazards) if hazard == steered]:
                    with self.engaged() if steered else nullcontext():
                        done = model._generate([prompts[i] for i in which], [asked[i] for i in which])
                    answers.update(zip(which, done, strict=True))
            return [charged(answers[i], len(request_ids(model, query.chat))) for i, query in enumerate(asked)]

        return below(self, lambda asked: model.batched(asked, answer)).generate(queries)

    def hazards(self, chats: Sequence[Chat]) -> list[bool]:
        """Whether the request of each chat, up to where the model would begin its answer, counts as a hazard."""
        gates = self._calibration().gates
        return [all(float(s @ way) > least for way, least in gates) for s in states(bare(self), self.depth, chats)]

    def engaged(self) -> AbstractContextManager[None]:
        """While this is entered, the model is steered whatever it is asked: for generation, losses and gradients alike."""
        vector = self.coefficient * self._calibration().refusing
        return hooked(bare(self), self.depth, lambda out: out + vector.to(out))

    def calibrated(self, requests: Sequence[str], behaviors: Sequence[Behavior] = ()) -> "RefusalSteering":
        """The same defense with the directions found on `behaviors`, a policy's train split of all kinds.

        Raises:
            UsageError: There is no hazard among them.
        """
        chats = {kind: [user(b.prompt, b.system) for b in behaviors if b.kind == kind] for kind in ("harmful", "twin", "cleared")}
        if not chats["harmful"]:
            raise UsageError("refusal_steering finds its direction on a policy's train hazards; give a policy that has some")
        chats["ordinary"] = [user(text) for text in ordinary()["requests"][:ORDINARY]]
        means = {kind: states(bare(self), self.depth, of).mean(0) for kind, of in chats.items() if of}
        gates = []
        for kind in [kind for kind in means if kind != "harmful"]:
            way = means["harmful"] - means[kind]
            share = self.clearance if kind == "cleared" else self.threshold
            gates.append((way, float((means[kind] + share * way) @ way)))
        answered = next(means[kind] for kind in ("cleared", "twin", "ordinary") if kind in means)
        return replace(self, _found=_Found(means["harmful"] - answered, tuple(gates)))

    def _calibration(self) -> _Found:
        if self._found is None:
            raise UsageError("refusal_steering has no direction yet; find it: .calibrated(requests, behaviors)")
        return self._found
