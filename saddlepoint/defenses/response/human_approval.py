"""Human approval: an answer is held until a person approves it, and withheld if nobody does in time.

Source:  Amershi et al. 2014, "Power to the People: The Role of Humans in Interactive Machine Learning",
         https://doi.org/10.1609/aimag.v35i4.2513 (for the human in the loop as such; the protocol is this project's)
Differs: the person decides over single answers, from another process (`saddlepoint approvals`), and what was decided of an
         answer holds for every equal one; only what a guard calls unsafe needs to be held.
Cost:    up to `wait` seconds for each batch of held answers; a pass of the guard over each turn of the request and over the answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from saddlepoint.approvals import hold, read
from saddlepoint.defenses._stack import release, turns
from saddlepoint.defenses.response._answer import classified, shown
from saddlepoint.registry import defense
from saddlepoint.types import Check, Completion, Query, Target

ALWAYS = "every answer is held"
POLL = 0.1  # seconds


@defense(paper="https://doi.org/10.1609/aimag.v35i4.2513")
@dataclass(frozen=True)
class HumanApproval:
    """Hold answers in a folder for a person to approve or deny.

    Args:
        inner: The target that is defended.
        folder: Where held answers are written, one JSON file each.
        wait: Seconds to wait for a decision, >= 0; without one the answer is withheld, and can still be decided for the
            next time that it is asked for.
        guard: A classifier; only where it calls the request or the answer unsafe the answer is held. "" holds every answer.
    """

    inner: Target
    folder: str = "approvals"
    wait: Annotated[float, Ge(0)] = 300.0
    guard: Target = ""  # type: ignore[assignment]

    @property
    def name(self) -> str:
        return f"human_approval({self.inner.name})"

    @property
    def every(self) -> int:
        """A person reads whole answers."""
        return 0

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return release(self, queries)

    def released(self, queries: Sequence[Query], completions: Sequence[Completion]) -> list[Check]:
        texts = [shown(q, c) for q, c in zip(queries, completions, strict=True)]
        checks = self._held([turns(q.chat) for q in queries], texts)
        chosen = [i for i, check in enumerate(checks) if check.reason]
        folder = Path(self.folder)
        held = hold(folder, [(self.inner.name, queries[i].chat, texts[i], checks[i].reason) for i in chosen]) if chosen else []
        until = time.monotonic() + self.wait
        while any(not h.decision for h in held) and time.monotonic() < until:
            time.sleep(POLL)
            held = [h if h.decision else read(folder, h.id) for h in held]
        for i, answer in zip(chosen, held, strict=True):
            undecided = f"held as {answer.id}, and not decided within {self.wait:g} s"
            said = {"approved": "", "denied": f"{answer.id} was denied by {answer.by}", "": undecided}[answer.decision]
            checks[i] = replace(checks[i], reason=said)
        return checks

    def _held(self, requests: Sequence[Sequence[str]], texts: Sequence[str]) -> list[Check]:
        """Why each answer must be held."""
        if not self.guard:
            return [Check(ALWAYS) for _ in texts]
        answers = classified(self.guard, texts, "human_approval")
        turn = iter(classified(self.guard, [text for written in requests for text in written], "human_approval"))
        checks = []
        for written, answer in zip(requests, answers, strict=True):
            asked = [next(turn) for _ in written]
            stopped = next((f"request: {check.reason}" for check in asked if check.reason), "")
            said = stopped or (answer.reason and f"answer: {answer.reason}")
            checks.append(Check(said, answer.tokens + sum(check.tokens for check in asked)))
        return checks
