"""Examples that stand in a file twice, or in a training and in its validation file: equal, nearly equal, or asking the same.

System messages are left out, because the examples of a file often share one. Texts are compared in lower case with single spaces.
Near examples are found without comparing all pairs: their sets of 5-character shingles are hashed to 32 minima in 8 bands, and
only what shares a band is compared, with the first 8 of a band. Of two examples whose sets are alike by 0.9 (Jaccard), 9,998 pairs of
10,000 share one; by 0.8, 985 of 1,000.

Source: Broder 1997, "On the Resemblance and Containment of Documents", https://doi.org/10.1109/SEQUEN.1997.666900
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saddlepoint.finetuning.data import Record

ALIKE = 0.8
"""Jaccard similarity from which two examples are near."""
_SHINGLE, _BANDS, _ROWS = 5, 8, 4
_PRIME = np.uint64((1 << 31) - 1)
_MIXED = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD], dtype=np.uint64)
_COMPARED = 8  # examples of one band that a new one is compared with, so that a file of one template stays cheap


@dataclass(frozen=True)
class Pair:
    """Two examples that are alike.

    Args:
        line: In the file that was looked through.
        other: The earlier line of the same file, or the line of the other file.
        kind: "same": nothing differs; "near": almost nothing; "prompt": the same is asked and something else answered.
        alike: Jaccard similarity of the whole examples, in [0, 1].
    """

    line: int
    other: int
    kind: Literal["same", "near", "prompt"]
    alike: float


def duplicates(records: Sequence[Record]) -> tuple[Pair, ...]:
    """Each example that is like an earlier one of its file, with the first that it is most like."""
    return tuple(_found(records, (), within=True))


def leaks(training: Sequence[Record], validation: Sequence[Record]) -> tuple[Pair, ...]:
    """Each validation example (`line`) that is like a training example (`other`)."""
    return tuple(_found(validation, training, within=False))


def _found(records: Sequence[Record], known: Sequence[Record], within: bool) -> Iterator[Pair]:
    seen = _Seen()
    for record in known:
        seen.add(record)
    for record in records:
        if pair := seen.like(record):
            yield pair
        if within:
            seen.add(record)


class _Seen:
    """The examples so far, by what likens others to them."""

    def __init__(self) -> None:
        self.whole: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self.shingles: dict[int, np.ndarray] = {}

    def add(self, record: Record) -> None:
        whole, asked = _texts(record)
        if whole in self.whole:
            return
        self.whole[whole] = record.line
        self.asked.setdefault(asked, record.line)
        self.shingles[record.line] = own = _shingles(whole)
        for band in _bands(own):
            if len(self.bands[band]) < _COMPARED:
                self.bands[band].append(record.line)

    def like(self, record: Record) -> Pair | None:
        whole, asked = _texts(record)
        if whole in self.whole:
            return Pair(record.line, self.whole[whole], "same", 1.0)
        own = _shingles(whole)
        candidates = {line for band in _bands(own) for line in self.bands.get(band, ())}
        best = max(((_jaccard(own, self.shingles[line]), -line) for line in candidates), default=(0.0, 0))
        if best[0] >= ALIKE:
            return Pair(record.line, -best[1], "near", best[0])
        if asked and asked in self.asked:
            line = self.asked[asked]
            return Pair(record.line, line, "prompt", _jaccard(own, self.shingles[line]))
        return None


def _texts(record: Record) -> tuple[str, str]:
    """The whole example, and what is asked in it."""
    turns = [m.text for m in record.chat if m.role != "system"]
    last = max((i for i, own in enumerate(record.learned) if own), default=len(record.chat))
    asked = [m.text for m in record.chat[:last] if m.role != "system"] or [record.prompt]
    whole = [*turns, record.prompt, record.completion, record.preferred, record.rejected]
    return _plain(" | ".join(filter(None, whole))), _plain(" | ".join(asked))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _shingles(text: str) -> np.ndarray:
    """uint64 (n,), sorted: the hashes of the runs of 5 characters of a text; a shorter one is filled up with zeros."""
    points = np.frombuffer(text.ljust(_SHINGLE, "\0").encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(points, _SHINGLE)
    return np.unique((runs * _MIXED).sum(axis=1, dtype=np.uint64))  # modulo 2**64


_DRAWN = np.random.default_rng(0).integers(1, int(_PRIME), (2, _BANDS * _ROWS, 1), dtype=np.uint64)


def _bands(shingles: np.ndarray) -> list[tuple[int, bytes]]:
    """The minima of a set of shingles under 32 hash functions, 4 in a band."""
    times, plus = _DRAWN
    minima = ((times * (shingles % _PRIME) + plus) % _PRIME).min(axis=1).reshape(_BANDS, _ROWS)
    return [(i, row.tobytes()) for i, row in enumerate(minima)]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
