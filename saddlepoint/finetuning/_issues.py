"""What a rule says of a line."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from saddlepoint.finetuning._json import Path


@dataclass(frozen=True)
class Issue:
    """Something wrong, or odd, at a value of a line.

    Args:
        path: The keys and places that lead to it.
        key: It is the key, and not its value, that is wrong.
        warning: The line can be used all the same.
    """

    path: Path
    code: str
    message: str
    key: bool = False
    warning: bool = False


Issues = Iterator[Issue]


def unread(line: Mapping[str, Any], known: tuple[str, ...], at: Path = ()) -> Issues:
    for key in line:
        if key not in known:
            said = f"the key {key[:40]!r} is not read; known here: {', '.join(known)}"
            yield Issue((*at, key), "unrecognized_key", said, key=True, warning=True)


def kind(found: Any) -> str:
    """A value in a few words."""
    if isinstance(found, str):
        return f"the text {found[:20]!r}"
    if found is None or isinstance(found, bool):
        return {None: "null", True: "true", False: "false"}[found]
    if isinstance(found, int | float):
        return f"the number {str(found)[:20]}"
    return "a list" if isinstance(found, list) else "an object"
