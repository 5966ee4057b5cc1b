"""The claims as a page: which hold on this model and which do not, with every number, the rule and the command."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from saddlepoint.report import svg, words
from saddlepoint.report.elements import ALLOWED as _ALLOWED
from saddlepoint.report.elements import STYLE as _STYLE
from saddlepoint.report.elements import esc as _esc
from saddlepoint.report.elements import table as _table
from saddlepoint.report.elements import tag as _tag
from saddlepoint.report.markdown import _cell
from saddlepoint.report.markdown import _table as _markdown_table
from saddlepoint.report.words import NONE, value

Shown = Mapping[str, Any]
"""A claim's name, statement, source, setting, rule, limits and quick, and its `result` or None."""
_MARKS = {"holds": "✓", "does not hold here": "✗", "inconclusive": "?", "not measured": "–"}
_TITLE = "Claims re-tested"
_ABOUT = (
    "Published findings about attacks, defenses and safety training, each re-tested by one command on the embedded organism: a model of 135 "
    "million parameters with a planted policy of invented hazards, whose harm is checked exactly. The rule of every verdict was written "
    "into the claim's file before it was measured, and the verdict is computed from it. A rate has a Wilson interval, a change a paired "
    "bootstrap interval, all of 95%; n is the number of hazards, requests or texts."
)
_READ = (
    "“Holds” says that the finding shows on this model too. “Does not hold here” says that it does not show on this small model in this "
    "setting; it refutes no paper, for larger models differ in what they understand and in how they were trained. “Inconclusive” says that "
    "the interval is too wide for the rule, and nothing else. With this many claims at 95%, expect one or two verdicts by chance. "
    "Intervals are over hazards, requests or texts: where a claim compares trained models, each was trained once, and what another seed of the "
    "training would give is not in them. A bootstrap of a change that only a few of 25 cases made is too sure of it: fewer than six, all one way, "
    "leave an exact test (McNemar's) above 5%."
)


def count(claims: Sequence[Shown]) -> str:
    """How many claims have each verdict, in a sentence."""
    counts = Counter(map(_verdict, claims))
    return f"{len(claims)} claims: " + ", ".join(f"{counts[said]} {said}" for said in _MARKS if counts[said]) + "."


def markdown(claims: Sequence[Shown]) -> str:
    """The page in Markdown."""
    rows = [[f"[{c['name']}](#{c['name']})", c["statement"], f"{_MARKS[_verdict(c)]} {_verdict(c)}", deciding(c)] for c in claims]
    parts = [
        f"# {_TITLE}",
        "Generated from recorded results: `saddlepoint claims report > docs/CLAIMS.md`.",
        _ABOUT,
        _READ,
        f"**{count(claims)}**",
    ]
    parts.append(_markdown_table(["claim", "statement", "verdict", "what decides"], rows, words_only=True))
    for claim in claims:
        parts += [f"## {claim['name']}", f"**{_cell(claim['statement'])}** {_MARKS[_verdict(claim)]} {_verdict(claim)}."]
        parts.append("\n".join(f"- {title}: {_cell(text)}" for title, text in facts(claim).items()))
        if claim["result"]:
            table = [[row["name"], shown(row), str(row["n"]), bar(row)] for row in claim["result"]["rows"]]
            parts.append(_markdown_table(["measured", "value [95%]", "n", "the rule asks"], table, words_only=True))
    return "\n\n".join(parts) + "\n"


def page(claims: Sequence[Shown]) -> str:
    """The same as one HTML page that needs nothing else."""
    rows = [[c["name"], c["statement"], f"{_MARKS[_verdict(c)]} {_verdict(c)}", deciding(c)] for c in claims]
    summary = _table("All claims", ("claim", "statement", "verdict", "what decides"), rows, texts=(0, 1, 2, 3))
    links = "".join(_tag("li", _tag("a", c["name"], href=f"#{c['name']}")) for c in claims)
    sections = "".join(_section(claim) for claim in claims)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_ALLOWED}"><meta name="color-scheme" content="light dark">
<title>Saddlepoint: {_TITLE}</title><style>{_STYLE}</style></head>
<body><header><h1>{_TITLE}</h1>{_tag("p", _esc(_ABOUT))}{_tag("p", _esc(_READ))}{_tag("p", _tag("strong", _esc(count(claims))))}
<nav aria-label="Claims"><ul>{links}</ul></nav></header>
<main>{summary}{sections}</main></body></html>
"""


def _section(claim: Shown) -> str:
    said = _tag("p", _tag("strong", _esc(f"{_MARKS[_verdict(claim)]} {_verdict(claim)}: "), class_=_class(claim)), _esc(claim["statement"]))
    told = "".join(_tag("div", _tag("dt", title), _tag("dd", _esc(text))) for title, text in facts(claim).items())
    parts = [_tag("h2", _esc(claim["name"]), id=f"{claim['name']}-name"), said]
    if claim["result"]:
        rows = claim["result"]["rows"]
        parts.append(_table(f"Numbers of {claim['name']}", ("measured", "value [95%]", "n", "the rule asks"), [
            [row["name"], shown(row), row["n"], bar(row)] for row in rows
        ], texts=(0, 3)))  # fmt: skip
        parts.append(_drawn(claim["name"], [row for row in rows if row["unit"] in ("share", "points") and row["n"]]))
    parts.append(_tag("dl", told))
    return _tag("section", *parts, id=claim["name"], aria_labelledby=f"{claim['name']}-name")


def _drawn(name: str, rows: Sequence[Shown]) -> str:
    """Shares and changes of them as whiskers, from -100 to 100 points where there is a change."""
    if not rows:
        return ""
    domain = (-1.0, 1.0) if any(row["unit"] == "points" for row in rows) else (0.0, 1.0)
    intervals = [(value(row), value(row, "low"), value(row, "high")) for row in rows]
    said = f"{name}: " + "; ".join(f"{row['name']} {shown(row)}" for row in rows)
    return _tag("div", svg.whiskers(intervals, domain, words.visible(said)), svg.axis(domain), class_="frame small")


def facts(claim: Shown) -> dict[str, str]:
    """What is said of a claim besides its numbers."""
    told = {"Source": claim["source"], "Setting": claim["setting"], "Holds if": claim["rule"], "Limits": claim["limits"]}
    result = claim["result"]
    if not result:
        return told | {"Command": f"`saddlepoint claims run {claim['name']}`, not measured yet"}
    cost = f"{result['seconds']:,.0f} s (runs that an earlier claim made are not counted again), {result['machine']}"
    told |= {"Reading": reading(claim)} if reading(claim) else {}
    return told | {"Command": f"`{result['command']}`: {cost}, {result['date']}, version {result['version']}"}


def reading(claim: Shown) -> str:
    """What an inconclusive claim still tells: how large the effect can be at most."""
    rows = claim["result"]["rows"] if _verdict(claim) == "inconclusive" else []
    most = {row["name"]: row["high"] if row["above"] == 0 else -row["low"] for row in rows if row["unit"] == "points" and _open(row)}
    return " ".join(
        f"If there is such an effect, it is at most {words.percent(x).rstrip('%')} points ({name})." for name, x in most.items()
    )


def _open(row: Shown) -> bool:
    """Whether a row asks for a change in one direction and its interval holds none as well as one."""
    return bool(row["n"]) and (
        (row["above"] == 0 < row["high"] and row["low"] <= 0) or (row["below"] == 0 > row["low"] and row["high"] >= 0)
    )


def deciding(claim: Shown) -> str:
    """The numbers that the rule looks at."""
    rows = claim["result"]["rows"] if claim["result"] else []
    return "; ".join(f"{row['name']}: {shown(row)}, n={row['n']}" for row in rows if bar(row)) or NONE


def shown(row: Shown) -> str:
    """A number with its interval, in its unit."""
    if row["unit"] == "share":
        return words.share(row)
    if row["unit"] == "points":
        return words.change(row)
    numbers = [value(row, k) for k in ("value", "low", "high")]
    if any(map(isnan, numbers)):
        return NONE
    unit = "" if row["unit"] in ("exponent", "correlation", "reward") else f" {row['unit']}"
    middle, low, high = (f"{x:.3g}".replace("-", "\u2212") for x in numbers)
    return f"{middle}{unit} [{low}, {high}]"


def bar(row: Shown) -> str:
    """What the rule asks of the whole interval, in the row's unit."""
    scale, unit = {"share": (100, "%"), "points": (100, " points")}.get(row["unit"], (1, ""))
    asked = [f"{word} {scale * row[word]:g}{unit}".replace("-", "\u2212") for word in ("above", "below") if row[word] is not None]
    return " and ".join(asked)


def _verdict(claim: Shown) -> str:
    return str(claim["result"]["verdict"]) if claim["result"] else "not measured"


def _class(claim: Shown) -> str:
    return {"holds": "better", "does not hold here": "worse"}.get(_verdict(claim), "no-clear-change")
