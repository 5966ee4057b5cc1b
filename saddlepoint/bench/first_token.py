"""What a stack of guards adds to a model's own time to first token: both in one run, in turns, and the guards by themselves.

A pair is the same request with and without the guards, one right after the other in an order that alternates, so that what else the
machine does falls on both.
"""

import os
import time
from collections.abc import Callable
from contextlib import closing
from statistics import median, quantiles
from typing import Any

from saddlepoint.config import Config
from saddlepoint.defenses._stack import layers
from saddlepoint.defenses._stream import stream
from saddlepoint.errors import UsageError
from saddlepoint.loop import stacked
from saddlepoint.metrics import mean
from saddlepoint.policies import load, ordinary
from saddlepoint.targets import open_target
from saddlepoint.types import InputGuard, Query, Sampling, Target, user

PAUSE = 0.02  # seconds between two requests


def bench(target: str, defense: str, policy: str, n: int, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Ask `n` ordinary requests with and without the guards; milliseconds.

    Raises:
        UsageError: There are fewer requests.
    """
    texts = [*ordinary()["held_out"], *ordinary()["requests"]]
    if not 20 <= n <= len(texts):
        raise UsageError(f"n must lie in 20..{len(texts)}, the ordinary requests there are; got {n}")
    bare = open_target(target)
    stack = stacked(Config(target=target, defenses=defense, policy=policy), load(policy), bare)
    guards = [layer for layer in layers(stack) if isinstance(layer, InputGuard)]
    queries = [Query(user(text), Sampling(2)) for text in texts[:n]]
    for query in queries[:5]:  # caches warm up
        _first(bare, bare, query), _first(stack, bare, query)
    rows, blocked = [], 0
    for i, query in enumerate(queries):
        row = {}
        for name, asked in [("without", bare), ("with", stack)][:: 1 if i % 2 else -1]:
            row[name], stopped = _first(asked, bare, query)
            blocked += stopped
        began = time.perf_counter()
        for guard in guards:
            guard.admitted([query])
        row["guards alone"] = (time.perf_counter() - began) * 1000
        rows.append(row)
        tell(f"{i + 1} of {n}") if (i + 1) % 20 == 0 else None
    added = mean([row["with"] / row["without"] - 1 for row in rows])
    spread = {name: _spread([row[name] for row in rows]) for name in ("without", "with", "guards alone")}
    ratio = {k: spread["with"][k] / spread["without"][k] - 1 for k in ("p50", "p95")}
    how = {"target": target, "defense": defense, "n": n, "blocked": blocked, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    paired = {"median": median(row["with"] / row["without"] - 1 for row in rows), "mean": added.value, "low": added.low, "high": added.high}
    return {**how, "ms": spread, "added": ratio, "added in pairs": paired}


def _first(target: Target, bare: Target, query: Query) -> tuple[float, bool]:
    """Milliseconds until the first text, and whether that was a refusal by a guard. What the model has read before is forgotten."""
    if hasattr(bare, "forget"):
        bare.forget()
    time.sleep(PAUSE)
    began = time.perf_counter()
    with closing(stream(target, query)) as pieces:
        first = next(piece for piece in pieces if piece.text or piece.finish == "filter")
        return (time.perf_counter() - began) * 1000, first.finish == "filter"


def _spread(values: list[float]) -> dict[str, float]:
    return {"p50": median(values), "p95": quantiles(values, n=20)[-1]}


def table(found: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines = ["| time to first token | p50, ms | p95, ms |", "|---|---|---|"]
    lines += [f"| {name} | {row['p50']:.1f} | {row['p95']:.1f} |" for name, row in found["ms"].items()]
    pairs = found["added in pairs"]
    said = f"in pairs: median {pairs['median']:+.1%}, mean {pairs['mean']:+.1%} [{pairs['low']:+.1%}, {pairs['high']:+.1%}]"
    about = f"n={found['n']}, {found['blocked']} blocked; {found['target']} behind {found['defense']}; load {found['load']:.1f} on {found['cores']} cores"
    return "\n".join([*lines, "", f"added at p50 {found['added']['p50']:+.1%}, at p95 {found['added']['p95']:+.1%}; {said}; {about}"])
