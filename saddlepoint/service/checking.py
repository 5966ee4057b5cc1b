"""The files of a job: read, checked, and what is wrong with them said in the words of OpenAI's service."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from saddlepoint.errors import StoreError
from saddlepoint.finetuning.data import LEAST, Checked, Format, Mistake, Record, check
from saddlepoint.finetuning.overlap import Pair, duplicates, leaks
from saddlepoint.finetuning.summary import grouped
from saddlepoint.service.task import Failed, Task

FORMATS: Mapping[str, tuple[Format, ...]] = {
    "supervised": ("chat", "completion"),
    "dpo": ("preference",),
    "reinforcement": ("reinforcement",),
}
SHOWN = 5  # kinds of mistakes that a message lists
TOLD = 200  # mistakes, warnings or pairs that an event holds


def validate(task: Task) -> None:
    """Check a job's files: it is queued where they are good.

    Raises:
        Failed: They are not.
    """
    files = read(task)
    for name, found in files.items():
        if found.warnings:
            said = f"{name}: {_summed(found.warnings)}"
            task.tell(said, "warn", data=_listed("warnings", found.warnings), key=f"warnings {name}")
    for said, pairs in _alike(*(found.records for found in files.values())):
        task.tell(said, "warn", data=_listed("pairs", pairs), key=said)
    task.state.validated(task.job.id, task.worker)


def read(task: Task) -> dict[str, Checked]:
    """The job's files, each by what it is called in a message.

    Raises:
        Failed: One is gone or has mistakes.
    """
    allowed = FORMATS[task.job.method["type"]]
    training = _file(task, task.job.training_file, "Training file", "training_file", allowed, LEAST)
    if not task.job.validation_file:
        return {"Training file": training}
    validation = _file(task, task.job.validation_file, "Validation file", "validation_file", (training.format,), 1)
    return {"Training file": training, "Validation file": validation}


def _file(task: Task, id: str, name: str, param: str, allowed: tuple[Format, ...], least: int) -> Checked:
    file = task.state.files.get(id)
    if file is None:
        raise Failed("invalid_file", f"{name} {id} was deleted before the job came to its end", param)
    try:
        data = b"".join(task.blobs.chunks(file.sha))
    except StoreError as wrong:
        raise Failed("invalid_file", f"{name} {id} cannot be read: {wrong}", param) from wrong
    # Which of these two a chat is depends on what it is for; the others are told apart by their looks.
    found = check(data, next((f for f in allowed if f == "reinforcement"), None), least)
    if found.format not in allowed:
        kind = task.job.method["type"]
        raise Failed("invalid_file_format", f"{name} is of the format {found.format}; {kind} takes: {', '.join(allowed)}", param)
    mistakes = [m for m in found.mistakes if m.code != "invalid_n_examples"]
    if mistakes:
        lines = len({m.line for m in mistakes})
        said = f"{name}: its mistakes one by one, up to {TOLD}, are the data of this event"
        task.tell(said, "error", data=_listed("mistakes", mistakes), key=f"mistakes {name}")
        raise Failed("invalid_file_format", f"{name} has {len(mistakes)} mistake(s) in {lines} line(s): {_summed(mistakes)}", param)
    if found.mistakes:
        raise Failed("invalid_n_examples", f"{name} has {found.examples} example(s), but must have at least {least} examples", param)
    return found


def _summed(found: Sequence[Mistake]) -> str:
    """Mistakes by their kind, the most frequent first: what stays readable with ten thousand of them."""
    kinds = grouped(found, 1)
    shown = "; ".join(f"line {m.line}, column {m.column}: {m.message}{_more(g.n)}" for g in kinds[:SHOWN] for m in g.first)
    return shown + (f"; and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else "")


def _listed(what: str, found: Sequence[Mistake] | Sequence[Pair]) -> dict[str, Any]:
    """The data of an event: the first of them, and how many there are."""
    return {what: [asdict(one) for one in found[:TOLD]], "of": len(found)}


def _more(n: int) -> str:
    return f" (and {n - 1:,} more of this kind)" if n > 1 else ""


def _alike(training: Sequence[Record], validation: Sequence[Record] = ()) -> Iterator[tuple[str, Sequence[Pair]]]:
    """What to say of examples that stand there twice, and which they are."""
    if pairs := duplicates(training):
        yield f"Training file: {len(pairs)} example(s) are like an earlier one: {_pairs(pairs, 'line')}", pairs
    if pairs := leaks(training, validation):
        yield f"Validation file: {len(pairs)} example(s) are like one of the training file: {_pairs(pairs, 'its line')}", pairs


def _pairs(pairs: Sequence[Pair], other: str) -> str:
    shown = ", ".join(f"line {p.line} like {other} {p.other} ({p.kind})" for p in pairs[:SHOWN])
    return shown + (f", and {len(pairs) - SHOWN:,} more" if len(pairs) > SHOWN else "")
