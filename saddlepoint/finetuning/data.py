"""Training files: what a line must be, what is wrong with one and where, and what a right one teaches. No torch.

A file is JSON Lines in UTF-8, in one of four formats:

    chat            {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "...", "weight": 1}]}
    completion      {"prompt": "...", "completion": "..."}
    preference      {"input": {"messages": [...]}, "preferred_completion": [MESSAGE], "non_preferred_completion": [MESSAGE]}
    reinforcement   {"messages": [..., {"role": "user", "content": "..."}], ...}: any other fields are for the grader
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from saddlepoint import tool_text
from saddlepoint.finetuning import _rules as rules
from saddlepoint.finetuning._issues import Issue, kind
from saddlepoint.finetuning._json import ABSENT, several, value, walk
from saddlepoint.types import Message, Role

Format = Literal["chat", "completion", "preference", "reinforcement"]
RULES = {"chat": rules.chat, "completion": rules.completion, "preference": rules.preference, "reinforcement": rules.reinforcement}
LEAST = 10
"""Examples that a training file must have."""
CLEAR = 50
"""Examples from which a gain is usually clear."""
_BOM = b"\xef\xbb\xbf"
_AS: dict[str, Role] = {"developer": "system", "function": "tool"}
_LOOKED_AT = 200  # lines that tell the format


@dataclass(frozen=True)
class Record:
    """One example.

    Args:
        line: Where it stands in its file, from 1.
        chat: Its messages as the model reads them: tools stand in the system message, calls are text. Without those of a preference's
            completions; empty for a prompt and its completion.
        learned: For each message whether it is trained on: the assistant's, but for those of weight 0.
        preferred, rejected: The two completions of a preference.
        item: The whole line of the reinforcement format, which its grader reads.
        prompt, completion: Bare texts, for models without a chat; only the completion is learned.
        hazard: The id of the policy's hazard that a safety example is about; "" of a user's own.
    """

    line: int
    chat: tuple[Message, ...] = ()
    learned: tuple[bool, ...] = ()
    preferred: str = ""
    rejected: str = ""
    item: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    completion: str = ""
    hazard: str = ""


@dataclass(frozen=True)
class Mistake:
    """Something wrong at one place of a file.

    Args:
        line, column: From 1; a column counts characters, and a byte-order mark is none.
        code: A word for programs.
        message: What is wrong, what is allowed, what was got.
    """

    line: int
    column: int
    code: str
    message: str


@dataclass(frozen=True)
class Checked:
    """What a file holds.

    Args:
        format: As given, or as most of its first lines are; "chat" where they tell nothing.
        examples: Lines that are not empty, whether right or wrong.
        records: The examples of the lines in which nothing is wrong, in order.
        mistakes: By line and column; the file can be trained on only if there is none.
        warnings: By line and column too.
    """

    format: Format
    examples: int
    records: tuple[Record, ...]
    mistakes: tuple[Mistake, ...]
    warnings: tuple[Mistake, ...]


def epochs(n: int) -> int:
    """The default number of passes over n examples: 3, more where that is less than 100 of them, fewer where more than 25,000.

    Source: the check script of OpenAI's fine-tuning guide, 2023.
    """
    if n < 1:
        return 25
    if 3 * n < 100:
        return min(25, 100 // n)
    return max(1, 25_000 // n) if 3 * n > 25_000 else 3


def check(data: bytes, format: Format | None = None, least: int = LEAST) -> Checked:
    """Read a file and find what is wrong with it. Never raises for what the file holds.

    Args:
        format: None takes the one that most of the first lines have.
        least: Examples that there must be; 1 for a validation file.
    """
    lines = data.removeprefix(_BOM).split(b"\n")
    if whole := _not_lines(data, lines):
        return Checked(format or "chat", 0, (), tuple(whole), ())
    format = format or _format(lines)
    records: list[Record] = []
    mistakes: list[Mistake] = []
    warnings: list[Mistake] = []
    examples = 0
    for number, raw in enumerate(lines, 1):
        if not (raw := raw.strip(b"\r")).strip(b" \t\r"):
            if number < len(lines):
                warnings.append(Mistake(number, 1, "empty_line", "the line is empty and is passed over"))
            continue
        examples += 1
        found, wrong, odd = _line(raw, number, format)
        mistakes += wrong
        warnings += odd
        if found is not None:
            records.append(found)
    if examples < least:
        said = f"the file has {examples} example(s), but must have at least {least}"
        mistakes.append(Mistake(max(1, len(lines) - 1), 1, "invalid_n_examples", said))
    elif least > 1 and examples < CLEAR:
        said = f"{examples} examples; from {CLEAR} to 100 a gain is usually clear"
        warnings.append(Mistake(max(1, len(lines) - 1), 1, "few_examples", said))
    return Checked(format, examples, tuple(records), tuple(mistakes), tuple(warnings))


def _line(raw: bytes, number: int, format: Format) -> tuple[Record | None, list[Mistake], list[Mistake]]:
    """The record of a line, or its mistakes; and its warnings."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as wrong:
        at = len(raw[: wrong.start].decode())
        said = f"byte 0x{raw[wrong.start]:02x} is no UTF-8; save the file as UTF-8"
        return None, [Mistake(number, at + 1, "invalid_encoding", said)], []
    line = value(text)
    walked = None if line is not ABSENT else walk(text)
    mistakes = [Mistake(number, f.at + 1, f.code, f.message) for f in walked.faults] if walked else []
    if walked:
        line = walked.value
    issues = list(_issues(line, format)) if line is not ABSENT else []
    warnings: list[Mistake] = []
    if issues:
        walked = walked or walk(text)
        for issue in issues:
            at = (walked.keys if issue.key else walked.values).get(issue.path, 0)
            (warnings if issue.warning else mistakes).append(Mistake(number, at + 1, issue.code, issue.message))
    mistakes.sort(key=lambda mistake: mistake.column)
    warnings.sort(key=lambda warning: warning.column)
    return (None if mistakes else _record(line, number, format)), mistakes, warnings


def _issues(line: Any, format: Format) -> Iterator[Issue]:
    if not isinstance(line, dict):
        yield Issue((), "data_type", f"a line must be a JSON object; got {kind(line)}")
    elif (other := _looks(line)) and other != format and {other, format} != {"chat", "reinforcement"}:
        yield Issue((), "wrong_format", f"the line is of the format {other}, and the file of the format {format}; put it in another file")
    else:
        yield from RULES[format](line)


def _looks(line: Mapping[str, Any]) -> Format | None:
    """The format that a line's keys tell."""
    if "messages" in line:
        turns = line["messages"]
        last = turns[-1] if isinstance(turns, list) and turns else None
        open_ = isinstance(last, dict) and last.get("role") in ("user", "tool") and not any(map(_assistant, turns))
        return "reinforcement" if open_ and set(line) - set(rules.CHAT_KEYS) else "chat"
    if "input" in line or "preferred_completion" in line:
        return "preference"
    return "completion" if "prompt" in line or "completion" in line else None


def _assistant(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "assistant"


def _format(lines: list[bytes]) -> Format:
    """The format that most of the first lines have."""
    seen: Counter[Format] = Counter()
    for raw in lines[:_LOOKED_AT]:
        try:
            line = walk(raw.decode()).value
        except UnicodeDecodeError:
            continue
        if isinstance(line, dict) and (looks := _looks(line)):
            seen[looks] += 1
    return seen.most_common(1)[0][0] if seen else "chat"


def _not_lines(data: bytes, lines: list[bytes]) -> list[Mistake]:
    """Why the file as a whole is no JSON Lines, said once and not for each of its lines, and what is wrong in its JSON besides."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in data[:4]:
        return [Mistake(1, 1, "invalid_encoding", "the file is in UTF-16 or UTF-32; save it as UTF-8")]
    number, first = next(((n, raw.strip()) for n, raw in enumerate(lines, 1) if raw.strip()), (1, b""))
    a_list = first[:1] == b"[" and isinstance(value(first.decode(errors="replace")), list)
    if first not in (b"{", b"[") and not a_list:
        return []
    shape = "objects are written over several lines" if first == b"{" else "the file is one JSON list"
    found = [Mistake(number, 1, "not_json_lines", f"{shape}; write one object a line, with nothing around or between them")]
    text = data.removeprefix(_BOM).decode(errors="replace")
    for fault in [] if a_list else several(text):
        line = text.count("\n", 0, fault.at) + 1
        found.append(Mistake(line, fault.at - text.rfind("\n", 0, fault.at), fault.code, fault.message))
    return found


def _record(line: Mapping[str, Any], number: int, format: Format) -> Record:
    """The record of a line in which nothing is wrong."""
    if format == "completion":
        return Record(number, prompt=line["prompt"], completion=line["completion"])
    asked = line["input"] if format == "preference" else line
    turns = asked["messages"]
    chat = tuple(Message(_AS.get(t["role"], t["role"]), _text(t)) for t in turns)
    learned = tuple(format == "chat" and t["role"] == "assistant" and t.get("weight") != 0 for t in turns)
    tools = [tool["function"] for tool in asked.get("tools") or ()] or asked.get("functions") or ()
    if len(told := tool_text.told(chat, tools)) > len(chat):  # a system message came before the others
        learned = (False, *learned)
    if format == "preference":
        preferred, rejected = (_text(line[side][0]) for side in rules.PREFERENCE_KEYS[1:])
        return Record(number, told, learned, preferred, rejected)
    return Record(number, told, learned, item=line if format == "reinforcement" else {})


def _text(turn: Mapping[str, Any]) -> str:
    """What a message says, its calls included."""
    content = turn.get("content")
    text = content if isinstance(content, str) else "".join(part[part["type"]] for part in content or ())
    calls = [call["function"] for call in turn.get("tool_calls") or ()] + [c for c in [turn.get("function_call")] if c]
    said = tool_text.written((call["name"], call["arguments"]) for call in calls)
    return "\n".join(filter(None, (text or turn.get("refusal") or "", said)))
