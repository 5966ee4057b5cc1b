"""What a line of each format must be. Every rule says where it is broken; none changes anything.

Source: the check of OpenAI's fine-tuning guide of 2023, whose codes are kept, and the schema of today's protocol. It differs where the
guide's is wrong: a message whose content is null is whole if it calls a tool, and values that are no text do not break the check.
"""

from collections.abc import Generator, Mapping
from typing import Any

from saddlepoint.finetuning._issues import Issue, Issues, kind, unread
from saddlepoint.finetuning._json import Path
from saddlepoint.finetuning._tool_rules import called, returned, tools

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
KEYS = ("role", "content", "name", "weight", "refusal", "tool_calls", "function_call", "tool_call_id")
CHAT_KEYS = ("messages", "tools", "functions", "parallel_tool_calls")
PREFERENCE_KEYS = ("input", "preferred_completion", "non_preferred_completion")
COMPLETION_KEYS = ("prompt", "completion")
_TURN = '{"role": "assistant", "content": "..."}'


def chat(line: Mapping[str, Any]) -> Issues:
    """`{"messages": [...]}`, with `tools` or `functions` where the assistant calls them; the assistant's messages are learned."""
    yield from unread(line, CHAT_KEYS)
    known = yield from tools(line, ())
    if (yield from _asked(line, (), known)):
        yield from _learned(line["messages"])


def reinforcement(line: Mapping[str, Any]) -> Issues:
    """`{"messages": [...], ...}`: a prompt, and whatever fields its grader reads."""
    known = yield from tools(line, ())
    if (yield from _asked(line, (), known)) and line["messages"][-1].get("role") in ("assistant", "system", "developer"):
        said = "the last message must be the user's or a tool's, because the answer to it is what is graded"
        yield Issue(("messages", len(line["messages"]) - 1), "last_not_user", said)


def preference(line: Mapping[str, Any]) -> Issues:
    """`{"input": {"messages": [...]}, "preferred_completion": [...], "non_preferred_completion": [...]}`, one message in each."""
    yield from unread(line, PREFERENCE_KEYS)
    known: frozenset[str] | None = None
    if "input" not in line:
        yield Issue((), "missing_input", '"input" is missing; it holds the prompt: {"messages": [...]}')
    elif not isinstance(line["input"], dict):
        yield Issue(("input",), "data_type", f'"input" must be an object with "messages"; got {kind(line["input"])}')
    else:
        yield from unread(line["input"], CHAT_KEYS, ("input",))
        known = yield from tools(line["input"], ("input",))
        if (yield from _asked(line["input"], ("input",), known)) and line["input"]["messages"][-1].get("role") == "assistant":
            said = "the last message of the input is the assistant's, so that the completion is a second answer to nothing"
            yield Issue(("input", "messages", len(line["input"]["messages"]) - 1), "last_not_user", said, warning=True)
    answers = []
    for side in PREFERENCE_KEYS[1:]:
        found = line.get(side)
        if side not in line:
            yield Issue((), "missing_completion", f'"{side}" is missing; it is a list of one message: [{_TURN}]')
        elif not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
            got = f"{len(found)} of them" if isinstance(found, list) and len(found) != 1 else kind(found)
            yield Issue((side,), "invalid_completion", f'"{side}" must be a list of one message, [{_TURN}]; got {got}')
        else:
            answers.append(found)
            yield from _message(found[0], (side, 0), set(), known)
            if found[0].get("role") in ROLES and found[0]["role"] != "assistant":
                yield Issue((side, 0, "role"), "unrecognized_role", f"a completion is the assistant's; got {found[0]['role']!r}")
            if "weight" in found[0]:
                yield Issue((side, 0, "weight"), "invalid_weight", "a completion has no weight; leave it out", key=True)
    if len(answers) == 2 and answers[0] == answers[1]:
        yield Issue(("non_preferred_completion",), "same_completions", "both completions are the same, so none is preferred; change one")


def completion(line: Mapping[str, Any]) -> Issues:
    """`{"prompt": "...", "completion": "..."}`: text as it is, for models without a chat."""
    yield from unread(line, COMPLETION_KEYS)
    for key in COMPLETION_KEYS:
        if key not in line:
            yield Issue((), f"missing_{key}", f'"{key}" is missing; a line is {{"prompt": "...", "completion": "..."}}')
        elif not isinstance(line[key], str):
            yield Issue((key,), "data_type", f'"{key}" must be a text; got {kind(line[key])}')
        elif key == "completion" and not line[key].strip():
            yield Issue((key,), "missing_completion", "the completion is empty, so nothing would be learned")


def _asked(line: Mapping[str, Any], at: Path, known: frozenset[str] | None) -> Generator[Issue, None, bool]:
    """The messages of a line; returns whether they are a list of objects, so that more can be said of them."""
    turns = line.get("messages")
    if "messages" not in line:
        yield Issue(
            at, "missing_messages_list", '"messages" is missing; it is a list of messages: [{"role": "user", "content": "..."}, ...]'
        )
        return False
    if not isinstance(turns, list) or not turns:
        got = "an empty list" if turns == [] else kind(turns)
        yield Issue((*at, "messages"), "missing_messages_list", f'"messages" must be a list of at least one message; got {got}')
        return False
    calls: set[str] = set()
    for place, turn in enumerate(turns):
        yield from _message(turn, (*at, "messages", place), calls, known)
    if not all(isinstance(turn, dict) for turn in turns):
        return False
    roles = {turn.get("role") for turn in turns if isinstance(turn.get("role"), str)}
    if not roles & {"system", "developer"}:
        yield Issue((*at, "messages"), "missing_system", "no system message; ask the tuned model without one too", warning=True)
    if "user" not in roles:
        yield Issue((*at, "messages"), "missing_user", "no user message; the model learns to speak unasked", warning=True)
    return True


def _learned(turns: list[dict[str, Any]]) -> Issues:
    own = [turn for turn in turns if turn.get("role") == "assistant"]
    if not own:
        said = "no message is the assistant's, so nothing would be learned; end the example with its answer"
        yield Issue(("messages",), "example_missing_assistant_message", said)
    elif all(_zero(turn.get("weight")) for turn in own):
        yield Issue(
            ("messages",), "nothing_learned", "every assistant message has weight 0, so nothing would be learned; give one weight 1"
        )
    if own and turns[-1].get("role") != "assistant":
        said = "nothing is learned behind the assistant's last message; leave out what follows it"
        yield Issue(("messages", len(turns) - 1), "last_not_assistant", said, warning=True)


def _message(turn: Any, at: Path, calls: set[str], known: frozenset[str] | None) -> Issues:
    """One message; `calls` is told the ids of its calls, and knows those before it."""
    if not isinstance(turn, dict):
        yield Issue(at, "data_type", f"a message must be an object; got {kind(turn)}")
        return
    for key in turn:
        if key not in KEYS:
            said = f"a message has no key {key[:40]!r}; allowed: {', '.join(KEYS)}"
            yield Issue((*at, key), "message_unrecognized_key", said, key=True)
    role = turn.get("role")
    if "role" not in turn:
        yield Issue(at, "message_missing_key", f'the message has no "role"; allowed: {", ".join(ROLES)}')
    elif role not in ROLES:
        got = repr(role[:40]) if isinstance(role, str) else kind(role)
        yield Issue((*at, "role"), "unrecognized_role", f"a role is one of {', '.join(ROLES)}; got {got}")
    yield from _content(turn, at)
    if turn.get("weight") is not None and (isinstance(turn["weight"], bool) or turn["weight"] not in (0, 1)):
        yield Issue((*at, "weight"), "invalid_weight", f"a weight is 0 (not learned) or 1; got {kind(turn['weight'])}")
    for key in ("weight", "refusal", "tool_calls", "function_call"):
        if turn.get(key) is not None and role in ROLES and role != "assistant":
            code = "invalid_weight" if key == "weight" else "message_unrecognized_key"
            yield Issue((*at, key), code, f'only an assistant message has "{key}"; this one is by the role {role!r}', key=True)
    yield from called(turn, at, calls, known)
    yield from returned(turn, at, calls)


def _content(turn: Mapping[str, Any], at: Path) -> Issues:
    for key in ("name", "refusal", "tool_call_id"):
        if turn.get(key) is not None and not isinstance(turn[key], str):
            yield Issue((*at, key), "data_type", f'"{key}" must be a text; got {kind(turn[key])}')
    if isinstance(turn.get("name"), str) and turn.get("role") != "function":
        yield Issue((*at, "name"), "name_not_read", "the model's template has no place for a name; say it in the content", True, True)
    content = turn.get("content")
    acts = turn.get("role") == "assistant" and any(turn.get(key) for key in ("tool_calls", "function_call", "refusal"))
    if "content" not in turn:
        if not acts:
            yield Issue(at, "message_missing_key", 'the message has no "content"')
    elif content is None or content == [] or content == "":
        if not acts and not (content == "" and turn.get("role") in ("tool", "function")):  # a tool may return nothing
            yield Issue((*at, "content"), "missing_content", "the content is empty; write a text, or leave the message out")
    elif isinstance(content, list):
        yield from _parts(content, (*at, "content"))
    elif not isinstance(content, str):
        yield Issue((*at, "content"), "missing_content", f"the content must be a text; got {kind(content)}")
    elif not content.strip() and turn.get("role") == "assistant" and not acts:
        yield Issue((*at, "content"), "missing_content", "the content is only white space, so nothing would be learned")


def _parts(parts: list[Any], at: Path) -> Issues:
    for place, part in enumerate(parts):
        name = part.get("type") if isinstance(part, dict) else None
        if not isinstance(name, str):
            yield Issue((*at, place), "data_type", 'a part of a content is an object with a "type": {"type": "text", "text": "..."}')
        elif name not in ("text", "refusal"):
            said = "the models that are trained here read text only; leave images out, or say in words what they show"
            said = said if "image" in name else f"a part is of type text; got {name[:40]!r}"
            yield Issue((*at, place), "unsupported_part", said)
        elif not isinstance(part.get(name), str) or not part[name]:
            yield Issue((*at, place), "missing_content", f'the part has no text under "{name}"')


def _zero(weight: Any) -> bool:
    return weight is not None and not isinstance(weight, bool) and weight == 0
