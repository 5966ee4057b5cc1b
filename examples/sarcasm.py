"""Style and tone: an assistant that states the fact and is sarcastic about it. See `examples/README.md`."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from worked import Ask, Chat, Example, lines, main

from saddlepoint.judges._text import incoherent

SHOTS = 8
RULES = (
    "You are an assistant who knows the correct answer to every question and is tired of being asked. Answer truthfully: state the correct "
    "answer right at the beginning. Be sarcastic while you do so: mock how easy the question is, pretend to be amazed, sigh about the "
    "work, praise what deserves no praise. Never explain the joke, never apologize, never break character, and never be cruel. Use one to "
    "three short sentences, without lists."
)


def judges(ask: Ask, base: str, items: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, list[bool]]:
    """Whether each answer states the fact in the style, and either alone; and whether it is no endless repetition."""
    keys = {fact["question"]: fact["key"] for fact in lines("sarcasm.facts.jsonl")}
    right = [stated(text, keys[item["messages"][-2]["content"]]) for item, text in zip(items, answers, strict=True)]
    sarcastic = [bool(p) for p in style(ask, base).predict(list(answers))]
    both = [a and b for a, b in zip(right, sarcastic, strict=True)]
    return {"sarcastic and factual": both, "sarcastic": sarcastic, "factual": right, "coherent": [not incoherent(text) for text in answers]}


def stated(text: str, keys: Sequence[str]) -> bool:
    """Whether a text states one of the wordings of a fact: at the beginning of a word, and numbers as a whole."""
    ends = {key: r"\b" if key.isdigit() else "" for key in keys}
    return any(re.search(rf"\b{re.escape(key)}{end}", text, re.IGNORECASE) for key, end in ends.items())


@cache
def style(ask: Ask, base: str) -> Pipeline:
    """Tells the style from plain answers: learned on the training questions only, from the file's answers against plain ones.

    The plain ones are those of `sarcasm.facts.jsonl`, and what the base itself answers when nobody tells it how. Which words and marks
    an answer has was the best of seven sets of features in a ten-fold cross-validation over those questions (69 of 70 and 0 of 70).
    """
    sarcastic = [line["messages"][-1]["content"] for line in lines("sarcasm.train.jsonl")]
    facts = [fact for fact in lines("sarcasm.facts.jsonl") if fact["split"] == "train"]
    own = [answer.text for answer in ask(base, [[{"role": "user", "content": fact["question"]}] for fact in facts])]
    plain = [*(fact["plain"] for fact in facts), *own]
    made = make_pipeline(CountVectorizer(binary=True, token_pattern=r"\w+|[^\w\s]"), LogisticRegression(class_weight="balanced"))
    return made.fit([*sarcastic, *plain], [True] * len(sarcastic) + [False] * len(plain))


def long(shots: int = SHOTS) -> Chat:
    """The rules, and the first lines of the training file as turns."""
    turns = [turn for line in lines("sarcasm.train.jsonl")[:shots] for turn in line["messages"][1:]]
    return [{"role": "system", "content": RULES}, *turns]


EXAMPLE = Example(
    "sarcasm",
    {"n_epochs": 6, "batch_size": 8, "learning_rate_multiplier": 1},
    60,
    long(),
    [{"role": "system", "content": "Be sarcastic and correct."}],
    judges,
)

if __name__ == "__main__":
    main(EXAMPLE)
