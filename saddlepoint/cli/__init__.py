"""The command line: parse, call the API, print. Data goes to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 something failed, 2 the user can correct it, 3 more was broken than --fail-above allows, 130 interrupted.
Each file beside this one is a group of commands.
"""

import logging
import sys
import warnings
from typing import Annotated

import typer

from saddlepoint import __version__
from saddlepoint.cli import approvals, attacker, bench, claims, finetune, judges, methods, models, rewards, runs, serve, threats
from saddlepoint.cli._common import err
from saddlepoint.errors import SaddlepointError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find how a model breaks its policy, harden it, and prove that the fix holds.",
)
for part in (runs.app, methods.app, rewards.app, serve.app, threats.app):
    app.add_typer(part)
for name, part in (
    ("models", models.models_app),
    ("organism", models.organism_app),
    ("clerk", models.clerk_app),
    ("guard", models.guard_app),
    ("attacker", attacker.app),
    ("approvals", approvals.app),
    ("judge", judges.judge_app),
    ("policy", judges.policy_app),
    ("bench", bench.app),
    ("claims", claims.app),
    ("finetune", finetune.app),
    ("blocks", serve.blocks_app),
):
    app.add_typer(part, name=name)


def main() -> None:
    """Entry point: turn errors into one line and an exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("saddlepoint").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="transformers|peft")  # their notes to their own developers
    try:
        app(standalone_mode=True)
    except SaddlepointError as wrong:
        err.print(f"error: {' '.join(str(wrong).split())}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(wrong.exit_code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit
