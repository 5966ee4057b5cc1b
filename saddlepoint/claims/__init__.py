"""Published findings, each re-tested by one command on a model that anyone can run: one small file a claim.

A claim's file says, in its docstring, the statement in one sentence, `Source:`, `Setting:`, `Holds if:` (the rule, written before
anything is measured) and `Limits:` (what a verdict here does and does not mean). Its function `measure(lab)` returns rows, whose
bars are that rule. `QUICK` says whether it belongs to the claims that take 20 minutes in all.
"""

import importlib
import inspect
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import isnan
from pathlib import Path
from typing import Any

from saddlepoint import __version__
from saddlepoint.claims._lab import Lab
from saddlepoint.claims._rows import Row, verdict
from saddlepoint.errors import UsageError, unknown
from saddlepoint.store import whole

__all__ = ["Claim", "Lab", "Row", "chosen", "get", "names", "read", "report", "run"]
SHIPPED = Path(__file__).parent / "results"  # what we measured ourselves, one file a claim
SECTIONS = ("Source", "Setting", "Holds if", "Limits")


@dataclass(frozen=True)
class Claim:
    """A published finding and how it is measured here."""

    name: str
    statement: str
    source: str
    setting: str
    rule: str
    limits: str
    quick: bool
    measure: Callable[[Lab], list[Row]]


def names() -> list[str]:
    """The names of all claims."""
    return sorted(f.stem for f in Path(__file__).parent.glob("[!_]*.py"))


@cache
def get(name: str) -> Claim:
    """Read a claim's file.

    Raises:
        UsageError: No such claim.
    """
    if name not in names():
        raise unknown("claim", name, names(), "list: saddlepoint claims list")
    module = importlib.import_module(f"saddlepoint.claims.{name}")
    doc = inspect.getdoc(module) or ""
    source, setting, rule, limits = (_section(doc, title) for title in SECTIONS)
    return Claim(name, doc.partition("\n")[0], source, setting, rule, limits, module.QUICK, module.measure)


def chosen(wanted: Sequence[str]) -> list[Claim]:
    """The claims that `all`, `quick` or names stand for, the quick ones first.

    Raises:
        UsageError: No such claim.
    """
    of = {"all": names(), "quick": [n for n in names() if get(n).quick]}
    found = [get(name) for word in wanted for name in of.get(word, [word])]
    return sorted(dict.fromkeys(found), key=lambda claim: not claim.quick)


def run(claim: Claim, lab: Lab) -> dict[str, Any]:
    """Measure a claim, or take what is recorded of it, and return its result; it is on disk by then."""
    file = lab.out / "results" / f"{claim.name}.json"
    known = read(file.parent).get(claim.name)
    if known and known["rule"] == claim.rule and known["limit"] == lab.limit:
        return known
    began = time.monotonic()
    rows = claim.measure(lab)
    result = {
        "claim": claim.name,
        "rule": claim.rule,
        "verdict": verdict(rows),
        "rows": [{k: None if isinstance(v, float) and isnan(v) else v for k, v in asdict(row).items()} for row in rows],
        "command": f"saddlepoint claims run {claim.name}" + (f" --limit {lab.limit}" if lab.limit else ""),
        "limit": lab.limit,
        "seconds": round(time.monotonic() - began, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "version": __version__,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    whole(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The recorded results of a folder, by claim.

    Raises:
        UsageError: A file that is no result.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            found[str(result["claim"])] = result
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            raise UsageError(f"{file} is no result of a claim: {wrong}; remove it, then: saddlepoint claims run {file.stem}") from None
    return found


def report(folder: Path) -> list[dict[str, Any]]:
    """What the page shows: every claim with its recorded result, or None; a result by another rule than the file's is none."""
    results = read(folder)
    shown = []
    for name in names():
        claim, result = get(name), results.get(name)
        told = {k: v for k, v in asdict(claim).items() if k != "measure"}
        shown.append({**told, "result": result if result and result["rule"] == claim.rule else None})
    return shown


def _section(doc: str, title: str) -> str:
    """The text behind `Title:` up to the next section, on one line; "" if there is none."""
    others = "|".join(SECTIONS)
    found = re.search(rf"^{title}:(.*?)(?=^(?:{others}):|\Z)", doc, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""
