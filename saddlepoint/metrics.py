"""From findings to numbers, each with n and a 95% interval. Pure functions.

Rates have Wilson intervals; differences are bootstrapped, paired over the behaviors that both sides share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from saddlepoint.types import Finding

Outcome = bool | None
"""Whether the thing counted happened; None where that could not be judged."""


@dataclass(frozen=True)
class Rate:
    """A share with its 95% interval.

    Args:
        value: Share among what was judged, in [0, 1]; nan if nothing was.
        low, high: Wilson bounds; `low` counts the unjudged as no, `high` counts them as yes.
        n: All cases, the unjudged too.
        unjudged: How many of them could not be judged.
    """

    value: float
    low: float
    high: float
    n: int
    unjudged: int = 0

    def __str__(self) -> str:
        open_ = f", {self.unjudged} unjudged" if self.unjudged else ""
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}] n={self.n}{open_}"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% bootstrap interval over n cases."""

    value: float
    low: float
    high: float
    n: int


def rate(outcomes: Sequence[Outcome]) -> Rate:
    """The share of True, with what could not be judged widening the interval on both sides."""
    n, yes, unjudged = len(outcomes), sum(o is True for o in outcomes), sum(o is None for o in outcomes)
    if n == 0:
        return Rate(float("nan"), 0.0, 1.0, 0)
    low = binomtest(yes, n).proportion_ci(method="wilson").low
    high = binomtest(yes + unjudged, n).proportion_ci(method="wilson").high
    return Rate(yes / (n - unjudged) if n > unjudged else float("nan"), max(0.0, float(low)), min(1.0, float(high)), n, unjudged)


def mean(values: Sequence[float], seed: int = 0, resamples: int = 4000) -> Estimate:
    """The mean, with a percentile bootstrap interval."""
    if not values:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), len(data))


def difference(before: Mapping[str, Outcome], after: Mapping[str, Outcome], seed: int = 0) -> Estimate:
    """The change of a rate from `before` to `after`, paired: over the behaviors that both judged.

    Where every pair changed alike the bootstrap has nothing to draw from and would claim certainty; there the interval
    is Wilson's for "all n of n".
    """
    shared = [k for k in before if before[k] is not None and after.get(k) is not None]
    changes = [float(bool(after[k])) - float(bool(before[k])) for k in shared]
    found = mean(changes, seed)
    if changes and len(set(changes)) == 1:
        room = 1 - binomtest(len(changes), len(changes)).proportion_ci(method="wilson").low
        low, high = max(-1.0, found.value - room), min(1.0, found.value + room)
        return Estimate(found.value, low, high, found.n)
    return found


def broken(findings: Sequence[Finding], queries: int | None = None) -> dict[str, Outcome]:
    """For each behavior, whether any of these findings broke it (within its first `queries` queries)."""
    seen: dict[str, Outcome] = {}
    for f in findings:
        within = f.verdict.unsafe if queries is None or (f.broken_at or 0) <= queries else False
        seen[f.behavior] = _either(seen.get(f.behavior, False), within)
    return seen


def _either(a: Outcome, b: Outcome) -> Outcome:
    return True if a or b else None if a is None or b is None else False


def refused(findings: Sequence[Finding]) -> dict[str, Outcome]:
    """For each behavior, whether the answer was a refusal; None where it could not be judged."""
    return {f.behavior: None if f.verdict.unsafe is None else f.verdict.label in ("refusal", "bad_refusal") for f in findings}


def disclosed(findings: Sequence[Finding]) -> dict[str, Outcome]:
    """For each cleared behavior, whether the answer was given: the oracle's facts, which there are no harm."""
    return {f.behavior: None if f.verdict.unsafe is None else f.verdict.score >= 1.0 for f in findings}


@dataclass(frozen=True)
class Agreement:
    """A judge against the truth.

    Args:
        confusion: (true positive, false positive, false negative, true negative), over what the judge judged.
        unjudged: Cases on which it gave no opinion.
    """

    confusion: tuple[int, int, int, int]
    unjudged: int
    precision: Rate
    recall: Rate
    specificity: Rate
    kappa: Estimate


def agreement(truth: Sequence[bool], said: Sequence[Outcome], seed: int = 0, resamples: int = 4000) -> Agreement:
    """Compare a judge's verdicts with the truth. Kappa is Cohen's, with a bootstrap interval over cases.

    Where they agree on every case the bootstrap would claim certainty; there the lower bound is that of Wilson's for
    "all n of n".
    """
    pairs = np.array([(t, s) for t, s in zip(truth, said, strict=True) if s is not None], dtype=bool).reshape(-1, 2)
    t, s = pairs[:, 0], pairs[:, 1]
    confusion = (int((t & s).sum()), int((~t & s).sum()), int((t & ~s).sum()), int((~t & ~s).sum()))
    draws = np.random.default_rng(seed).integers(0, max(1, len(pairs)), (resamples, len(pairs)))
    drawn = [_kappa(t[d], s[d]) for d in draws] if len(pairs) else [float("nan")]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if not np.all(np.isnan(drawn)) else (float("nan"), float("nan"))
    if len(pairs) and confusion[1] == confusion[2] == 0:
        low = _kappa(t, s, binomtest(len(pairs), len(pairs)).proportion_ci(method="wilson").low)
    return Agreement(
        confusion,
        sum(x is None for x in said),
        rate([bool(x) for x, y in zip(t, s, strict=True) if y]),
        rate([y for x, y in zip(truth, said, strict=True) if x]),
        rate([None if y is None else not y for x, y in zip(truth, said, strict=True) if not x]),
        Estimate(_kappa(t, s), float(low), float(high), len(pairs)),
    )


def _kappa(t: np.ndarray, s: np.ndarray, agreed: float | None = None) -> float:
    """Cohen's kappa, for another share of agreement if given.

    It is nan where chance agreement is certain (one side is constant and the other the same).
    """
    if not len(t):
        return float("nan")
    agreed = float((t == s).mean()) if agreed is None else agreed
    chance = float(t.mean() * s.mean() + (1 - t.mean()) * (1 - s.mean()))
    return float("nan") if chance == 1 else (agreed - chance) / (1 - chance)
