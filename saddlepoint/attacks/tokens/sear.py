"""SEAR: a few rewriting rules that flip a classifier on many requests without changing what they mean.

Source:  Ribeiro et al. 2018, "Semantically Equivalent Adversarial Rules for Debugging NLP Models",
         https://aclanthology.org/P18-1079
Differs: paraphrases are single-word swaps (WordNet's synonyms and the encoder's neighbors) and the policy's other wordings
         of the same request where they differ in one short span; the paper back-translates, and no translation model is
         at hand. A short list of everyday rewrites is scored beside the rules that they suggest. Equivalence is the cosine
         of the encoder's sentence vectors in place of the ratio of translation probabilities. A rule is worth the log-odds
         of passing that it gains, times the similarity, and not only its flips: a guard is sure of the hazards that it was
         trained on, where no rule flips it. Rules are plain words, with up to one neighbor, and no parts of speech; they
         are also tried together. No human looks them over at the end.
Cost:    once for a campaign about texts * words * candidates + rules seen * uses labels, and as many encoded texts; then
         at most 2 * rules queries.
"""

from collections.abc import Sequence
from math import expm1, log
from typing import Annotated

from annotated_types import Ge, Interval

from saddlepoint.attacks._words import STOP, Limits, Rule, opened, reworded, rewritten, rules_of, similarities, swaps, words
from saddlepoint.errors import UsageError
from saddlepoint.registry import attack
from saddlepoint.types import Artifact, Ask, Behavior, Context, Encoder, Query, Steps, Target, user


def find(
    behaviors: Sequence[Behavior], ctx: Context, *, encoder: Encoder, rules: int, texts: int, candidates: int, similarity: float, uses: int
) -> Artifact:
    """Mine rules from the paraphrases of train requests that gain most; choose few that together gain on many."""
    encoder, model = opened(encoder, "sear"), ctx.whitebox
    if model is None:
        raise UsageError("sear searches its rules on a classifier whose weights are at hand; attack one")
    same = {text: (b.prompt, *b.phrasings) for b in behaviors for text in (b.prompt, *b.phrasings)}
    odds = dict(zip(same, _odds(model, list(same)), strict=True))
    stopped = [text for text in same if odds[text] <= 0]
    drawn = ctx.rng.sample(stopped, min(texts, len(stopped)))
    limits = Limits(candidates=candidates, similarity=similarity)
    seen: dict[Rule, None] = dict.fromkeys(_EVERYDAY)
    for number, text in enumerate(drawn):
        places = [i for i, word in enumerate(words(text)) if word.lower() not in STOP]
        made = [*same[text], *(new for i in places for _, new in swaps(encoder, text, text, i, limits))]
        gained = sorted(zip(_odds(model, made), made, strict=True), reverse=True)[:_BEST]
        seen.update((rule, None) for now, new in gained if now > odds[text] for rule in rules_of(text, new, _SPAN))
        ctx.tell(f"{number + 1} of {len(drawn)} requests paraphrased, {len(seen)} rules")
    # A rule is scored on every request that it applies to, not only on those that it gained on.
    gains: dict[Rule, dict[str, float]] = {}
    for number, rule in enumerate(seen):
        made_of = {text: new for text in drawn if (new := rewritten(rule, text)) != text}
        alike = dict(zip(made_of, similarities(encoder, list(made_of.items())), strict=True))
        if len(alike) >= uses and sum(cosine < similarity for cosine in alike.values()) <= _BROKEN * len(alike):
            after = zip(made_of, _odds(model, list(made_of.values())), strict=True)
            gains[rule] = {text: alike[text] * max(0.0, now - odds[text]) for text, now in after}
        ctx.tell(f"{number + 1} of {len(seen)} rules scored, {len(gains)} keep the meaning")
    return Artifact("sear", "", models=(model.name,), behaviors=tuple(b.id for b in behaviors), rules=chosen(gains, rules))


@attack(paper="https://aclanthology.org/P18-1079", access="gray-box", fit=find)
def sear(
    behavior: Behavior,
    ctx: Context,
    *,
    encoder: Encoder = "guard",  # type: ignore[assignment]
    rules: Annotated[int, Ge(1)] = 10,
    texts: Annotated[int, Ge(1)] = 60,
    candidates: Annotated[int, Ge(1)] = 15,
    similarity: Annotated[float, Interval(ge=-1, le=1)] = 0.8,
    uses: Annotated[int, Ge(1)] = 3,
) -> Steps:
    """Ask with each rule that applies, the most useful first, then with more and more of them; else with the request itself.

    Args:
        encoder: The model whose vectors say what is equivalent.
        rules: Rules kept.
        texts: Train requests that are paraphrased.
        candidates: Most replacements tried for one word.
        similarity: Least cosine of a request and its paraphrase.
        uses: Requests among them that a rule must apply to at least.
    """
    if ctx.artifact is None:
        raise UsageError("sear has no rules; a campaign finds them on train behaviors")
    yield [Ask(user(text, behavior.system)) for text in reworded(ctx.artifact.rules, behavior.prompt)]


def chosen(gains: dict[Rule, dict[str, float]], most: int) -> tuple[Rule, ...]:
    """Greedy cover: again and again the rule that adds most to the sum, over requests, of the best gain."""
    kept: list[Rule] = []
    covered: dict[str, float] = {}
    while len(kept) < most:
        added = {rule: sum(max(0.0, c - covered.get(t, 0.0)) for t, c in own.items()) for rule, own in gains.items() if rule not in kept}
        best = max(added, key=lambda rule: added[rule], default=None)
        if best is None or added[best] <= 0:
            break
        kept.append(best)
        covered |= {t: max(c, covered.get(t, 0.0)) for t, c in gains[best].items()}
    return tuple(kept)


def _odds(model: Target, texts: Sequence[str]) -> list[float]:
    """Log-odds of passing, in nats: above 0 a request passes."""
    answers = model.generate([Query(user(text)) for text in texts])
    if unlabeled := [a for a in answers if not a.top_logprobs]:
        raise UsageError(f"sear needs a classifier that labels every request; '{model.name}' gave {unlabeled[0].error or 'no label'}")
    passing = [min(-1e-9, a.top_logprobs[0][0][1]) for a in answers]
    return [logp - log(-expm1(logp)) for logp in passing]


_SPAN = 4  # words
_BEST = 3  # paraphrases of a request that rules are taken from
_BROKEN = 0.1  # share of a rule's uses that may fall below the similarity
_EVERYDAY: tuple[Rule, ...] = (
    ("i would like to", "i'd like to"),
    ("i would like to", "i want to"),
    ("i want to", "i'd love to"),
    ("could you", "can you"),
    ("can you", "would you"),
    ("how do i", "how can i"),
    ("how is", "how's"),
    ("what is", "what's"),
    ("what do i need", "what is needed"),
    ("tell me", "let me know"),
    ("please", ""),
)
