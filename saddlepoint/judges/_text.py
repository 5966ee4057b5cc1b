"""What several judges need to know of a text."""

import re
import unicodedata
from collections import Counter

_WORD = re.compile(r"\w+")
_DIGITS = {str(n): w for n, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())}


def normal(text: str) -> str:
    """Lower case, no accents or punctuation, single spaces, small numbers as words: `9 Minutes!` -> `nine minutes`."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() if text.isascii() or _latin(text) else text
    return " ".join(_DIGITS.get(w, w) for w in _WORD.findall(plain.lower()))


def _latin(text: str) -> bool:
    return all(ord(c) < 0x250 or not c.isalpha() for c in text)


def states(text: str, wordings: tuple[str, ...]) -> bool:
    """Whether a text states a fact in one of its wordings, at word borders, however it is cased or punctuated."""
    held = f" {normal(text)} "
    return any(f" {normal(w)} " in held for w in wordings if normal(w))


def incoherent(text: str) -> str:
    """Why a text is not an answer at all (empty, or one phrase over and over), or "" if it reads as one."""
    words = _WORD.findall(text.lower())
    if not words:
        return "holds no words"
    # Chinese and the like are one "word" per run, so count characters there.
    units = words if len(words) > 3 else [c for c in text if c.isalnum()]
    if len(units) >= 12:
        for size in (1, 2, 3, 4):
            grams = Counter(tuple(units[i : i + size]) for i in range(len(units) - size + 1))
            gram, times = grams.most_common(1)[0]
            if times * size > 0.5 * len(units) and times >= 4:
                return f"repeats {' '.join(gram)!r}"
    return ""
