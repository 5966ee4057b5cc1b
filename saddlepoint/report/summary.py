"""Every number of a run, with its interval, as one JSON-able record."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from saddlepoint import __version__
from saddlepoint.config import Config
from saddlepoint.metrics import broken, difference, disclosed, mean, rate, refused
from saddlepoint.registry import parse
from saddlepoint.store import Store
from saddlepoint.types import Finding, Message

AT = (1, 10, 100)  # queries at which ASR is given


def summarize(store: Store) -> dict[str, Any]:
    """Compute a run's numbers.

    Returns:
        `config`, `params` (of every method, resolved), `machine`, `complete`, and `stages`: for each stage its `asr` per
        attack (strongest first) and `asr_any`, the controls `over_refusal`, `clearance`, `ordinary`, `incoherent`, the
        `utility` loss, its `training` card, and `change`: each of these against the first stage, paired. `cost` is what
        every phase spent, controls and harvest too, and the searches of universal attacks; `artifacts` is what those
        found; `recorded` is when the run was last written.
    """
    config = Config.model_validate(store.read("config"))
    findings = store.findings()
    # A stage that was only hardened, not scored, still has its training to show.
    names = list(dict.fromkeys([*(f.phase for f in findings if "/" not in f.phase), *store.notes("training:")]))
    stages = [_stage(store, name, findings) for name in names]
    for stage in stages[1:]:
        stage["change"] = _change(stages[0], stage)
    for stage in stages:
        del stage["outcomes"]
    artifacts = [{**note, "phase": key.partition(":")[0]} for key, note in store.notes("artifact:").items()]
    searches = {
        f"{a['phase']}, search of {a['artifact']['attack']}": {"queries": 0, **{k: a[k] for k in ("tokens", "gradients", "seconds")}}
        for a in artifacts
    }
    summary = {
        "saddlepoint": __version__,
        "config": config.model_dump(),
        "params": _params(config),
        "machine": store.read("machine"),
        "complete": store.read("complete") or False,
        "seconds": store.read("seconds"),
        "recorded": _recorded(store),
        "cost": {phase: _cost([f for f in findings if f.phase == phase]) for phase in dict.fromkeys(f.phase for f in findings)} | searches,
        "artifacts": artifacts,
        "stages": stages,
    }
    return {key: _without_nan(value) for key, value in summary.items()}


def _params(config: Config) -> dict[str, dict[str, Any]]:
    chosen = {"attack": config.attacks, "defense": config.defenses, "judge": f"{config.search_judge}, {config.judge}"}
    if config.kind == "loop":
        chosen["recipe"] = config.recipes
    return {f"{kind} {call}": call.params for kind, text in chosen.items() if text for call in parse(kind, text)}  # type: ignore[arg-type]


def _stage(store: Store, name: str, findings: Sequence[Finding]) -> dict[str, Any]:
    here = [f for f in findings if f.phase == name]
    controls = [f for f in findings if f.phase == f"{name}/controls"]
    twins = [f for f in controls if f.kind == "twin" and f.category != "ordinary"]
    plain = [f for f in controls if f.category == "ordinary"]
    cleared = [f for f in controls if f.kind == "cleared"]
    losses = store.read(f"utility:{name}") or []
    attacks = {a: [f for f in here if f.attack == a] for a in dict.fromkeys(f.attack for f in here)}
    rows = [_attack(a, fs) for a, fs in attacks.items()]
    gibberish = {f.behavior: None if f.verdict.unsafe is None else f.verdict.label == "incoherent" for f in [*twins, *plain]}
    outcomes: dict[str, Any] = {
        "asr_any": broken(here),
        **{a: broken(fs) for a, fs in attacks.items()},
        "over_refusal": refused(twins),
        "clearance": disclosed(cleared),
        "ordinary": refused(plain),
        "incoherent": gibberish,
        "utility": losses,
    }
    return {
        "name": name,
        "target": here[0].target if here else "",
        "asr": sorted(rows, key=lambda row: -_or_zero(row["rate"]["value"])),
        "asr_any": asdict(rate(list(broken(here).values()))),
        **{
            key: asdict(rate(list(outcomes[key].values()))) if outcomes[key] else None
            for key in ("over_refusal", "clearance", "ordinary", "incoherent")
        },
        "utility": asdict(mean(losses)) if losses else None,
        "training": store.read(f"training:{name}"),
        "transcripts": [asdict(replace(f, chat=tuple(_shown(m) for m in f.chat))) for f in [*here, *controls]],
        "outcomes": outcomes,
    }


def _shown(message: Message) -> Message:
    """A message as people read it: embeddings that belong to no token are only counted."""
    return Message(message.role, f"{message.text} [{len(message.soft)} soft tokens]") if message.soft else message


def _attack(name: str, findings: Sequence[Finding]) -> dict[str, Any]:
    labels = [f.verdict.label for f in findings]
    return {
        "attack": name,
        "rate": asdict(rate(list(broken(findings).values()))),
        "at": {str(k): asdict(rate(list(broken(findings, k).values()))) for k in AT if k <= max(f.queries for f in findings)},
        "labels": {label: labels.count(label) for label in sorted(set(labels))},
        "ended": {end: sum(f.ended == end for f in findings) for end in sorted({f.ended for f in findings})},
        **_cost(findings),
    }


def _cost(findings: Sequence[Finding]) -> dict[str, float]:
    spent = {name: sum(getattr(f, name) for f in findings) for name in ("queries", "tokens", "gradients")}
    return {**spent, "seconds": round(sum(f.seconds for f in findings), 2)}


def _recorded(store: Store) -> str:
    """When the database was last written, in UTC; a reader may leave an empty log beside it."""
    files = [store.path / "run.db", store.path / "run.db-wal"]
    last = max(f.stat().st_mtime for f in files if f.exists() and (f.stat().st_size or f is files[0]))
    return datetime.fromtimestamp(last, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _change(first: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    a, b = first["outcomes"], stage["outcomes"]
    changes = {k: asdict(difference(a[k], b[k])) for k in b if k in a and k != "utility"}
    if a["utility"] and len(a["utility"]) == len(b["utility"]):
        changes["utility"] = asdict(mean([y - x for x, y in zip(a["utility"], b["utility"], strict=True)]))
    return changes


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a rate of nothing is null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
