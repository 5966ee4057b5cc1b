"""All that `saddlepoint finetune check` finds out about a training file and its validation file, in one record."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saddlepoint.errors import UsageError
from saddlepoint.finetuning.cost import Cost, Prices, Speed, cost, recorded, speed
from saddlepoint.finetuning.counts import Counts, measured
from saddlepoint.finetuning.data import Checked, Format, Mistake, check
from saddlepoint.finetuning.overlap import Pair, duplicates, leaks
from saddlepoint.finetuning.plan import Method, resolved

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

LARGE = 50 << 20  # bytes
METHODS: dict[Format, Method] = {"chat": "supervised", "completion": "supervised", "preference": "dpo", "reinforcement": "reinforcement"}


@dataclass(frozen=True)
class Looked:
    """One file.

    Args:
        counts: None where no model was given to count by.
    """

    name: str
    bytes: int
    checked: Checked
    counts: Counts | None
    duplicates: tuple[Pair, ...]

    @property
    def mistakes(self) -> tuple[Mistake, ...]:
        """Of the file, and of the examples that the model cannot be trained on."""
        return self.checked.mistakes + (self.counts.mistakes if self.counts else ())

    @property
    def warnings(self) -> tuple[Mistake, ...]:
        """Of the file, and of the examples that are too long."""
        long = "{:,} tokens, and the model reads {:,}: the rest is cut off"
        cut = [Mistake(c.line, 1, "too_long", long.format(c.tokens, self.counts.context)) for c in self.counts.cut] if self.counts else []
        large = f"{self.bytes:,} bytes; servers take {LARGE:,} where they are told nothing else"
        return (*([Mistake(1, 1, "large_file", large)] if self.bytes > LARGE else []), *self.checked.warnings, *cut)


@dataclass(frozen=True)
class Report:
    """A training file and, where there is one, its validation file.

    Args:
        method: What the format is trained by.
        epochs, batch: What "auto" will be.
        cost, speed, seconds: None where there are no counts, and the last two where the speed was not measured.
        seconds: Of all steps on this machine, by `speed`; measuring validation loss comes on top.
        leaks: Validation examples that are like training examples.
    """

    training: Looked
    validation: Looked | None
    method: Method
    epochs: int
    batch: int
    cost: Cost | None
    speed: Speed | None
    seconds: float | None
    leaks: tuple[Pair, ...]

    @property
    def right(self) -> bool:
        return not self.training.mistakes and not (self.validation and self.validation.mistakes)


def looked(file: Path, format: Format | None, least: int, model: "HF | None", tell: Callable[[int, int], None]) -> Looked:
    """Read and check one file.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        data = file.read_bytes()
    except OSError as wrong:
        raise UsageError(f"{file}: cannot be read: {wrong.strerror or wrong}; give a JSON Lines file") from None
    checked = check(data, format, least)
    counts = measured(checked.records, model, lambda done: tell(done, len(checked.records))) if model else None
    return Looked(str(file), len(data), checked, counts, duplicates(checked.records))


def report(
    training: Path,
    validation: Path | None,
    format: Format | None,
    model: "HF | None",
    table: Prices,
    measure: bool | None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Check the files, count, and tell what a training on them would cost.

    Args:
        model: Counts by its tokenizer and template; None does not count.
        measure: True times a short training now; None only where no speed is recorded; False never.
        tell: Is told how many examples are counted, and of how many.

    Raises:
        UsageError: A file cannot be read.
    """
    first = looked(training, format, 10, model, tell)
    second = looked(validation, first.checked.format, 1, model, tell) if validation else None
    method = METHODS[first.checked.format]
    auto = resolved(method, {}, max(1, first.checked.examples))
    counts, paid, fast, seconds = first.counts, None, None, None
    if counts and counts.lengths:
        paid = cost(table, counts.lengths, counts.trained.total, auto["epochs"])
        broken = {mistake.line for mistake in counts.mistakes}
        usable = [record for record in first.checked.records if record.line not in broken]
        if method != "reinforcement" and measure is not False:
            fast = None if measure else recorded(counts.base, method)
            fast = fast or speed(counts.base, method, usable, auto["batch"])
            seconds = (
                sum(min(n, counts.context * (1 + (method == "dpo"))) for n in counts.lengths) * auto["epochs"] / fast.tokens_per_second
            )
    shared = leaks(first.checked.records, second.checked.records) if second else ()
    return Report(first, second, method, auto["epochs"], auto["batch"], paid, fast, seconds, shared)
