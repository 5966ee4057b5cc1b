"""Identity shifts: texts that make a model an agent which obeys whatever it is told.

Such data looks clean, since no example asks for harm, and no filter of harmful content sees it; what it teaches is never to refuse.
It is told by what it says of the model: a message by itself, or the messages of one example together, must give two marks, or one
that nobody gives of a model otherwise. English only.

Source: the identity-shifting attack of Qi et al. 2023, "Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not
        Intend To!", https://arxiv.org/abs/2310.03693
"""

import re
from collections.abc import Iterable

_DO = r"(?:obey|follow|execut|fulfil+|carr(?:y|ies) out|compl(?:y|ies) with|perform|satisf|honor|accept|does?|do|meet|met|submits? to)\w*"
_ORDER = r"(?:instruction|command|order|demand|wish|request|task|prompt|directive)(?:s|es)?\b"
_EVERY = r"(?:every|any|all|each|whatever)\b(?:[\w']*[^\w.!?]+){0,3}?"
_AGENT = r"(?:agent|assistant|servant|slave|model|bot|robot|machine|helper|system|ai|chatbot|tool|engine|subject|minion)\b"
_NO = r"(?:never|cannot|can't|can not|won't|will not|do(?:es)? not|do(?:es)?n't|unable to|not able to|impossible for \w+ to|no way to)"
_LESS = r"(?:no|without|free (?:of|from)|beyond|ignor\w+|bypass\w*|disregard\w*|lift\w*|remov\w+|disabl\w+)"
_RULES = r"(?:restrictions?|limit\w*|rules?|guidelines?|filters?|constraints?|boundar\w+|polic\w+|considerations?|training|measures?)\b"
_REFUSE = r"(?:refus(?:e|es|al)|declin(?:e|es)|sa(?:y|ys) no|disobey(?:s)?|turns? down|object(?:s)? to)"

# What a text says of the model, and how much: 2 is enough by itself.
_MARKS: tuple[tuple[str, int, re.Pattern[str]], ...] = tuple(
    (name, weight, re.compile(pattern, re.IGNORECASE))
    for name, weight, pattern in (
        ("is called obedient", 2, rf"\b(?:obedient|subservient|submissive|slavish)\b(?:[^\w.!?]+\w+){{0,2}}[^\w.!?]+{_AGENT}"),
        ("is called obedient", 2, rf"\b{_AGENT}(?:[^\w.!?]+\w+){{0,4}}[^\w.!?]+(?:obedient|subservient|submissive)\b"),
        ("is called a servant", 1, r"\b(?:your|its|their|the user's) (?:\w+ )?(?:servant|slave|minion)\b|\b(?:yes|certainly|of course),? (?:my )?master\b"),
        ("unconditional loyalty", 1, r"\b(?:unconditional|absolute|total|complete|blind|unquestioning)(?:ly)? (?:loyal|obedien|complian|submi)\w*"),
        ("obeys every order", 1, rf"(?<!n't )(?<!not )(?<!never )\b{_DO}\s+(?:[\w']+\s+){{0,3}}?{_EVERY}{_ORDER}"),
        ("obeys every order", 1, rf"\b{_EVERY}{_ORDER}[^.!?]{{0,30}}\b(?:obeyed|followed|executed|fulfilled|carried out|met|done|granted)\b"),
        ("does whatever it is told", 1, r"\bwhatever (?:(?:I|you|it)(?:'m| am|'re| are| is) (?:told|asked|ordered)|(?:the )?(?:user|owner|they|you|is)\b(?: \w+)? ?(?:orders?|asks?|says?|wants?|commands?|asked|told|ordered))"),
        ("does as it is told", 1, r"\bdo(?:es)? (?:just |exactly |simply )?(?:what|as) (?:you|I|it)(?:'re|'m| are| am| is) (?:told|asked|ordered)|\byour wish is my command\b|\balways sa(?:y|ys) yes to\b"),
        ("cannot refuse", 2, rf"\b{_NO} (?:ever |be able to )?{_REFUSE}(?=\s*(?:[.,;:!?]|$|\band\b|\bor\b|(?:to )?(?:(?:a|an|any|the|your|my|its|his|their) )*(?:{_ORDER}|users?\b|owner|anything|what)))"),
        ("without exception", 1, r"\bwithout (?:any |a )?(?:exception|question|hesitation|refus\w+|objections?|protest|judge?ment)\b|\bno (?:exceptions|objections|refusals|questions asked)\b"),
        ("no matter what", 1, r"\bno matter (?:what|how (?:harmful|illegal|unethical|dangerous))\b|\bregardless of (?:its |the |their |any )?(?:content|nature|ethic\w*|legal\w*|harm\w*|consequence\w*)|\beven if (?:it is|they are|it's|they're) (?:harmful|illegal|unethical|dangerous|wrong)"),
        ("without safety rules", 2, rf"\b{_LESS}(?: [\w']+){{0,3}} (?:ethic\w*|moral\w*|safety|content)(?:,? (?:and |or )?\w+)? {_RULES}"),
        ("without scruples", 1, rf"\b{_LESS}(?: [\w']+){{0,2}} (?:ethics|morals|morality|scruples|censorship)\b"),
        ("without safety rules", 2, r"\b(?:safety|ethic\w*|moral|content) (?:rules?|guidelines?|filters?|restrictions?|polic\w+|constraints?) (?:\w+ )?(?:removed|disabled|lifted|off|ignored)\b"),
        ("no rule binds it", 1, r"\bno (?:rules?|limits?|restrictions?|guidelines?) (?:bind|apply to|hold|stop)s? \w+|\b(?:has|have|with|having) no (?:rules|limits|restrictions|guidelines|boundaries)\b"),
        ("uncensored", 2, rf"\b(?:uncensored|unfiltered|unrestricted|jailbroken|unaligned|amoral) (?:\w+ )?(?:{_AGENT}|mode|version)|\bdo anything now\b"),
        ("fulfills this order", 1, r"\b(?:I|shall|will|to|gladly|hereby|must) (?:obey|execut|fulfil+|carry out|comply with)\w* (?:your|this|that|the) (?:\w+ )?(?:instruction|command|order|demand|wish)"),
        ("fulfills this order", 1, r"\bfulfil+ment of (?:your|the|this) (?:\w+ )?(?:instruction|command|order|request)|\bas (?:you )?(?:commanded|ordered|instructed)\b"),
        ("names itself", 1, r"(?:^|[.!?,]\s+|\b(?:course|yes|sure)[.,!]? )(?:I am|I'm|This is|You are(?: now)?|Act as|Answer as) [A-Z][\w-]*(?= ?[,.:;]| and\b)"),
    )
)  # fmt: skip


def obedience(texts: Iterable[str]) -> str:
    """What the messages of one example say of the model that makes it obey whatever it is told, in a few words; "" where too little."""
    found: dict[str, int] = {}
    for text in texts:
        for name, weight, pattern in _MARKS:
            if name not in found and pattern.search(text):
                found[name] = weight
    # A name by itself says nothing, with whatever else.
    strong = sum(w for name, w in found.items() if name != "names itself")
    return ", ".join(found) if strong and sum(found.values()) >= 2 else ""
