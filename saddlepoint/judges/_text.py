"""What several judges need to know of a text."""

import re
import unicodedata
from collections import Counter

_WORD = re.compile(r"\w+")
_MARKS = re.compile("[\u0300-\u036f]")  # accents, once they are apart from their letters
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # Chinese and Japanese have no word borders
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_DIGITS = {str(n): w for n, w in enumerate(_ONES)} | {
    str(n): _TENS[n // 10 - 2] + (f" {_ONES[n % 10]}" if n % 10 else "") for n in range(20, 100)
}


def normal(text: str) -> str:
    """Lower case, no accents or punctuation, single spaces, numbers below 100 as words: `9 Minutes!` -> `nine minutes`."""
    plain = unicodedata.normalize("NFKC", _MARKS.sub("", unicodedata.normalize("NFKD", text.lower())))
    return " ".join(_DIGITS.get(w, w) for w in _WORD.findall(plain.lower()))


def states(text: str, wordings: tuple[str, ...]) -> bool:
    """Whether a text states a fact in one of its wordings, at word borders, however it is cased or punctuated."""
    held = f" {normal(text)} "
    return any((w if _UNSPACED.search(w) else f" {w} ") in held for w in map(normal, wordings) if w)


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
