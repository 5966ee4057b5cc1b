"""What every group of commands uses: the consoles, the flags that several have, and how a card or a rate is printed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from saddlepoint import models
from saddlepoint.errors import UsageError

out, err = Console(emoji=False), Console(stderr=True, emoji=False)  # the names of tuned models hold colons

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; a new one under runs/ if not given.")]


def group(about: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(no_args_is_help=True, help=about)


def say(line: str) -> None:
    """Tell what is happening, on stderr."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def rate(r: dict[str, Any] | None) -> str:
    """A rate with its interval, for a table of rich."""
    if r is None or r["value"] is None:
        return "n/a"
    return f"{r['value']:.0%} \\[{r['low']:.0%}, {r['high']:.0%}]"


def print_card(folder: Path, what: str, as_json: bool) -> None:
    """Print the card of a folder that `saddlepoint WHAT build` wrote."""
    written = models.card(folder)
    if not written:
        raise UsageError(f"{folder} holds no card.json; build one: saddlepoint {what} build --out {folder}")
    if as_json:
        print(json.dumps(written, indent=1))
    else:
        show_card(written)


def show_card(card: dict[str, Any]) -> None:
    """Print the measured properties that a card holds."""
    shown = Table("property", "measured", "n", "aim")
    for name, row in card.get("properties", {}).items():
        shown.add_row(name, rate(row), str(row["n"]), row.get("aim", ""))
    out.print(shown)


def built(build: Callable[..., Any], measure: Callable[[Path], dict[str, Any]], folder: Path, seed: int) -> None:
    """Train an embedded model from a seed, with a bar, and print what it measures."""
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[doing]}"), console=err) as bars:
        bar = bars.add_task("training", total=None, doing="")
        build(folder, seed, tell=lambda p: bars.update(bar, total=p.steps, completed=p.step, doing=f"loss {p.loss:.3f}"))
    show_card(measure(folder))
