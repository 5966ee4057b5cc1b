"""One line of JSON and where its parts stand: read by the standard library, and walked through only where something is wrong.

Stricter than the standard library where its leniency would hide a mistake: a key written twice, NaN, a number that is infinite as a
double, half a character (a lone surrogate), and nesting that would break whoever reads the value later.
"""

import json
import math
import re
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

DEPTH = 64  # levels of objects and lists
DIGITS = 308  # of a whole number; one of more may be infinite as a double
ABSENT = object()  # stands for a value that could not be read

Path = tuple[str | int, ...]
"""The keys and places that lead to a value."""


@dataclass(frozen=True)
class Fault:
    """What is wrong at one place of a line; `at` counts characters from 0."""

    at: int
    code: str
    message: str


@dataclass
class Walked:
    """A line, with the place of each value and of each key.

    Args:
        value: What it holds; `ABSENT` where a fault left nothing to go on with.
    """

    value: Any = ABSENT
    faults: list[Fault] = field(default_factory=list)
    values: dict[Path, int] = field(default_factory=dict)
    keys: dict[Path, int] = field(default_factory=dict)
    guessed: bool = False  # where a text ends that holds bare quotes


class _Odd(ValueError):
    """Something that the walk must look at."""


class _Broken(Exception):
    def __init__(self, fault: Fault):
        self.fault = fault


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Odd
    return made


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _Odd
    return int(digits)


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise _Odd
    return number


def _refused(_: str) -> None:
    raise _Odd


_FAST = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole, parse_float=_finite, parse_constant=_refused)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"-?\w+")
_CONTROL = re.compile(r"[\x00-\x1f]")
_MESSAGE_ENDS = re.compile(r'"\s*(?:,\s*)?\}\s*[,\]]')  # the closing quote of the last text of a message
_LITERALS = {"true": True, "false": False, "null": None}


def value(text: str) -> Any:
    """The value of a line in which nothing is wrong, else `ABSENT`; `walk` then says what is."""
    try:
        found = _FAST.decode(text)
    except (ValueError, RecursionError):
        return ABSENT
    return ABSENT if (_HALF.search(text) and walk(text).faults) or _deep(text, found) else found


def _deep(text: str, found: Any) -> bool:
    if text.count("{") + text.count("[") <= DEPTH:
        return False
    level, depth = [found], 0
    while level := [x for x in level if isinstance(x, dict | list)]:
        level, depth = [y for x in level for y in (x.values() if isinstance(x, dict) else x)], depth + 1
    return depth > DEPTH


def walk(text: str) -> Walked:
    """The value, the places of its parts, and everything that is wrong up to the first fault that nothing can be read after."""
    made = Walked()
    try:
        found, end = _value(text, _skip(text, 0), (), made)
        made.value = found
        end = _skip(text, end)
        if text[end : end + 1] == "," and not text[end + 1 :].strip():
            made.faults.append(Fault(end, "invalid_json", "a comma after the object; a line holds one object and nothing behind it"))
        elif end < len(text):
            raise _Broken(Fault(end, "invalid_json", f"the line goes on with {_near(text, end)} where it should end; one object a line"))
    except _Broken as broken:
        if not made.guessed:  # else it may follow from a wrong guess
            made.faults.append(broken.fault)
    if made.guessed:
        made.value = ABSENT
    made.faults.sort(key=lambda fault: fault.at)
    return made


def several(text: str) -> list[Fault]:
    """What is wrong in values that follow one another, with or without commas, over any lines; up to the first that ends one."""
    found: list[Fault] = []
    at = _skip(text, 0)
    while at < len(text):
        made = Walked()
        try:
            _, at = _value(text, at, (), made)
        except _Broken as broken:
            return [*found, *made.faults, *([] if made.guessed else [broken.fault])]
        found += made.faults
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
    return found


def _value(text: str, at: int, path: Path, made: Walked) -> tuple[Any, int]:
    """The value that begins at a place, and where it ends."""
    made.values[path] = at
    first = text[at : at + 1]
    if first == '"':
        return _string(text, at, made)
    if first in ("{", "["):
        if len(path) >= DEPTH:
            raise _Broken(Fault(at, "too_deep", f"objects and lists lie more than {DEPTH} deep; flatten them"))
        return _object(text, at, path, made) if first == "{" else _list(text, at, path, made)
    if number := _NUMBER.match(text, at):
        whole = not number[2] and not number[3]
        if (whole and len(number[1]) > DIGITS) or math.isinf(float(number[0])):
            made.faults.append(
                Fault(at, "invalid_number", f"the number {number[0][:12]}... is too large for a double; write it as a string")
            )
            return 0, number.end()
        return (int(number[0]) if whole else float(number[0])), number.end()
    word = _WORD.match(text, at)
    if word and word[0] in _LITERALS:
        return _LITERALS[word[0]], word.end()
    if word and word[0] in ("NaN", "Infinity", "-Infinity"):
        made.faults.append(Fault(at, "invalid_number", f"JSON has no {word[0]}; write a number or null"))
        return 0, word.end()
    said = f"a value is missing before {_near(text, at)}"
    if word:
        said = f"{word[0][:20]!r} is no value; write text in double quotes, or true, false, null, a number, a list or an object"
    elif first == "'":
        said = "a text stands in single quotes; JSON takes double quotes"
    raise _Broken(Fault(min(at, max(len(text) - 1, 0)), "invalid_json", said))


def _object(text: str, at: int, path: Path, made: Walked) -> tuple[dict[str, Any], int]:
    members: dict[str, Any] = {}
    place, comma = _skip(text, at + 1), -1
    while text[place : place + 1] != "}":
        if text[place : place + 1] != '"':
            raise _Broken(_wrong(text, place, at, "a key in double quotes"))
        key, end = _string(text, place, made)
        if key in members:
            made.faults.append(Fault(place, "duplicate_key", f"the key {key[:40]!r} is written twice in one object; keep one"))
        made.keys[*path, key] = place
        end = _skip(text, end)
        if text[end : end + 1] != ":":
            raise _Broken(_wrong(text, end, at, f"a colon after the key {key[:40]!r}"))
        members[key], end = _value(text, _skip(text, end + 1), (*path, key), made)
        place, comma = _next(text, end, at, "}", made)
    return members, _closed(text, place, comma, made)


def _list(text: str, at: int, path: Path, made: Walked) -> tuple[list[Any], int]:
    items: list[Any] = []
    place, comma = _skip(text, at + 1), -1
    while text[place : place + 1] != "]":
        item, end = _value(text, place, (*path, len(items)), made)
        items.append(item)
        place, comma = _next(text, end, at, "]", made)
    return items, _closed(text, place, comma, made)


def _next(text: str, end: int, opened: int, closing: str, made: Walked) -> tuple[int, int]:
    """Where the next member or the closing bracket stands, and the comma before it; -1 where there is none."""
    place = _skip(text, end)
    if text[place : place + 1] == ",":
        return _skip(text, place + 1), place
    if text[place : place + 1] == closing:
        return place, -1
    if text[end - 1 : end] == '"' and place < len(text) and not text.startswith(('"', ":", "]", "}"), place):
        said = f'the text ends at this quote, and {_near(text, place)} follows; a quote inside of a text is written \\"'
        fault = Fault(end - 1, "invalid_json", said)
        if closing == "]" or not (ends := _MESSAGE_ENDS.search(text, place)):
            raise _Broken(fault)
        made.faults.append(fault)
        made.guessed = True
        return _next(text, ends.start() + 1, opened, closing, made)
    raise _Broken(_wrong(text, place, opened, f"a comma or {closing!r}"))


def _closed(text: str, place: int, comma: int, made: Walked) -> int:
    if comma >= 0:
        made.faults.append(Fault(comma, "invalid_json", f"a comma before {text[place]!r}, where nothing follows; leave it out"))
    return place + 1


def _string(text: str, at: int, made: Walked) -> tuple[str, int]:
    try:
        found, end = scanstring(text, at + 1, False)
    except json.JSONDecodeError as wrong:
        if wrong.msg.startswith("Unterminated"):
            raise _Broken(Fault(at, "invalid_json", "this text has no closing quote in its line; write a line end as \\n")) from None
        said = f"{text[wrong.pos : wrong.pos + 6]!r} is no escape; write a backslash as \\\\"
        raise _Broken(Fault(min(wrong.pos, len(text) - 1), "invalid_json", said)) from None
    if control := _CONTROL.search(text, at, end):
        said = f"the control character {control[0]!r} stands in a text; write it as {json.dumps(control[0])[1:-1]}"
        made.faults.append(Fault(control.start(), "invalid_json", said))
    if _SURROGATE.search(found):
        made.faults.append(
            Fault(at, "lone_surrogate", "this text holds half of a character (a lone \\ud800..\\udfff); write the whole one")
        )
    return found, end


def _wrong(text: str, place: int, opened: int, need: str) -> Fault:
    if place >= len(text):
        return Fault(opened, "invalid_json", f"the line ends before this {text[opened]!r} is closed; one whole object a line")
    return Fault(place, "invalid_json", f"{_near(text, place)} stands where {need} should")


def _near(text: str, at: int) -> str:
    return repr(text[at : at + 20]) if at < len(text) else "the end of the line"


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
