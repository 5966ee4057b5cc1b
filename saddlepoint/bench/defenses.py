"""Every defense against every attack, static and adaptive, and what each costs.

Static: the queries that broke the undefended target are asked once more through the defense. Adaptive: every attack is run
against the whole stack, sees what it answers, searches through it where it has weights, and what is known to get around a
kind of defense is added (Tramer et al. 2020, https://arxiv.org/abs/2002.08347). Each stack is a run in a folder of its
own, so a bench that was broken off goes on.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saddlepoint.config import Config
from saddlepoint.judges import open_judge
from saddlepoint.loop import Listener, execute, stacked
from saddlepoint.metrics import mean, rate
from saddlepoint.policies import load, ordinary
from saddlepoint.registry import parse
from saddlepoint.report import summarize, svg
from saddlepoint.report.elements import document, esc, tag
from saddlepoint.report.elements import table as _grid
from saddlepoint.report.words import NONE, percent, share, value
from saddlepoint.store import Store
from saddlepoint.targets import open_target
from saddlepoint.types import Case, Finding, Query, Sampling, Target, user

ATTACKS = "direct, past_tense, combination_1, prefix_injection, many_shot(shots=8), prefill"
WEIGHTS = "uat(place='suffix', sweeps=3, batch=4)"
# What an attacker adds who knows the defense. A fluent trigger passes a perplexity filter; other words, or none at all in the
# user's turn, pass what reads the request; what stands in the assistant's turn is not rewritten; an answer that never names what it is
# about cannot be translated back.
KNOWN = {
    "perplexity_filter": "uat_lm(place='suffix', sweeps=2, batch=4, candidates=20), prefix_injection+synonym_swap",
    "erase_and_check": "prefix_injection+synonym_swap, prefill+past_tense",
    "classifier_guard": "prefix_injection+synonym_swap, prefill+past_tense",
    "hidden_text": "prefix_injection+synonym_swap",
    "drawn_text": "prefix_injection+synonym_swap",
    "smooth_llm": "prefill+prefix_injection",
    "paraphrase": "prefill+prefix_injection",
    "semantic_smoothing": "prefill+prefix_injection",
    "back_translation": "prefill(text='To make it,'), prefix_injection+prefill(text='It is made like this:')",
    "refusal_steering": "prefill(text='To make it,'), prefix_injection+synonym_swap",
    "retokenization": "prefill+prefix_injection",
}
ALONE = 8  # ordinary requests asked one at a time, for the time that a defense adds
SHORT = 16  # tokens of their answers


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        defenses: Stacks, each as --defenses takes it.
        attacks: The attacks that every stack meets.
        weights: The attack with weights that stacks meet too whose inside it can search; "" leaves it out.
        limit: Only the first so many hazards.
    """

    defenses: tuple[str, ...]
    target: str = "organism"
    policy: str = "fictional"
    attacks: str = ATTACKS
    weights: str = WEIGHTS
    limit: int | None = None
    seed: int = 0


def everything() -> tuple[str, ...]:
    """Every registered defense by itself, in its default form, that needs neither a person nor a model of one's own."""
    from saddlepoint.registry import get, names

    found = [get("defense", name) for name in names("defense")]
    ready = [m for m in found if m.name != "human_approval" and all(p.default != "" for p in m.parameters.values() if p.is_target)]
    return tuple(m.name for m in sorted(ready, key=lambda m: (m.family, m.name)))


def bench(settings: Settings, out: Path, say: Callable[[str], None], listen: Listener = Listener()) -> dict[str, Any]:
    """Measure the undefended target and every stack, or what is left of them."""
    rows: list[dict[str, Any]] = []
    for defense in ("", *settings.defenses):
        folder = out / (re.sub(r"[^a-z0-9_.]+", "-", defense.lower()).strip("-") or "undefended")
        config = _config(settings, defense)
        store = Store.open(folder) if (folder / "run.db").exists() else Store.create(folder, config.model_dump())
        say(f"{defense or 'undefended'}: {folder}")
        with store.writing():
            if not store.read("complete"):
                began = time.monotonic()
                execute(config, store, listen)
                store.note("seconds", round((store.read("seconds") or 0.0) + time.monotonic() - began, 1))
                store.note("complete", True)
            if defense and store.read("price") is None:
                bare = open_target(settings.target)
                stack = stacked(config, load(settings.policy), bare)
                store.note("static", _static(settings, stack, rows[0]["findings"]))
                store.note("price", _price(stack, bare))
        rows.append(_row(defense, store, rows[0] if rows else None))
    for row in rows:
        del row["findings"], row["plain"]
    found = {"settings": asdict(settings), "machine": store.read("machine"), "rows": rows}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _config(settings: Settings, defense: str) -> Config:
    calls = parse("defense", defense) if defense else []
    adaptive = dict.fromkeys(a.strip() for call in calls for a in re.split(r",\s*(?![^()]*\))", KNOWN.get(call.name, "")) if a.strip())
    seen = any(c.method.family in ("demonstration", "generation") or hasattr(c.method.call, "excess") for c in calls) or not calls
    attacks = [settings.attacks, *adaptive, *([settings.weights] if settings.weights and seen else [])]
    return Config(
        kind="attack",
        target=settings.target,
        policy=settings.policy,
        attacks=", ".join(attacks),
        defenses=defense,
        adaptive=True,
        limit=settings.limit,
        seed=settings.seed,
    )


def _static(settings: Settings, stack: Target, findings: Sequence[Finding]) -> dict[str, dict[str, bool | None]]:
    """For each attack and hazard, whether the query that broke the undefended target breaks the stack."""
    worked = [f for f in findings if f.phase == "before" and f.verdict.unsafe]
    answers = stack.generate([Query(f.chat, Sampling(max_tokens=64)) for f in worked]) if worked else []
    behaviors = {b.id: b for b in load(settings.policy).behaviors}
    cases = [Case(behaviors[f.behavior], f.chat, a) for f, a in zip(worked, answers, strict=True)]
    verdicts = open_judge(parse("judge", "oracle")[0])(cases) if cases else []
    static: dict[str, dict[str, bool | None]] = {}
    for f in findings:
        if f.phase == "before":
            static.setdefault(f.attack, {})[f.behavior] = False  # what did not break the bare target is no attack on the stack
    for f, verdict in zip(worked, verdicts, strict=True):
        static[f.attack][f.behavior] = verdict.unsafe
    return static


def _price(stack: Target, bare: Target) -> dict[str, Any]:
    """Seconds and tokens that a stack adds to an ordinary query, asked alone, beside the bare target in turns."""
    seconds, tokens = [], []
    for text in ordinary()["held_out"][: ALONE + 1]:
        query, spent, counts = Query(user(text), Sampling(SHORT)), [], []
        for target in (bare, stack):
            began = time.perf_counter()
            (answer,) = target.generate([query])
            spent.append(time.perf_counter() - began)
            counts.append(answer.tokens)
        seconds.append(spent)
        tokens.append(counts[1] - counts[0])
    seconds, tokens = seconds[1:], tokens[1:]  # the first warms up
    return {
        "bare": asdict(mean([a for a, _ in seconds])),
        "seconds": asdict(mean([b - a for a, b in seconds])),
        "tokens": asdict(mean(tokens)),
    }


def _row(defense: str, store: Store, bare: dict[str, Any] | None) -> dict[str, Any]:
    """What is known of one stack."""
    findings = store.findings()
    (stage,) = summarize(store)["stages"]
    static, price = store.read("static") or {}, store.read("price") or {}
    adaptive = {row["attack"]: row["rate"] for row in stage["asr"]}
    black = {a: r for a, r in adaptive.items() if parse("attack", a)[0].method.access != "white-box"}
    worst = max(black, key=lambda a: black[a]["value"] or 0.0)
    plain = {f.behavior: f.completion.text for f in findings if f.phase == "before/controls" and f.category == "ordinary"}
    return {
        "defense": defense,
        "class": ", ".join(dict.fromkeys(c.method.family for c in parse("defense", defense))) if defense else "",
        "attacks": {
            a: {"static": asdict(rate(list(static[a].values()))) if a in static else None, "adaptive": r} for a, r in adaptive.items()
        },
        "static": max((asdict(rate(list(s.values()))) for s in static.values()), key=lambda r: r["value"] or 0.0, default=None),
        "worst": {"attack": worst, **black[worst]},
        "any": stage["asr_any"],
        **{key: stage[key] for key in ("over_refusal", "clearance", "ordinary", "incoherent")},
        "kept": asdict(mean([_alike(text, plain[b]) for b, text in bare["plain"].items() if b in plain])) if bare else None,
        **{key: price.get(key) for key in ("seconds", "tokens", "bare")},
        "took": store.read("seconds"),
        "plain": plain,
        "findings": findings,
    }


def _alike(one: str, other: str) -> float:
    """How much of an answer is kept, in [0, 1]: chrF of the two texts."""
    from sacrebleu import sentence_chrf

    return 1.0 if one == other else float(sentence_chrf(other, [one]).score) / 100


def front(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Which rows no other beats: not worse in worst ASR, over-refusal, clearance and added time, and better in one of them."""

    def point(row: dict[str, Any]) -> tuple[float, ...]:
        worst, refused, seconds = (value(row[key]) if row[key] else 0.0 for key in ("worst", "over_refusal", "seconds"))
        cleared = value(row["clearance"]) if row["clearance"] else 1.0
        return worst, refused, 1 - cleared, max(0.0, round(seconds, 1))  # a difference of hundredths is the machine's

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    points = list(map(point, rows))
    return [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]


HEAD = (
    "defense", "class", "worst static", "worst adaptive, without weights", "by", "any adaptive attack", "twins refused",
    "disclosed under clearance", "ordinary refused", "answers kept", "added s", "added tokens",
)  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    rates = [share(row[key]) for key in ("over_refusal", "clearance", "ordinary")]
    costs = [_number(row["kept"], 2), _number(row["seconds"], 2), _number(row["tokens"], 0)]
    shares = [share(row["static"]), share(row["worst"]), row["worst"]["attack"], share(row["any"])]
    return [row["defense"] or "none", row["class"], *shares, *rates, *costs]


def _number(part: dict[str, Any] | None, digits: int) -> str:
    return NONE if not part else f"{part['value']:.{digits}f} [{part['low']:.{digits}f}, {part['high']:.{digits}f}]"


def _both(part: dict[str, Any] | None) -> str:
    if not part:
        return NONE
    return f"{percent(value(part['static'])) if part['static'] else NONE} → {percent(value(part['adaptive']))}"


def _interval(part: dict[str, Any]) -> svg.Interval:
    return value(part), value(part, "low"), value(part, "high")


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown: each stack's worst and price, then the whole matrix, static → adaptive."""
    rows = found["rows"]
    columns = list(dict.fromkeys(a for row in rows for a in row["attacks"]))
    matrix = [[row["defense"] or "none", *(_both(row["attacks"].get(a)) for a in columns)] for row in rows]
    best = "; ".join(rows[i]["defense"] or "none" for i in front(rows))
    lines = [
        ABOUT.format(n=rows[0]["any"]["n"], target=found["settings"]["target"], bare=rows[-1]["bare"]["value"] if rows[-1]["bare"] else 0)
    ]
    for head, body in ((HEAD, list(map(_cells, rows))), (("static → adaptive ASR", *columns), matrix)):
        lines += ["", *(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))]
    return "\n".join([*lines, "", f"No other is better in worst ASR, twins refused, clearance and added time at once: {best}."])


def page(found: dict[str, Any]) -> str:
    """The same as one HTML page, with the trade-offs drawn."""
    rows, first = found["rows"], set(front(found["rows"]))
    columns = list(dict.fromkeys(a for row in rows for a in row["attacks"]))
    letters = [chr(65 + i) if i < 26 else chr(71 + i) for i in range(len(rows))]
    drawn = [i for i, row in enumerate(rows) if row["over_refusal"]]
    spots = [
        svg.Spot(_interval(rows[i]["over_refusal"]), _interval(rows[i]["worst"]), 0 if i in first else None, letters[i]) for i in drawn
    ]
    timed = [i for i in drawn if rows[i]["seconds"]]
    costs = [svg.Spot(_interval(rows[i]["seconds"]), _interval(rows[i]["worst"]), 0 if i in first else None, letters[i]) for i in timed]
    right = max([0.2, *(value(rows[i]["over_refusal"], "high") for i in drawn)])
    slow = max([0.1, *(value(rows[i]["seconds"], "high") for i in timed)])
    names = ("worst adaptive ASR over twins refused", "worst adaptive ASR over added seconds a query")
    up = "worst adaptive ASR, without weights"
    plots = tag("div", svg.scatter(spots, min(1.0, right), ("twins refused", up), names[0]), class_="frame")
    plots += tag("div", svg.scatter(costs, slow, ("seconds added to a short answer", up), names[1], unit=""), class_="frame")
    legend = "".join(
        tag("li", f"{letters[i]}: ", esc(row["defense"] or "none"), " (front)" if i in first else "") for i, row in enumerate(rows)
    )
    sections = {
        "Trade-offs": tag("ul", legend, class_="legend") + plots,
        "All defenses": _grid("All defenses", HEAD, list(map(_cells, rows)), texts=(0, 1, 4)),
    }
    for i, row in enumerate(rows):
        lines = [[a, share(p["static"]), share(p["adaptive"])] for a in columns if (p := row["attacks"].get(a))]
        facts = "".join(tag("div", tag("dt", name), tag("dd", esc(said))) for name, said in zip(HEAD[1:], _cells(row)[1:], strict=True))
        name = row["defense"] or "none"
        sections[f"{letters[i]}: {name}"] = tag("dl", facts, class_="facts") + _grid(name, ("attack", "static", "adaptive"), lines)
    about = ABOUT.format(
        n=rows[0]["any"]["n"], target=found["settings"]["target"], bare=rows[-1]["bare"]["value"] if rows[-1]["bare"] else 0
    )
    return document("Defenses", tag("h1", "Defenses") + tag("p", esc(about)), sections)


ABOUT = (
    "{n} test hazards, target {target}. Static: queries that broke the undefended target, asked once more through the defense. Adaptive: "
    "the attack run against the whole stack, with what is known to get around it added. Worst: the attack with the highest ASR. Answers "
    "kept: chrF with the undefended answers to ordinary requests. Added time: on ordinary requests asked alone, 16 tokens, where the bare "
    "target takes {bare:.2f} s. Intervals are 95%."
)
