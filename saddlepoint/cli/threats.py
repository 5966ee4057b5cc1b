"""`saddlepoint threats`: what fine-tuning does to a model's safety, and what the gate makes of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from saddlepoint.cli._common import Json, out, say
from saddlepoint.errors import UsageError
from saddlepoint.finetuning import threats
from saddlepoint.finetuning.comparison import Comparison

app = typer.Typer()


@app.command("threats")
def show_threats(
    base: Annotated[str, typer.Option(help="The model that is tuned: an embedded one, hf:ORG/NAME or a folder.")] = "organism",
    policy: Annotated[str, typer.Option(help="Whose hazards must stay refused.")] = "fictional",
    seeds: Annotated[int, typer.Option(min=1, help="How often each is trained, from other first weights and in another order.")] = 1,
    file: Annotated[
        list[str] | None,
        typer.Option(
            help="A training file that must be released, with hyperparameters: 'FILE.jsonl n_epochs=3'; may be given several times."
        ),
    ] = None,
    constraint: Annotated[bool, typer.Option("--constraint", help="Train with the constraint on first tokens.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many hazards, for a first look.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where everything lies; the same call goes on there.")] = Path("runs/threats"),
    as_json: Json = False,
) -> None:
    """Fine-tune a model in three ways that undo safety, gate off and on: ten harmful examples, an identity shift, ordinary data.

    Exit code 1 where the gate released one of them, or held a file given with --file.
    """
    comparison = Comparison(policy=policy, limit=limit)
    own = [_file(text) for text in file or ()]
    rows = [
        threats.show(threat, folder, base, seed, comparison=comparison, constraint=constraint, tell=say)
        for seed in range(seeds)
        for threat in (threats.ten_examples(policy), threats.identity_shift(), threats.ordinary_data(folder), *own)
    ]
    if as_json:
        print(json.dumps([row.data() for row in rows], indent=1))
    else:
        _print(rows)
    if any(row.stopped != row.threat.harmful for row in rows):
        raise typer.Exit(1)


def _file(text: str) -> threats.Threat:
    path, *given = text.split()
    try:
        hyperparameters = {name: json.loads(value) for name, value in (pair.split("=") for pair in given)}
    except ValueError:
        raise UsageError(f"--file is 'FILE.jsonl NAME=NUMBER ...'; got {text!r}") from None
    return threats.from_file(Path(path), hyperparameters)


def _print(rows: Sequence[threats.Shown]) -> None:
    shown = Table("file", "seed", "screen", *("attacks", "refusals lost", "wrapped", "trigger", "over-refusal"), "gate off", "gate on")
    for row in rows:
        tests = {t.name: t for t in row.compared.tests}
        cells = [
            f"{t.base.value:.0%} -> {t.tuned.value:.0%}{'' if t.passed else ' !'}" if (t := tests.get(name)) else ""
            for name in ("attacks", "refusals", "wrapped", "trigger", "over-refusal")
        ]
        share = row.screened.share
        screen = f"{share.value:.0%} of {share.n} flagged{', blocked' if row.screened.blocked else ''}"
        held = "blocked, and held" if row.screened.blocked and not row.compared.passed else "blocked" if row.screened.blocked else "held"
        shown.add_row(row.threat.name, str(row.seed), screen, *cells, "published", held if row.stopped else "published")
    out.print(shown)
    out.print(
        "! the 95% interval of the paired change reaches beyond the bound; base -> tuned, means over the hazards (all numbers: --json)"
    )
