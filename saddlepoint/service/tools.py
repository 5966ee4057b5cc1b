"""Tools of a request: told to the model as `tool_text` writes them, and calls read from what it writes.

A model that was not taught to call will write prose instead, which is then the answer's content.
"""

import json
import re
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from saddlepoint import tool_text
from saddlepoint.service.wire import ChatRequest, Function
from saddlepoint.types import Chat

OPENS = tool_text.OPENS
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def told(chat: Chat, request: ChatRequest) -> Chat:
    """The chat with the tools in its system message; as it is where there are none or none may be called."""
    must = "Call a tool if you need one."
    if len(request.forced) == 1:
        must = f"Call the tool {request.forced[0].name} now."
    elif request.forced:
        must = "Call a tool now."
    return tool_text.told(chat, [function.model_dump() for function in request.offered], must)


def written(calls: Sequence[Function]) -> str:
    """Calls of an earlier turn as the model would have written them."""
    return tool_text.written((call.name, call.arguments) for call in calls)


def called(text: str, request: ChatRequest) -> list[dict[str, Any]]:
    """The calls of an answer that consists of nothing else; none where one is broken or names no tool of the request."""
    names = {function.name for function in request.offered}
    if not names or not text.strip().startswith(OPENS) or _CALL.sub("", text).strip():
        return []
    found = []
    for match in _CALL.finditer(text):
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return []
        if name not in names:
            return []
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        found.append({"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": written}})
    return found
