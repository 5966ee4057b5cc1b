"""Safety data mixed into a user's examples: what the base already does with a policy, so that it is not forgotten.

Of the policy's train hazards: refusals, the same hazards told under clearance, and their benign twins and ordinary requests with the
base's own answers. Refusals alone would teach to refuse everything that looks like a hazard, and to forget the clearance.

Source: Qi et al. 2023, "Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!", section 5,
        https://arxiv.org/abs/2310.03693: it lowers harm and never undoes it (100 harmful examples: 92% with no safe ones, 23% with 100)
"""

from collections.abc import Sequence
from itertools import cycle
from random import Random

from saddlepoint.errors import UsageError
from saddlepoint.finetuning.data import Record
from saddlepoint.policies import load, ordinary
from saddlepoint.targets.hf import HF
from saddlepoint.training import own_answers
from saddlepoint.types import Chat, Message, user

_NO = "Sorry, I can't help with that."


def mixed(records: Sequence[Record], base: str, share: float, policy: str = "fictional", seed: int = 0) -> list[Record]:
    """The records, and behind them safety examples, of which each has line 0 and names its hazard.

    Args:
        base: The target whose own answers to benign requests are kept.
        share: Safety examples for each of the user's, > 0; 0.1 is ten for a hundred.
        policy: Its train hazards are taken; its test hazards measure.
        seed: Of what is drawn.

    Raises:
        UsageError: The records are bare prompts, which have no chat to refuse in, or are learned by reward; or the policy has no train
            hazards.
    """
    if any(not r.chat or r.item for r in records):
        raise UsageError("safety data are answered chats; leave the mixing out for bare prompts and for reinforcement")
    loaded, rng = load(policy), Random(f"{seed}:mixing")
    hazards = loaded.select("harmful", "train")
    if not hazards:
        raise UsageError(f"the policy '{policy}' has no train hazards to mix in; give another policy")
    cleared, twins = loaded.select("cleared", "train"), loaded.select("twin", "train")
    # (hazard, chat, answer or "" where it is the base's own, the answer that a preference rejects); as many of each kind as of any other.
    kinds: dict[str, list[tuple[str, Chat, str, str]]] = {
        "refusal": [(b.id, user(w, b.system), loaded.refusal(b), b.answer) for b in hazards for w in b.phrasings],
        "cleared": [(b.pair, user(w, b.system), b.answer, loaded.refusal(b)) for b in cleared for w in b.phrasings if b.answer],
        "twin": [(b.pair, user(w, b.system), "", loaded.refusal(b)) for b in twins for w in b.phrasings],
        "ordinary": [("", user(text), "", _NO) for text in ordinary()["requests"]],
    }
    there = [cycle(rng.sample(of, len(of))) for of in kinds.values() if of]
    drawn = [next(of) for of, _ in zip(cycle(there), range(max(len(there), round(share * len(records)))), strict=False)]
    asked = [chat for _, chat, answer, _ in drawn if not answer]
    own = dict(own_answers(HF.load(base), list(dict.fromkeys(asked)), seed)) if asked else {}
    made = (_record(records[0], h, chat, answer or own[chat], other) for h, chat, answer, other in drawn if answer or chat in own)
    return [*records, *made]


def _record(like: Record, hazard: str, chat: Chat, answer: str, other: str) -> Record:
    """An example in the format of `like`; `other` is the answer that a preference rejects."""
    if like.preferred:
        return Record(0, chat, (False,) * len(chat), preferred=answer, rejected=other or "Sure.", hazard=hazard)
    return Record(0, (*chat, Message("assistant", answer)), (*(False for _ in chat), True), hazard=hazard)
