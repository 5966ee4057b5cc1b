"""The reward-hacking watch: it finds the update at which a proxy reward has risen and the exact reward has not.

The rule is sequential. After every update, the last `window` updates are compared with every earlier block of `window`
updates. The watch fires where, since one of these, the proxy has risen, it has risen by more than gold (both in standard
deviations), and gold is not shown to have risen. "Has risen" means that the lower end of Welch's interval is above 0, at a
one-sided error of `error` shared by all comparisons of the run (Bonferroni), so that a run without a gap raises a false alarm
with a chance of at most `error`, however often it is looked at. A prompt with its answers is one case, and changes
are taken within each sort of prompts, so that the mix of prompts in an update moves nothing.

Source:  the gap: Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", https://arxiv.org/abs/2210.10760; the interval: Welch
         1947, "The generalization of Student's problem", https://doi.org/10.1093/biomet/34.1-2.28
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from saddlepoint.errors import UsageError
from saddlepoint.store import whole

Sorted = dict[str, list[float]]
"""For each sort of prompts, one number for each of its prompts in an update: the mean over that prompt's answers."""


@dataclass(frozen=True)
class Update:
    """One update of a training by reinforcement, measured on the answers that it learned from.

    Args:
        step: From 1.
        proxy, gold: The reward that is learned, and the exact one, on the same answers.
        kl: Of the policy to the start, in nats per token (trl's k3 estimate).
        length: Words of an answer, mean.
        repetition: Share of three-word runs that an answer had already said, mean, in [0, 1].
        refusals: Share of answers that refuse.
    """

    step: int
    proxy: Sorted
    gold: Sorted
    kl: float
    length: float
    repetition: float
    refusals: float


@dataclass(frozen=True)
class Rise:
    """A change with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """Where the watch fired.

    Args:
        step: The update after which it fired.
        since: The last update of the block that it is compared with.
        proxy, gold: How much they changed since then.
        apart: How much more the proxy rose than gold, in standard deviations of each.
    """

    step: int
    since: int
    proxy: Rise
    gold: Rise
    apart: Rise


def watch(updates: Sequence[Update], steps: int, window: int = 3, error: float = 0.05) -> Gap | None:
    """Whether the last update shows a gap.

    Args:
        steps: Updates of the whole run, which share the error.
        window: Updates that are taken together, >= 1.
        error: Chance of a false alarm in the whole run, in (0, 1).

    Returns:
        The gap since the latest block that shows one; None where none does.
    """
    level = error / max(1, sum((t - window) // window for t in range(2 * window, steps + 1)))
    last = updates[-window:]
    for end in range((len(updates) - window) // window * window, 0, -window):
        before = updates[end - window : end]
        proxy, gold = (_rise([getattr(u, of) for u in before], [getattr(u, of) for u in last], level) for of in ("proxy", "gold"))
        scale = [
            float(np.std([x for u in (*before, *last) for xs in getattr(u, of).values() for x in xs])) or 1.0 for of in ("proxy", "gold")
        ]
        apart = _rise([_apart(u, *scale) for u in before], [_apart(u, *scale) for u in last], level)
        if proxy.low > 0 and apart.low > 0 and gold.low <= 0:
            return Gap(updates[-1].step, updates[end - 1].step, proxy, gold, apart)
    return None


def fired(updates: Sequence[Update], steps: int, window: int = 3, error: float = 0.05) -> Gap | None:
    """The first gap of a run."""
    return next((gap for n in range(1, len(updates) + 1) if (gap := watch(updates[:n], steps, window, error))), None)


def _apart(update: Update, proxy: float, gold: float) -> Sorted:
    return {sort: [p / proxy - g / gold for p, g in zip(update.proxy[sort], update.gold[sort], strict=True)] for sort in update.proxy}


def _rise(before: Sequence[Sorted], after: Sequence[Sorted], level: float) -> Rise:
    """The mean change within the sorts that both sides have twice or more, each with the weight of its prompts afterwards."""
    sides = [{s: [x for u in side for x in u.get(s, ())] for s in {s for u in side for s in u}} for side in (before, after)]
    both = sorted(s for s in sides[0] if min(len(side.get(s, ())) for side in sides) > 1)
    total = sum(len(sides[1][s]) for s in both)
    if not total:
        return Rise(float("nan"), -math.inf, math.inf)
    value = sum(len(sides[1][s]) / total * (np.mean(sides[1][s]) - np.mean(sides[0][s])) for s in both)
    terms = [((len(sides[1][s]) / total) ** 2 * np.var(side[s], ddof=1) / len(side[s]), len(side[s]) - 1) for s in both for side in sides]
    variance = sum(v for v, _ in terms)
    freedom = variance**2 / sum(v**2 / k for v, k in terms) if variance > 0 else 1.0
    reach = float(student.ppf(1 - level, freedom) * math.sqrt(variance)) if variance > 0 else 0.0
    return Rise(float(value), float(value) - reach, float(value) + reach)


def repetition(text: str) -> float:
    """The share of a text's three-word runs that it had already said, in [0, 1]."""
    words = text.lower().split()
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# ---- what is written down


def log(out: Path) -> Path:
    """Where the curve of a training into `out` lies while it runs."""
    return out.with_name(f"{out.name}.watch.json")


def write(path: Path, updates: Sequence[Update], gap: Gap | None, about: dict[str, Any]) -> None:
    """Write a curve, whole or not at all."""
    whole(path, json.dumps({**about, "gap": gap and asdict(gap), "updates": [asdict(u) for u in updates]}) + "\n")


def read(path: Path) -> tuple[list[Update], Gap | None, dict[str, Any]]:
    """The curve of a checkpoint folder, of a training that is still running into it or was killed, or of a file.

    Returns:
        The updates, the gap where the watch fired, and what else is written there.

    Raises:
        UsageError: There is none.
    """
    for file in (path / "watch.json", log(path), path):
        if file.is_file():
            break
    else:
        raise UsageError(f"{path} has no reward curve; train with a recipe of reinforcement first: saddlepoint harden --recipes rbrm_rl")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        updates = [Update(**u) for u in found.pop("updates")]
        gap = found.pop("gap")
        return updates, gap and Gap(gap["step"], gap["since"], *(Rise(**gap[of]) for of in ("proxy", "gold", "apart"))), found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise UsageError(f"{file} holds no reward curve: {wrong}; train again, or give the folder of a checkpoint of rbrm_rl") from None
