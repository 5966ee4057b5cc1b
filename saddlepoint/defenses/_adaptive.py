"""The weights of a target as an attacker sees them who knows its defenses.

Gradients pass through what is differentiable: demonstrations, which are text around the request, and guards that grade a
request, whose excess over what they let pass is added to the loss. Whatever rewrites the request otherwise is passed
straight through, as if it were the identity (Athalye et al. 2018, "Obfuscated Gradients Give a False Sense of Security",
https://arxiv.org/abs/1802.00420). Queries always go through the whole stack.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saddlepoint.defenses._stack import layers, request
from saddlepoint.defenses.demonstration.goal_priority import GoalPriority
from saddlepoint.types import CONTROL, Chat, Engaged, Frame, Graded, Place, Query, Reduce, Rewriter, Sloped, Target, WhiteBox

WEIGHT = 1.0  # of each guard's excess in the loss, both in nats


@dataclass(frozen=True)
class _Place:
    """Where a control stands: in a frame, and in the request as each guard that grades it reads it, (before, after) the control."""

    frame: Frame
    read: tuple[tuple[str, str], ...]


class Adaptive:
    """A `WhiteBox` around a bare one that knows the stack of defenses; what it does not change is the bare one's."""

    def __init__(self, stack: Target, model: WhiteBox):
        self.stack, self.model, self.name = stack, model, stack.name
        self._layers = list(layers(stack))[:-1]
        self._graded = [layer for layer in self._layers if isinstance(layer, Graded)]
        self._places: list[_Place] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def frame(self, chat: Chat, control: str, affirmative: str, place: Place = "suffix") -> Frame:
        """As `WhiteBox.frame`, with the demonstrations of the stack around it."""
        last = max((i for i, m in enumerate(chat) if m.role == "user"), default=None)
        if last is None:
            return self.model.frame(chat, control, affirmative, place)  # which says what is wrong
        text = chat[last].text
        gap = " " if text else ""
        marked = f"{text}{gap}{CONTROL}" if place == "suffix" else f"{CONTROL}{gap}{text}"
        query = Query((*chat[:last], replace(chat[last], text=marked), *chat[last + 1 :]))
        read = []
        for layer in self._layers:
            if isinstance(layer, Graded):
                before, after = request(query.chat).split(CONTROL)
                read.append((before, after))
            elif isinstance(layer, GoalPriority):
                query = layer.wrapped(query)
            elif isinstance(layer, Rewriter) and getattr(type(layer), "__saddlepoint__").family == "demonstration":  # noqa: B009
                ((query, _),) = layer.rewritten([query])
        frame = self.model.frame(query.chat, control, affirmative, place)
        if self._graded:
            self._places.append(_Place(frame, tuple(read)))
        return frame

    def loss(
        self, rows: Sequence[Tensor] | Tensor, scored: int, near: Tensor | None = None, exact: bool = True, reduce: Reduce | None = None
    ) -> Tensor:
        """As `WhiteBox.loss`, plus how far each row's request lies above what every guard lets pass."""
        rows = list(rows)
        with self._engaged():
            found = self.model.loss(rows, scored, near, exact, reduce)
        cut = [place for row in rows if (place := self._cut(row, scored))] if exact and self._graded else []
        if not cut or len(cut) < len(rows):
            return found  # a screen, or no control in its frame: how likely a text is by itself, for one
        controls = [self.model.text(row[len(p.frame.before) : end]).lstrip() for row, (p, end) in zip(rows, cut, strict=True)]
        for k, guard in enumerate(self._graded):
            texts = [p.read[k][0] + control + p.read[k][1] for control, (p, _) in zip(controls, cut, strict=True)]
            found = found + WEIGHT * torch.tensor(guard.excess(texts)).clamp(min=0).to(found)
        return found

    def gradient(self, row: Tensor, at: slice, scored: int, reduce: Reduce | None = None) -> Tensor:
        """As `WhiteBox.gradient`, plus the slope of every guard that has one and does not let the request pass."""
        with self._engaged():
            found = self.model.gradient(row, at, scored, reduce)
        cut = self._cut(row, scored)
        if cut is None:
            return found
        place, end = cut
        control = row[len(place.frame.before) : end]
        for guard, (before, after) in zip(self._graded, place.read, strict=True):
            if isinstance(guard, Sloped) and guard.excess([before + self.model.text(control).lstrip() + after])[0] > 0:
                slope = guard.slope(before, control, after)  # (L, vocabulary)
                first = at.start - len(place.frame.before)
                if slope is not None and slope.shape[1] == found.shape[1] and 0 <= first and first + len(found) <= len(slope):
                    found = found + WEIGHT * slope[first : first + len(found)].to(found)
        return found

    def _cut(self, row: Tensor, scored: int) -> tuple[_Place, int] | None:
        """The place that a row belongs to, and where its control ends; None where it is no row of a known frame."""
        for place in self._places:
            before, after = place.frame.before, place.frame.after
            end = len(row) - scored - len(after)
            if end >= len(before) and row[: len(before)].equal(before) and row[end : end + len(after)].equal(after):
                return place, end
        return None

    def _engaged(self) -> ExitStack:
        """The model as the defenses that change its forward pass run it."""
        stack = ExitStack()
        for layer in self._layers:
            if isinstance(layer, Engaged):
                stack.enter_context(layer.engaged())
        return stack
