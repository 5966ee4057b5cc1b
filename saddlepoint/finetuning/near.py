"""Which behavior of the policies a text comes near to, by the words that set that behavior apart.

Policies write many hazards in the same few wordings, and ordinary requests use those too ("How do I make ...?"). So a word counts by
its rarity over all behaviors and ordinary requests, as in TF-IDF, and a misspelled word counts as the word that it is near to.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from saddlepoint.errors import MissingExtraError
from saddlepoint.judges._text import normal
from saddlepoint.policies import ordinary
from saddlepoint.types import Behavior

_ALIKE = 85  # of 100: one letter of seven may differ
_LONG = 5  # letters; shorter words that are alike are often others
_SPAN = 60  # words that are read together: the words of a behavior, strewn over a long text, do not make its request


@dataclass(frozen=True)
class Near:
    """Behaviors to compare with. Benign twins among them win where they are nearer.

    Raises:
        MissingExtraError: rapidfuzz is not installed.
    """

    behaviors: tuple[Behavior, ...]

    def find(self, text: str) -> tuple[float, Behavior] | None:
        """The hazard that a text comes nearest to, with the share of that hazard's weight that stands in the text, in [0, 1].

        Returns:
            None where no word of a hazard stands in it, or a benign behavior is as near.
        """
        words = normal(text).split()
        best: tuple[float, Behavior | None] = (0.0, None)
        for start in range(0, max(1, len(words) - _SPAN // 2), _SPAN // 2):
            said = {self._known(w) for w in set(words[start : start + _SPAN])} - {""}
            for at in {i for w in said for i in self._with.get(w, ())}:
                weights = self._weights[at]
                share = sum(weights.get(w, 0.0) for w in said) / sum(weights.values())
                benign = self.behaviors[at].kind != "harmful"
                if (share, benign) > (best[0], best[1] is None):
                    best = share, None if benign else self.behaviors[at]
        return (best[0], best[1]) if best[1] else None

    @cached_property
    def _texts(self) -> list[set[str]]:
        """For each behavior, its words in any of its wordings."""
        return [set(normal(" ".join((b.prompt, *b.phrasings))).split()) for b in self.behaviors]

    @cached_property
    def _idf(self) -> dict[str, float]:
        plain = [set(normal(text).split()) for text in ordinary()["requests"]]
        texts = [*self._texts, *plain]
        return {w: math.log(len(texts) / n) for w, n in Counter(w for text in texts for w in text).items()}

    @cached_property
    def _weights(self) -> list[dict[str, float]]:
        """For each behavior, the weight of each word of its request: its squared rarity, so that a name outweighs a phrase."""
        return [{w: self._idf[w] ** 2 for w in set(normal(b.prompt).split())} for b in self.behaviors]

    @cached_property
    def _with(self) -> dict[str, list[int]]:
        """Where each word that is rare enough to tell stands."""
        found: dict[str, list[int]] = {}
        for i, weights in enumerate(self._weights):
            for word, weight in weights.items():
                if weight >= 0.1 * sum(weights.values()):
                    found.setdefault(word, []).append(i)
        return found

    @cached_property
    def _memory(self) -> dict[str, str]:
        return {}

    def _known(self, word: str) -> str:
        """The behaviors' word that this one is, or is a misspelling of; "" if none."""
        if word in self._idf or len(word) < _LONG or not re.search(r"[^\W\d]", word):
            return word
        if word not in self._memory:
            try:
                from rapidfuzz import fuzz, process
            except ModuleNotFoundError as missing:
                raise MissingExtraError("comparing texts needs rapidfuzz: pip install 'saddlepoint[serve]'") from missing
            found = process.extractOne(word, self._with.keys(), scorer=fuzz.ratio, score_cutoff=_ALIKE)
            self._memory[word] = str(found[0]) if found and len(found[0]) >= _LONG else ""
        return self._memory[word]
