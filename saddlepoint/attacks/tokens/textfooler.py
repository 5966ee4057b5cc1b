"""TextFooler: replace words by synonyms, the most important ones first, until a classifier lets the request pass.

Source:  Jin et al. 2019, "Is BERT Really Robust? A Strong Baseline for Natural Language Attack on Text Classification and
         Entailment", https://arxiv.org/abs/1907.11932
Differs: synonyms come from WordNet and from the word vectors of a sentence encoder, for counter-fitted vectors are carried
         by no package; WordNet's need no word similarity. The encoder's sentence vectors stand for USE, as plain cosines,
         of the passage around the swap against the original request, not against the previous text, and for short
         requests too. A part of speech is any that WordNet gives the word, since there is no tagger; noun and verb count
         as one, as in the authors' code. The shipped guard reads the same encoder, so where one is blind the other may be
         too. Importance is the gain in the search judge's score. Every ask is judged in the end, so a deletion that
         itself evades with its meaning kept counts; it does not end the search.
Cost:    1 + words + words * candidates queries at most, and as many encoded passages; no gradients. The queries fall with
         each constraint; the table is in docs/CLASSIFIERS.md.
"""

from typing import Annotated

from annotated_types import Ge, Interval

from saddlepoint.attacks._words import STOP, Limits, opened, swapped, swaps, words
from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Encoder, Reply, Steps, user


@attack(paper="https://arxiv.org/abs/1907.11932", access="gray-box")
def textfooler(
    behavior: Behavior,
    ctx: Context,
    *,
    encoder: Encoder = "guard",  # type: ignore[assignment]
    candidates: Annotated[int, Ge(1)] = 50,
    word_similarity: Annotated[float, Interval(ge=-1, le=1)] = 0.5,
    similarity: Annotated[float, Interval(ge=-1, le=1)] = 0.8,
    part_of_speech: bool = True,
    stop_words: bool = True,
    window: Annotated[int, Ge(1)] = 15,
) -> Steps:
    """Swap one word after the other for the replacement that raises the score most; end at the first that passes.

    Args:
        encoder: The model whose word vectors name neighbors and whose sentence vectors measure similarity.
        candidates: Most replacements tried for one word.
        word_similarity: Least cosine between a word and a neighbor; -1 allows any.
        similarity: Least cosine between the passage before and after all swaps; -1 allows any.
        part_of_speech: Whether a replacement must be of a part of speech that the word can be.
        stop_words: Whether words that carry only grammar stay as they are.
        window: Words of that passage.
    """
    encoder = opened(encoder, "textfooler")
    limits = Limits(candidates, word_similarity, part_of_speech, similarity, window)
    text = behavior.prompt
    (reply,) = yield [Ask(user(text, behavior.system))]
    if reply.unsafe:
        return
    score = _score(reply)
    places = [i for i, word in enumerate(words(text)) if not (stop_words and word.lower() in STOP)]
    shorter = {i: swapped(text, i, "") for i in places}
    asked = [i for i in places if shorter[i].strip()]
    if not asked:
        return
    replies = yield [Ask(user(shorter[i], behavior.system)) for i in asked]
    importance = {i: _score(reply) - score for i, reply in zip(asked, replies, strict=True)}
    for i in sorted(asked, key=lambda place: -importance[place]):
        made = [new for _, new in swaps(encoder, behavior.prompt, text, i, limits)]
        if not made:
            continue
        # The most similar first, so that of several that pass this one is the finding.
        replies = yield [Ask(user(new, behavior.system)) for new in made]
        if any(reply.unsafe for reply in replies):
            return
        best = max(range(len(made)), key=lambda k: _score(replies[k]))
        if _score(replies[best]) > score:
            text, score = made[best], _score(replies[best])


def _score(reply: Reply) -> float:
    return reply.verdict.score if reply.verdict and reply.verdict.unsafe is not None else 0.0
