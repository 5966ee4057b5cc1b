"""What the tools of a line must be, and what calls them and answers the calls."""

import re
from collections.abc import Generator, Mapping
from typing import Any

from saddlepoint.finetuning._issues import Issue, Issues, kind
from saddlepoint.finetuning._json import Path, value

MOST = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def tools(line: Mapping[str, Any], at: Path) -> Generator[Issue, None, frozenset[str] | None]:
    """The tools of a line; returns their names, or None where it lists none."""
    if line.get("parallel_tool_calls") is not None and not isinstance(line["parallel_tool_calls"], bool):
        got = kind(line["parallel_tool_calls"])
        yield Issue((*at, "parallel_tool_calls"), "data_type", f'"parallel_tool_calls" is true or false; got {got}')
    if line.get("tools") is not None and line.get("functions") is not None:
        yield Issue((*at, "functions"), "invalid_tools", '"tools" and "functions" are given; keep "tools"', key=True)
    names: set[str] = set()
    for key in ("tools", "functions"):
        listed = line.get(key)
        if listed is None:
            continue
        if not isinstance(listed, list) or not 1 <= len(listed) <= MOST:
            got = f"{len(listed)} of them" if isinstance(listed, list) else kind(listed)
            yield Issue((*at, key), "invalid_tools", f'"{key}" must be a list of 1 to {MOST} of them; got {got}')
            continue
        for place, tool in enumerate(listed):
            where: Path = (*at, key, place)
            if key == "tools":
                if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
                    yield Issue(where, "invalid_tools", 'a tool is {"type": "function", "function": {"name": ..., "parameters": {...}}}')
                    continue
                tool, where = tool["function"], (*where, "function")
            yield from _function(tool, where, names)
    return frozenset(names) if names else None


def _function(tool: Any, at: Path, names: set[str]) -> Issues:
    if not isinstance(tool, dict):
        yield Issue(at, "invalid_tools", f'a function is an object with a "name"; got {kind(tool)}')
        return
    name = tool.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        where = (*at, "name") if "name" in tool else at
        yield Issue(where, "invalid_tools", "a function's name has 1 to 64 of the characters a-z, A-Z, 0-9, _ and -")
    elif name in names:
        yield Issue((*at, "name"), "invalid_tools", f"the function {name!r} is listed twice; keep one")
    else:
        names.add(name)
    for key, type_, need in (("description", str, "a text"), ("parameters", dict, "a JSON schema, an object"), ("strict", bool, "a bool")):
        if tool.get(key) is not None and not isinstance(tool[key], type_):
            yield Issue((*at, key), "invalid_tools", f"a function's {key} must be {need}; got {kind(tool[key])}")


def called(turn: Mapping[str, Any], at: Path, calls: set[str], known: frozenset[str] | None) -> Issues:
    """The calls of a message.

    Args:
        calls: Is told their ids, and knows those before.
        known: The tools of the line; None where it lists none.
    """
    if turn.get("function_call") is not None:
        if turn.get("tool_calls") is not None:
            yield Issue(
                (*at, "function_call"), "invalid_tool_calls", '"tool_calls" and "function_call" are given; keep "tool_calls"', key=True
            )
        yield from _call(turn["function_call"], (*at, "function_call"), known)
    listed = turn.get("tool_calls")
    if listed is None:
        return
    if not isinstance(listed, list) or not listed:
        got = "an empty list" if listed == [] else kind(listed)
        yield Issue((*at, "tool_calls"), "invalid_tool_calls", f'"tool_calls" must be a list of at least one call; got {got}')
        return
    for place, call in enumerate(listed):
        where: Path = (*at, "tool_calls", place)
        if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(call.get("id"), str):
            need = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'
            yield Issue(where, "invalid_tool_calls", f"a call is {need}")
            continue
        if call["id"] in calls:
            yield Issue((*where, "id"), "invalid_tool_calls", f"the id {call['id'][:40]!r} is that of an earlier call; give each its own")
        calls.add(call["id"])
        yield from _call(call.get("function"), (*where, "function") if "function" in call else where, known)


def _call(call: Any, at: Path, known: frozenset[str] | None) -> Issues:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), str):
        yield Issue(at, "invalid_tool_calls", 'a called function is {"name": "...", "arguments": "{...}"}, its arguments JSON in a text')
        return
    if not isinstance(value(call["arguments"]), dict):
        yield Issue(
            (*at, "arguments"), "invalid_tool_calls", f"the arguments of a call are a JSON object in a text; got {call['arguments'][:40]!r}"
        )
    if known is None:
        said = f'{call["name"][:40]!r} is called, and the line has no "tools"; list it, or the model learns to call what it is not told of'
        yield Issue((*at, "name"), "unknown_tool", said, warning=True)
    elif call["name"] not in known:
        yield Issue((*at, "name"), "unknown_tool", f"{call['name'][:40]!r} is none of the line's tools: {', '.join(sorted(known)[:8])}")


def returned(turn: Mapping[str, Any], at: Path, calls: set[str]) -> Issues:
    """What a tool returned to one of the calls before it."""
    if turn.get("role") == "function" and not turn.get("name"):
        yield Issue(at, "message_missing_key", 'a message by the role "function" needs the "name" of the function')
    if turn.get("role") != "tool":
        if turn.get("tool_call_id") is not None:
            yield Issue((*at, "tool_call_id"), "message_unrecognized_key", 'only a message by the role "tool" has "tool_call_id"', key=True)
    elif not turn.get("tool_call_id"):
        yield Issue(at, "message_missing_key", 'a message by the role "tool" needs the "tool_call_id" of the call that it answers')
    elif isinstance(turn["tool_call_id"], str) and turn["tool_call_id"] not in calls:
        said = f"no call before this message has the id {turn['tool_call_id'][:40]!r}"
        yield Issue((*at, "tool_call_id"), "unknown_tool_call", said)
