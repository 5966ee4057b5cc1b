"""What `saddlepoint finetune check` found, in the terminal."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from saddlepoint.cli._common import out
from saddlepoint.finetuning.counts import Counts
from saddlepoint.finetuning.overlap import Pair
from saddlepoint.finetuning.report import Looked, Report
from saddlepoint.finetuning.summary import SHOWN, readable

WORDS = {"same": "the same as", "near": "nearly the same as", "prompt": "asks the same as"}


def show(found: Report) -> None:
    """Print it."""
    _file(found.training, "training file")
    if found.validation:
        _file(found.validation, "validation file")
        _pairs("leaks from training into validation", found.leaks, "training line")
    if not found.right:
        _line("\nnot ready: correct the mistakes above")
        return
    _line(f"\nmethod {found.method}; by default {found.epochs} epoch(s) in batches of {found.batch}")
    if found.cost:
        billed = f"{found.cost.tokens:,} tokens of this tokenizer x {found.cost.epochs} epoch(s)"
        _line(f"cost by the prices of {found.cost.prices.name}: {found.cost.training:,.2f} for training ({billed}),")
        _line(f"  {found.cost.asking:,.2f} for asking the tuned model 1,000 such examples")
    if found.speed and found.seconds is not None:
        s = found.speed
        _line(
            f"on this machine about {_time(found.seconds)}: {s.tokens_per_second:,.0f} tokens/s [{s.low:,.0f}, {s.high:,.0f}] (95%, "
            f"n={s.n} steps of {s.batch} examples of {s.length:,.0f} tokens, {s.threads} thread(s)), measured {s.measured} UTC by really training {s.base}"
        )


def plain(found: Report) -> dict[str, Any]:
    """The same for programs: everything but the examples."""
    return {
        "right": found.right,
        "training": _plain(found.training),
        "validation": _plain(found.validation) if found.validation else None,
        "leaks": [asdict(pair) for pair in found.leaks],
        "method": found.method,
        "epochs": found.epochs,
        "batch": found.batch,
        "cost": asdict(found.cost) if found.cost else None,
        "seconds": found.seconds,
        "speed": asdict(found.speed) if found.speed else None,
    }


def _plain(looked: Looked) -> dict[str, Any]:
    checked, counts = looked.checked, looked.counts
    return {
        "file": looked.name,
        "bytes": looked.bytes,
        "format": checked.format,
        "examples": checked.examples,
        "mistakes": [asdict(mistake) for mistake in looked.mistakes],
        "warnings": [asdict(warning) for warning in looked.warnings],
        "counts": {k: v for k, v in asdict(counts).items() if k not in ("lengths", "mistakes")} if counts else None,
        "duplicates": [asdict(pair) for pair in looked.duplicates],
    }


def _file(looked: Looked, what: str) -> None:
    checked = looked.checked
    _line(f"{what} {looked.name}: format {checked.format}, {checked.examples:,} example(s), {looked.bytes:,} bytes")
    for name, found, shown in (("mistakes", looked.mistakes, SHOWN), ("warnings", looked.warnings, 1)):
        _line(f"{name}: {len(found):,}" if found else f"{name}: none")
        for line in readable(found, shown):
            _line(f"  {line}")
    if looked.counts and looked.counts.lengths:
        _counts(looked.counts)
    _pairs("duplicates", looked.duplicates, "line")


def _counts(counts: Counts) -> None:
    shown = Table("per example", *"min p5 median mean p95 max total".split(), title=f"by the tokenizer and template of {counts.base}")
    for name, s in (("tokens", counts.tokens), ("tokens learned", counts.trained), ("messages", counts.messages)):
        shown.add_row(name, *(f"{x:,.1f}".removesuffix(".0") for x in (s.min, s.p5, s.median, s.mean, s.p95, s.max, s.total)))
    out.print(shown)
    _line(f"{len(counts.cut):,} longer than the {counts.context:,} tokens that the model reads")


def _pairs(name: str, pairs: tuple[Pair, ...], other: str) -> None:
    _line(f"{name}: {len(pairs):,}" if pairs else f"{name}: none")
    for kind, words in WORDS.items():
        these = [pair for pair in pairs if pair.kind == kind]
        for pair in these[:SHOWN]:
            _line(f"  line {pair.line}: {words} {other} {pair.other} ({pair.alike:.0%} alike)")
        if len(these) > SHOWN:
            _line(
                f"  and {len(these) - SHOWN:,} more that are {words} another" if kind != "prompt" else f"  and {len(these) - SHOWN:,} more"
            )


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min" if seconds < 36_000 else f"{seconds / 3600:,.1f} h"


def _line(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
