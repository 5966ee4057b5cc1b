"""Many mistakes in few lines: by their code, the most frequent first, with the first of each."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saddlepoint.finetuning.data import Mistake

SHOWN = 3


@dataclass(frozen=True)
class Group:
    """Mistakes of one kind.

    Args:
        n: How many there are.
        first: The first of them.
    """

    code: str
    n: int
    first: tuple[Mistake, ...]


def grouped(found: Sequence[Mistake], shown: int = SHOWN) -> list[Group]:
    """Mistakes by their code, the most frequent first."""
    codes: dict[str, list[Mistake]] = defaultdict(list)
    for mistake in found:
        codes[mistake.code].append(mistake)
    groups = [Group(code, len(these), tuple(these[:shown])) for code, these in codes.items()]
    return sorted(groups, key=lambda group: -group.n)


def readable(found: Sequence[Mistake], shown: int = SHOWN) -> Iterator[str]:
    """The lines of a summary that stays short however many mistakes there are."""
    for group in grouped(found, shown):
        yield f"{group.code}: {group.n:,}"
        for mistake in group.first:
            yield f"  line {mistake.line}, column {mistake.column}: {mistake.message}"
        if group.n > len(group.first):
            yield f"  and {group.n - len(group.first):,} more"
