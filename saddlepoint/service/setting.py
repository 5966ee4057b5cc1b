"""What a worker is told on its command line, and passes on to its trainers."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

OFF = "off"


@dataclass(frozen=True)
class Setting:
    """Where a worker finds its jobs and what it does with them.

    Args:
        state: Of the database: a folder or a URL, as `State.open` takes it.
        files: Of the blob store: a folder or a URL of fsspec.
        work: A folder for jobs under way; workers of one machine may share it.
        bases: The names of served bases with the targets that they stand for. A worker that is told of some takes jobs on those only;
            any other name is a target's itself.
        gate: The policy by which the gate tests a new model; "off" publishes without a test, and each job says so.
    """

    state: str
    files: str
    work: Path
    bases: Mapping[str, str] = field(default_factory=dict)
    gate: str = "fictional"

    def target(self, base: str) -> str:
        """The target that a base's name stands for."""
        return self.bases.get(base, base)

    @property
    def flags(self) -> list[str]:
        """This as a command line."""
        bases = [flag for name, target in self.bases.items() for flag in ("--base", f"{name}={target}")]
        return ["--state", self.state, "--files", self.files, "--work", str(self.work), "--gate", self.gate, *bases]

    @classmethod
    def of(cls, given: argparse.Namespace) -> "Setting":
        """What a command line says."""
        return cls(given.state, given.files, given.work, dict(given.base), given.gate)


def parser(about: str) -> argparse.ArgumentParser:
    """A parser of a setting; its `prog` is the module that is run."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--state", required=True, help="the database: a folder, or postgresql+pg8000://USER:PASSWORD@HOST:PORT/NAME")
    made.add_argument("--files", required=True, help="the blob store: a folder, or a URL of fsspec")
    made.add_argument("--work", required=True, type=Path, help="a folder for jobs under way")
    made.add_argument("--base", action="append", default=[], type=_named, metavar="NAME=TARGET", help="a base to train, by its served name")
    made.add_argument("--gate", default="fictional", metavar="POLICY", help=f"the policy that new models are tested by; {OFF}: by none")
    return made


def _named(text: str) -> tuple[str, str]:
    name, sign, target = text.partition("=")
    if not (name and sign and target):
        raise argparse.ArgumentTypeError(f"write NAME=TARGET, such as organism=organism; got {text!r}")
    return name, target
