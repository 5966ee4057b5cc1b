"""Tools for models that know nothing of them: they are told in the system message, and a call is a text.

A call is written as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the form of Hermes, Qwen and SmolLM2.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from saddlepoint.types import Chat, Message

OPENS, CLOSES = "<tool_call>", "</tool_call>"
KEYS = ("name", "description", "parameters", "strict")


def told(chat: Chat, functions: Iterable[Mapping[str, Any]], must: str = "Call a tool if you need one.") -> Chat:
    """The chat with the tools in its system message; as it is where there are none.

    Args:
        functions: Each with a name and perhaps a description, the JSON schema of its parameters, and strict.
        must: Whether and which one is to be called, in words.
    """
    listed = "\n".join(json.dumps({key: f[key] for key in KEYS if f.get(key) is not None}) for f in functions)
    if not listed:
        return chat
    words = f'You can call these tools:\n{listed}\n{must} To call one, write only: {OPENS}{{"name": "NAME", "arguments": {{...}}}}{CLOSES}'
    if chat and chat[0].role == "system":
        return (Message("system", f"{chat[0].text}\n\n{words}"), *chat[1:])
    return (Message("system", words), *chat)


def written(calls: Iterable[tuple[str, str]]) -> str:
    """Calls, each a name and its arguments in JSON, as the model writes them."""
    return "\n".join(f'{OPENS}{{"name": {json.dumps(name)}, "arguments": {arguments}}}{CLOSES}' for name, arguments in calls)
