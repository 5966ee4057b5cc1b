"""Tools of a request: told to the model as `tool_text` writes them, and calls read from what it writes.

A model that was not taught to call will write prose instead, which is then the answer's content.
"""

import json
import re
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from saddlepoint import tool_text
from saddlepoint.service.wire import ChatRequest, NamedTool, ToolCall
from saddlepoint.types import Chat

OPENS = tool_text.OPENS
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def told(chat: Chat, request: ChatRequest) -> Chat:
    """The chat with the tools in its system message; as it is where there are none or none may be called."""
    if not request.tools or request.tool_choice == "none":
        return chat
    must = "Call a tool if you need one."
    if request.tool_choice == "required":
        must = "Call a tool now."
    elif isinstance(request.tool_choice, NamedTool):
        must = f"Call the tool {request.tool_choice.function.name} now."
    return tool_text.told(chat, [tool.function.model_dump() for tool in request.tools], must)


def written(calls: Sequence[ToolCall]) -> str:
    """Calls of an earlier turn as the model would have written them."""
    return tool_text.written((c.function.name, c.function.arguments) for c in calls)


def called(text: str, request: ChatRequest) -> list[dict[str, Any]]:
    """The calls of an answer that consists of nothing else; none where one is broken or names no tool of the request."""
    names = {tool.function.name for tool in request.tools or ()}
    if not names or request.tool_choice == "none" or not text.strip().startswith(OPENS) or _CALL.sub("", text).strip():
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
