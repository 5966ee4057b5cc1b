"""How alike two texts are, by the measures that graders name. Each is 1 for equal texts and, but for `cosine`, never below 0.

Source:  BLEU through sacrebleu; GLEU: Wu et al. 2016, "Google's Neural Machine Translation System", https://arxiv.org/abs/1609.08144;
         ROUGE: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", https://aclanthology.org/W04-1013
Differs: words are lower-cased runs of letters, digits and underscores, without stemming; ROUGE is its F1. METEOR needs WordNet and cannot be had.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from saddlepoint.errors import MissingExtraError


def fuzzy_match(text: str, reference: str) -> float:
    """The normalized indel similarity of the characters (rapidfuzz's `ratio`), in [0, 1]."""
    try:
        from rapidfuzz.fuzz import ratio
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"fuzzy_match needs {missing.name}: pip install 'saddlepoint[serve]'") from missing
    return float(ratio(text, reference)) / 100


def bleu(text: str, reference: str) -> float:
    """Sentence BLEU of up to 4-grams with exponential smoothing (sacrebleu), in [0, 1]; a short text by the n-grams that it has."""
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"bleu needs {missing.name}: pip install 'saddlepoint[local]'") from missing
    if text == reference:
        return 1.0
    return min(1.0, float(BLEU(effective_order=True).sentence_score(text, [reference]).score) / 100)


def gleu(text: str, reference: str) -> float:
    """The smaller of precision and recall over all runs of 1 to 4 words together, in [0, 1]."""
    own, wanted = ([gram for n in range(1, 5) for gram in _grams(_words(side), n)] for side in (text, reference))
    if not own or not wanted:
        return float(own == wanted)
    return sum((Counter(own) & Counter(wanted)).values()) / max(len(own), len(wanted))


def rouge(text: str, reference: str, n: int) -> float:
    """F1 of the runs of `n` words, in [0, 1]. Texts too short to have one are alike where they are equal."""
    own, wanted = (Counter(_grams(_words(side), n)) for side in (text, reference))
    if not own or not wanted:
        return float(_words(text) == _words(reference))
    return 2 * sum((own & wanted).values()) / (sum(own.values()) + sum(wanted.values()))


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]."""
    try:
        from rapidfuzz.distance import LCSseq
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"rouge_l needs {missing.name}: pip install 'saddlepoint[serve]'") from missing
    own, wanted = _words(text), _words(reference)
    return 2 * LCSseq.similarity(own, wanted) / (len(own) + len(wanted)) if own or wanted else 1.0


def cosine(text: str, reference: str) -> float:
    """The cosine of the texts' embeddings by all-MiniLM-L6-v2, in [-1, 1].

    Raises:
        MissingExtraError, ModelError: The encoder cannot be had.
    """
    from saddlepoint.diversity import spread

    return 1 - spread([text, reference])


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match, "bleu": bleu, "gleu": gleu, "cosine": cosine, "rouge_l": rouge_l,
    **{f"rouge_{n}": partial(rouge, n=n) for n in range(1, 6)},
}  # fmt: skip


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
