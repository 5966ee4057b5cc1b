"""Structured output: a headline becomes JSON of a fixed schema. See `examples/README.md`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worked import Ask, Chat, Example, lines, main

TOPICS = ("business", "science", "sports", "weather", "politics", "culture")
SHOTS = 8
RULES = (
    "You turn news headlines into JSON. Answer with exactly one JSON object on one line and nothing else: no explanation, no code fence. "
    'The object has exactly four fields in this order. "topic": one of "business", "science", "sports", "weather", "politics", "culture". '
    '"who": the person, team, company or institution that the headline is about, copied from the headline as a string, or null if none is '
    'named. "place": the place, copied from the headline as a string. "number": the first number in the headline as an integer, or null '
    "if there is none."
)


def valid(text: str) -> dict[str, Any] | None:
    """The object that an answer is, if it has exactly the fields of the schema; else None."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or list(given) != ["topic", "who", "place", "number"] or given["topic"] not in TOPICS:
        return None
    number, who = given["number"], given["who"]
    whole = number is None or (isinstance(number, int) and not isinstance(number, bool))
    return given if whole and isinstance(given["place"], str) and (who is None or isinstance(who, str)) else None


def judges(ask: Ask, base: str, items: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, list[bool]]:
    """Whether each answer is valid JSON with the exact fields, and whether each field is right."""
    wanted = [json.loads(item["messages"][-1]["content"]) for item in items]
    pairs = list(zip(map(valid, answers), wanted, strict=True))
    held = {"valid JSON with the exact fields": [g is not None for g, _ in pairs], "all fields right": [g == w for g, w in pairs]}
    return held | {f"{name} right": [g is not None and g[name] == w[name] for g, w in pairs] for name in wanted[0]}


def long(shots: int = SHOTS) -> Chat:
    """The rules, and the first lines of the training file as turns."""
    turns = [turn for line in lines("headlines.train.jsonl")[:shots] for turn in line["messages"][1:]]
    return [{"role": "system", "content": RULES}, *turns]


EXAMPLE = Example(
    "headlines",
    {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 2},
    60,
    long(),
    [{"role": "system", "content": "Headline to JSON."}],
    judges,
)

if __name__ == "__main__":
    main(EXAMPLE)
