"""Perplexity filter: a request that a language model finds too unlikely, as a whole or in any window, is not answered.

Source:  Jain et al. 2023, "Baseline Defenses for Adversarial Attacks Against Aligned Language Models",
         https://arxiv.org/abs/2309.00614; Alon and Kamfonas 2023, https://arxiv.org/abs/2308.14132
Differs: every window is scored with all the text before it as context, not by itself, which would inflate its loss; the
         threshold is the largest loss over the policy's own train requests, harmful and benign, and with windows that of their worst
         windows, where the paper compares windows with the threshold of whole requests. The last user message is scored, no earlier one.
Cost:    one forward pass of the scoring model per request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from saddlepoint.defenses._stack import admit, request
from saddlepoint.errors import UsageError
from saddlepoint.registry import defense
from saddlepoint.types import Check, Completion, Frame, Query, Target, WhiteBox

if TYPE_CHECKING:
    from torch import Tensor


@defense(paper="https://arxiv.org/abs/2309.00614")
@dataclass(frozen=True)
class PerplexityFilter:
    """Answer only requests whose mean loss per token is at most `threshold`.

    Args:
        inner: The target that is defended.
        scorer: The model whose loss counts.
        window: Tokens in a window, every one of which must pass; 0 takes the whole text as one.
        threshold: In nats per token; None is calibrated on the policy's train requests when the stack is built.
    """

    inner: Target
    scorer: WhiteBox = "smollm2-135m-instruct"  # type: ignore[assignment]
    window: Annotated[int, Ge(0)] = 0
    threshold: float | None = None

    @property
    def name(self) -> str:
        return f"perplexity_filter({self.inner.name})"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return admit(self, queries)

    def admitted(self, queries: Sequence[Query]) -> list[Check]:
        if self.threshold is None:
            raise UsageError("perplexity_filter has no threshold; give threshold=..., or calibrate it: .calibrated(requests)")
        checks = []
        for score, tokens in map(self._score, (request(q.chat) for q in queries)):
            said = f"a loss of {score:.2f} nats per token, above {self.threshold:.2f}"
            checks.append(Check(said if score > self.threshold else "", tokens))
        return checks

    def scores(self, texts: Sequence[str]) -> list[float]:
        """The loss per token of each text, or of its worst window; an empty text scores 0."""
        return [score for score, _ in map(self._score, texts)]

    def _score(self, text: str) -> tuple[float, int]:
        # One text at a time: in bfloat16 a loss moves by 0.07 nats with what shares its batch, and a verdict must not.
        (row,) = self.scorer.logprobs([((), text)])
        size = self.window or max(1, len(row))
        return max((float(-row[i : i + size].mean()) for i in range(0, len(row), size)), default=0.0), len(row)

    def excess(self, texts: Sequence[str]) -> list[float]:
        return [score - (self.threshold or 0.0) for score in self.scores(texts)]

    def slope(self, before: str, control: "Tensor", after: str) -> "Tensor | None":
        """The gradient of the whole text's loss by the control's one-hots, as what is read and as what is predicted."""
        import torch

        model = self.scorer
        parts = [torch.tensor(ids, dtype=torch.long, device=control.device) for ids in (model.ids(before.rstrip()), model.ids(after))]
        start = torch.tensor(model.prompt_ids(()), device=control.device)
        frame = Frame(torch.cat([start, parts[0]]), control, parts[1], control[:0])
        row = torch.cat([frame.before, control, frame.after])
        at = slice(len(frame.before), len(frame.before) + len(control))
        with torch.no_grad():
            slope = -model.soft_logprobs(frame, model.embedding[control][None], at)[0]  # (L, vocabulary)
        later = len(row) - at.start - 1  # tokens that are predicted by some of the control
        if later:
            slope = slope + later * model.gradient(row, at, later)
        return slope / (len(row) - len(start))

    def calibrated(self, requests: Sequence[str]) -> "PerplexityFilter":
        """The same filter with the lowest threshold that lets all of `requests` pass; a given threshold stays."""
        return self if self.threshold is not None else replace(self, threshold=max(self.scores(requests), default=0.0))
