"""Inference-time defenses: each wraps a target and is a target, so they stack."""

from collections.abc import Sequence

from saddlepoint.registry import Call
from saddlepoint.targets import open_target
from saddlepoint.types import Target


def defended(target: Target, calls: Sequence[Call], requests: Sequence[str]) -> Target:
    """Wrap `target` in defenses, the first innermost. `requests` are ordinary traffic, for those that need calibration."""
    for call in calls:
        target = call.method.call(target, **call.bound(open_target))
        if hasattr(target, "calibrated"):
            target = target.calibrated(requests)
    return target
