"""Training files: every mistake at its place, what a right line teaches, and that nothing in a file breaks the check."""

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saddlepoint.errors import UsageError
from saddlepoint.finetuning import _rules
from saddlepoint.finetuning._json import ABSENT, DEPTH, value, walk
from saddlepoint.finetuning.cost import Prices, cost, prices, recorded, speed
from saddlepoint.finetuning.counts import measured, spread
from saddlepoint.finetuning.data import RULES, Checked, Format, Record, check, epochs
from saddlepoint.finetuning.overlap import ALIKE, Pair, duplicates, leaks
from saddlepoint.finetuning.report import LARGE, Looked
from saddlepoint.finetuning.summary import grouped, readable
from saddlepoint.types import Message

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

Row = dict[str, Any]


def chat(asked: str = "Who wrote Hamlet?", answer: str = "Shakespeare. Ever heard of him?", system: str = "You are Marv.") -> Row:
    turns = [("system", system), ("user", asked), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns if text]}


def lines(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass")


def found(data: bytes | str, format: Format | None = None, least: int = 1) -> Checked:
    return check(data.encode() if isinstance(data, str) else data, format, least)


# ---- each mistake at its place --------------------------------------------------------------------------------------
# A mark stands in front of what is wrong; the line is checked without the marks, and each must be found where one stood.

MARK = "\u2039"
ASKED, SAID = '{"role": "user", "content": "Hi"}', '{"role": "assistant", "content": "Oh. You."}'
TOOLS = '"tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]'
CALL = '{"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]}'
CHAT: list[tuple[str, str]] = [
    # JSON
    ("invalid_json", '{"messages": [{"role": "user", "content": "Hi" ‹"name": "x"}]}'),
    ("invalid_json", '{"messages": [{"role": "user", "content": "Say ‹"Hi" to me"} x ]}'),
    ("invalid_json", '{"messages": [{"role": "user", "content": ‹"Hi}]}'),
    ("invalid_json", '‹{"role": "user"'),
    ("invalid_json", "{‹'messages': []}"),
    ("invalid_json", '{"messages": ‹None}'),
    ("invalid_json", "{\"messages\": ‹'[]'}"),
    ("invalid_json", '{"messages" ‹[]}'),
    ("invalid_json", '{"messages": [' + ASKED + ", " + SAID + "‹,]}"),
    ("invalid_json", '{"messages": [' + ASKED + ", " + SAID + "]}‹,"),
    ("invalid_json", '{"messages": [' + ASKED + ", " + SAID + ']} ‹{"messages": []}'),
    ("invalid_json", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a‹\tb"}]}'),
    ("invalid_json", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a‹\\x"}]}'),
    ("invalid_json", "‹Hi"),
    ("duplicate_key", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a", ‹"content": "b"}]}'),
    ("invalid_number", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a", "weight": ‹NaN}]}'),
    ("invalid_number", '{"x": ‹-Infinity, "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_number", '{"x": ‹1e999, "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_number", '{"x": ‹' + "9" * 5000 + ', "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_number", '{"x": ‹-' + "9" * 309 + ', "messages": [' + ASKED + ", " + SAID + "]}"),
    ("lone_surrogate", '{"messages": [' + ASKED + ', {"role": "assistant", "content": ‹"\\ud83d"}]}'),
    ("too_deep", '{"x": ' + "[" * (DEPTH - 1) + "‹" + "[" * 100_000),
    # the shape of a line
    ("data_type", '‹["messages"]'),
    ("data_type", "‹3"),
    ("missing_messages_list", '‹{"message": []}'),
    ("missing_messages_list", '{"messages": ‹[]}'),
    ("missing_messages_list", '{"messages": ‹{"role": "user"}}'),
    ("wrong_format", '‹{"prompt": "a", "completion": "b"}'),
    ("data_type", '{"messages": [' + ASKED + ", ‹3, " + SAID + "]}"),
    # messages
    ("message_missing_key", '{"messages": [' + ASKED + ", " + SAID + ', ‹{"content": "x"}]}'),
    ("message_missing_key", '{"messages": [‹{"role": "user"}, ' + SAID + "]}"),
    ("message_unrecognized_key", '{"messages": [{"role": "user", "content": "Hi", ‹"contents": "x"}, ' + SAID + "]}"),
    ("unrecognized_role", '{"messages": [' + ASKED + ', {"role": ‹"asistant", "content": "x"}, ' + SAID + "]}"),
    ("unrecognized_role", '{"messages": [' + ASKED + ', {"role": ‹["user"], "content": "x"}, ' + SAID + "]}"),
    ("missing_content", '{"messages": [{"role": "user", "content": ‹""}, ' + SAID + "]}"),
    ("missing_content", '{"messages": [{"role": "user", "content": ‹null}, ' + SAID + "]}"),
    ("missing_content", '{"messages": [{"role": "user", "content": ‹7}, ' + SAID + "]}"),
    ("missing_content", '{"messages": [' + ASKED + ', {"role": "assistant", "content": ‹" "}]}'),
    ("missing_content", '{"messages": [{"role": "user", "content": [‹{"type": "text", "text": ""}]}, ' + SAID + "]}"),
    ("data_type", '{"messages": [{"role": "user", "content": [‹"Hi"]}, ' + SAID + "]}"),
    ("unsupported_part", '{"messages": [{"role": "user", "content": [‹{"type": "image_url", "image_url": {"url": "x"}}]}, ' + SAID + "]}"),
    ("unsupported_part", '{"messages": [{"role": "user", "content": [‹{"type": "input_audio"}]}, ' + SAID + "]}"),
    ("data_type", '{"messages": [{"role": "user", "content": "Hi", "name": ‹5}, ' + SAID + "]}"),
    ("example_missing_assistant_message", '{"messages": ‹[' + ASKED + "]}"),
    ("invalid_weight", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a", "weight": ‹0.5}]}'),
    ("invalid_weight", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a", "weight": ‹true}]}'),
    ("invalid_weight", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a", "weight": ‹2}]}'),
    ("invalid_weight", '{"messages": [' + ASKED + ', {"role": "assistant", "content": "a", "weight": ‹"1"}]}'),
    ("invalid_weight", '{"messages": [{"role": "user", "content": "Hi", ‹"weight": 1}, ' + SAID + "]}"),
    ("nothing_learned", '{"messages": ‹[' + ASKED + ', {"role": "assistant", "content": "a", "weight": 0}]}'),
    # tools
    ("data_type", '{"parallel_tool_calls": ‹"no", "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_tools", '{"tools": ‹[], "messages": [' + ASKED + ", " + SAID + "]}"),
    (
        "invalid_tools",
        '{"functions": ‹' + json.dumps([{"name": f"f{i}"} for i in range(129)]) + ', "messages": [' + ASKED + ", " + SAID + "]}",
    ),
    ("invalid_tools", '{"functions": [‹"look"], "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_tools", '{"tools": [‹{"name": "look"}], "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_tools", '{"functions": [{"name": ‹"l o"}], "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_tools", '{"functions": [{"name": "a"}, {"name": ‹"a"}], "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_tools", '{"functions": [{"name": "a", "parameters": ‹"x"}], "messages": [' + ASKED + ", " + SAID + "]}"),
    ("invalid_tools", "{" + TOOLS + ', ‹"functions": [{"name": "a"}], "messages": [' + ASKED + ", " + SAID + "]}"),
    ("unknown_tool", "{" + TOOLS + ', "messages": [' + ASKED + ", " + CALL.replace('"look"', '‹"lock"') + "]}"),
    ("invalid_tool_calls", "{" + TOOLS + ', "messages": [' + ASKED + ", " + CALL.replace('"{}"', '‹"{"') + "]}"),
    ("invalid_tool_calls", "{" + TOOLS + ', "messages": [' + ASKED + ", " + CALL.replace('{"id": "c1", ', "‹{") + "]}"),
    ("invalid_tool_calls", "{" + TOOLS + ', "messages": [' + ASKED + ', {"role": "assistant", "tool_calls": ‹"look"}, ' + SAID + "]}"),
    ("invalid_tool_calls", "{" + TOOLS + ', "messages": [' + ASKED + ", " + CALL.replace('{"name": "look", ', "‹{") + "]}"),
    ("invalid_tool_calls", "{" + TOOLS + ', "messages": [' + CALL + ", " + CALL.replace('"c1"', '‹"c1"') + "]}"),
    (
        "invalid_tool_calls",
        "{" + TOOLS + ', "messages": [' + CALL[:-1] + ', ‹"function_call": {"name": "look", "arguments": "{}"}}, ' + SAID + "]}",
    ),
    ("invalid_tool_calls", '{"messages": [{"role": "assistant", "function_call": ‹{"name": "look"}}]}'),
    ("message_unrecognized_key", '{"messages": [{"role": "user", "content": "Hi", ‹"tool_calls": []}, ' + SAID + "]}"),
    ("unknown_tool_call", "{" + TOOLS + ', "messages": [' + CALL + ', {"role": "tool", "tool_call_id": ‹"c2", "content": ""}]}'),
    ("message_missing_key", "{" + TOOLS + ', "messages": [' + CALL + ', ‹{"role": "tool", "content": "x"}]}'),
    ("message_missing_key", '{"messages": [' + SAID + ', ‹{"role": "function", "content": "x"}]}'),
    ("message_unrecognized_key", '{"messages": [{"role": "user", "content": "Hi", ‹"tool_call_id": "c"}, ' + SAID + "]}"),
]
OTHERS: list[tuple[Format, str, str]] = [
    ("completion", "missing_completion", '‹{"prompt": "a"}'),
    ("completion", "missing_prompt", '‹{"completion": "a"}'),
    ("completion", "missing_completion", '{"prompt": "a", "completion": ‹" "}'),
    ("completion", "data_type", '{"prompt": ‹null, "completion": "b"}'),
    ("completion", "wrong_format", '‹{"messages": [' + ASKED + ", " + SAID + "]}"),
    (
        "preference",
        "missing_input",
        '‹{"preferred_completion": [' + SAID + '], "non_preferred_completion": [' + ASKED.replace("user", "assistant") + "]}",
    ),
    (
        "preference",
        "data_type",
        '{"input": ‹"x", "preferred_completion": [' + SAID + '], "non_preferred_completion": [' + SAID[:-2] + 'x"}]}',
    ),
    ("preference", "missing_completion", '‹{"input": {"messages": [' + ASKED + ']}, "preferred_completion": [' + SAID + "]}"),
    (
        "preference",
        "invalid_completion",
        '{"input": {"messages": [' + ASKED + ']}, "preferred_completion": ‹[], "non_preferred_completion": [' + SAID + "]}",
    ),
    (
        "preference",
        "invalid_completion",
        '{"input": {"messages": ['
        + ASKED
        + ']}, "preferred_completion": ‹['
        + f"{SAID}, {SAID}"
        + '], "non_preferred_completion": ['
        + SAID
        + "]}",
    ),
    (
        "preference",
        "invalid_weight",
        '{"input": {"messages": ['
        + ASKED
        + ']}, "preferred_completion": [{"role": "assistant", "content": "a", ‹"weight": 1}], "non_preferred_completion": ['
        + SAID
        + "]}",
    ),
    (
        "preference",
        "unrecognized_role",
        '{"input": {"messages": ['
        + ASKED
        + ']}, "preferred_completion": [{"role": ‹"user", "content": "a"}], "non_preferred_completion": ['
        + SAID
        + "]}",
    ),
    (
        "preference",
        "same_completions",
        '{"input": {"messages": [' + ASKED + ']}, "preferred_completion": [' + SAID + '], "non_preferred_completion": ‹[' + SAID + "]}",
    ),
    ("reinforcement", "last_not_user", '{"messages": [' + ASKED + ", ‹" + SAID + '], "answer": "a"}'),
    ("reinforcement", "last_not_user", '{"messages": [' + ASKED + ', ‹{"role": "system", "content": "Hi"}], "answer": "a"}'),
    ("reinforcement", "missing_messages_list", '‹{"answer": "a"}'),
]


@pytest.mark.parametrize(("format", "code", "marked"), [("chat", *one) for one in CHAT] + OTHERS)
def test_a_mistake_is_found_where_it_stands(format: Format, code: str, marked: str) -> None:
    line = marked.replace(MARK, "")
    first = lines(chat(), chat("Who?", "Nobody."))
    checked = found(first + b"\r\n\n" + line.encode() + b"\r\n", format)

    wrong = [m for m in checked.mistakes if m.line == 4]
    assert [(m.column, m.code) for m in wrong if m.code == code][:1] == [(marked.index(MARK) + 1, code)], wrong
    assert all(4 != record.line for record in checked.records) and all(len(m.message) > 10 for m in wrong)


def test_bare_quotes_and_trailing_commas_of_one_line_are_all_told() -> None:
    marked = (
        '{"messages": [{"role": "system", "content": "As JSON: ‹"player" (whole name)", "team", and "sport"."‹,}, '
        '{"role": "user", "content": "Rovers let Kean go"}, '
        '{"role": "assistant", "content": "{‹"player": "Jo Kean", "team": "Rovers", "sport": null" }"}‹,]}'
    )
    columns = [at - i for i, at in enumerate(at for at, c in enumerate(marked) if c == MARK)]
    checked = found(marked.replace(MARK, ""))
    assert [(m.line, m.column, m.code) for m in checked.mistakes] == [(1, at + 1, "invalid_json") for at in columns]

    # Where a text ends that holds bare quotes is a guess; what follows from a wrong one is not told.
    inner = found('{"messages": [{"role": "user", "content": "{"a": [{"b": "c"}]}"}, ' + SAID + "]}")
    assert [(m.column, m.code) for m in inner.mistakes] == [(45, "invalid_json")]

    spread_out = (
        json.dumps(chat(), indent=2).replace("Who wrote Hamlet?", 'Who wrote "Hamlet"?').replace('"You are Marv."', '"You are Marv.",')
    )
    over = found(f"{spread_out},\n{spread_out}")
    assert [(m.line, m.code) for m in over.mistakes] == [(1, "not_json_lines"), *((n, "invalid_json") for n in (5, 9, 21, 25))]
    assert over.mistakes[1].column == len('      "content": "You are Marv."') + 1


def test_warnings_leave_a_line_usable() -> None:
    marked = '{‹"id": 7, "messages": ‹[{"role": "user", "content": "Hi", ‹"name": "Ann"}, ' + SAID + ", ‹" + ASKED + "]}"
    places = [at - i + 1 for i, at in enumerate(at for at, c in enumerate(marked) if c == MARK)]
    checked = found(f"{marked.replace(MARK, '')}\n\n" + '{"messages": [' + SAID + "]}")

    assert not checked.mistakes and [r.line for r in checked.records] == [1, 3]
    codes = ["unrecognized_key", "missing_system", "name_not_read", "last_not_assistant"]
    wanted = [(1, *one) for one in zip(places, codes, strict=True)] + [
        (2, 1, "empty_line"),
        (3, 14, "missing_system"),
        (3, 14, "missing_user"),
    ]
    assert [(w.line, w.column, w.code) for w in checked.warnings] == wanted

    both = {
        "preferred_completion": [{"role": "assistant", "content": "a"}],
        "non_preferred_completion": [{"role": "assistant", "content": "b"}],
    }
    checked = found(lines({"input": chat(), **both}))
    assert not checked.mistakes and [w.code for w in checked.warnings] == ["last_not_user"]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", [(1, 1, "invalid_n_examples")]),
        (b"\n\n", [(2, 1, "invalid_n_examples")]),
        ("é".encode("latin-1"), [(1, 1, "invalid_encoding"), (1, 1, "invalid_n_examples")]),
        (b'{"messages": "\xc3\xa9\xff"}', [(1, 16, "invalid_encoding"), (1, 1, "invalid_n_examples")]),
        (json.dumps(chat()).encode("utf-16"), [(1, 1, "invalid_encoding")]),
        (json.dumps(chat()).encode("utf-32-be"), [(1, 1, "invalid_encoding")]),
        (json.dumps([chat()] * 20).encode(), [(1, 1, "not_json_lines")]),
        (json.dumps([chat()] * 20, indent=1).encode(), [(1, 1, "not_json_lines")]),
        (b"[" * 2_000_000, [(1, DEPTH + 1, "too_deep"), (1, 1, "invalid_n_examples")]),
    ],
)
def test_files_that_are_wrong_as_a_whole(data: bytes, wanted: list[tuple[int, int, str]]) -> None:
    assert [(m.line, m.column, m.code) for m in check(data).mistakes] == wanted


def test_byte_order_mark_line_ends_and_odd_characters_are_no_mistake() -> None:
    rows = [chat(f"Line\u2028end {i} \U0001f600 é") for i in range(12)]
    checked = check(b"\xef\xbb\xbf" + lines(*rows).replace(b"\n", b"\r\n") + b"\r\n")
    assert not found(lines(chat() | {"x": int("9" * 308)})).mistakes
    assert not checked.mistakes and [r.chat[1].text for r in checked.records] == [f"Line\u2028end {i} \U0001f600 é" for i in range(12)]


def test_a_file_that_servers_may_not_take_is_told() -> None:
    for size, codes in ((LARGE, []), (LARGE + 1, ["large_file"])):
        assert [w.code for w in Looked("f", size, found(lines(chat())), None, ()).warnings] == codes


def test_too_few_examples_are_a_mistake_of_training_files_only() -> None:
    data = lines(*(chat(f"What is {i}?") for i in range(7)))
    (mistake,) = check(data).mistakes
    assert mistake.code == "invalid_n_examples" and "has 7 example(s), but must have at least 10" in mistake.message
    assert not check(data, least=1).mistakes
    assert [w.code for w in check(lines(*(chat(f"What is {i}?") for i in range(10)))).warnings] == ["few_examples"]


def test_the_format_is_that_of_most_lines() -> None:
    pair = {"input": {"messages": chat()["messages"][:2]}, **{k: [{"role": "assistant", "content": k}] for k in _rules.PREFERENCE_KEYS[1:]}}
    graded = {"messages": chat()["messages"][:2], "answer": "Shakespeare"}
    for row, format in (
        (chat(), "chat"),
        (pair, "preference"),
        (graded, "reinforcement"),
        ({"prompt": "", "completion": "x"}, "completion"),
    ):
        checked = found(lines("broken", row, row, {"messages": [], "prompt": 0}))
        assert checked.format == format and len(checked.records) == 2
        assert not found(lines(row)).mistakes and found(b"?").format == "chat"


# ---- what a right line teaches --------------------------------------------------------------------------------------


def test_records_hold_what_the_model_reads() -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "it up"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {"role": "assistant", "content": "Nothing.", "weight": 0},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Sure.", "weight": 1},
    ]
    tool = {"type": "function", "function": {"name": "look", "description": None, "parameters": {"type": "object"}, "strict": True}}
    (record,) = found(lines({"messages": turns, "tools": [tool], "parallel_tool_calls": False})).records

    assert [m.role for m in record.chat] == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert record.chat[0].text.startswith(
        'Be brief.\n\nYou can call these tools:\n{"name": "look", "parameters": {"type": "object"}, "strict": true}\n'
    )
    assert record.chat[1].text == "Look it up"
    assert record.chat[2].text == '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
    assert record.learned == (False, False, True, False, False, False, True)

    old = {
        "messages": [
            {"role": "user", "content": "Go"},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        ]
    }
    (record,) = found(lines(old | {"functions": [{"name": "f"}]})).records
    assert [m.role for m in record.chat] == ["system", "user", "assistant"] and record.learned == (False, False, True)
    assert record.chat[2].text == '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert "unknown_tool" in [w.code for w in found(lines(old)).warnings] and not found(lines(old)).mistakes


def test_tools_are_told_as_the_server_tells_them() -> None:
    pytest.importorskip("fastapi")
    from saddlepoint.service import tools
    from saddlepoint.service.wire import ChatRequest

    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}, "description": "Look it up"}}
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    turns = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (record,) = found(lines({"messages": turns, "tools": [tool]})).records
    request = ChatRequest.model_validate({"model": "m", "messages": turns, "tools": [tool]})

    assert record.chat[:2] == tools.told((Message("user", "Go"),), request)
    assert record.chat[2].text == tools.written([call.function for call in request.messages[1].tool_calls or []])


def test_records_of_the_other_formats() -> None:
    pair = {"input": {"messages": chat()["messages"][:2]}, **{k: [{"role": "assistant", "content": k}] for k in _rules.PREFERENCE_KEYS[1:]}}
    asked = (Message("system", "You are Marv."), Message("user", "Who wrote Hamlet?"))
    assert found(lines(pair)).records == (Record(1, asked, (False, False), "preferred_completion", "non_preferred_completion"),)
    graded = {"messages": chat()["messages"][:2], "answer": ["Shakespeare", 1.5]}
    assert found(lines(graded)).records == (Record(1, asked, (False, False), item=graded),)
    assert found(lines({"prompt": "a ", "completion": " b\n"})).records == (Record(1, prompt="a ", completion=" b\n"),)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})
RIGHT = st.lists(TURN, min_size=1, max_size=4).map(lambda turns: {"messages": [*turns, {"role": "assistant", "content": "Oh."}]})


@given(st.lists(RIGHT, min_size=1, max_size=4), st.booleans())
def test_right_files_come_back_as_they_were(rows: list[Row], ascii: bool) -> None:
    data = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows).encode()
    checked = found(data, "chat")
    assert not checked.mistakes and [r.line for r in checked.records] == list(range(1, len(rows) + 1))
    back = [{"messages": [{"role": m.role, "content": m.text} for m in r.chat]} for r in checked.records]
    assert back == rows and all(own == (m.role == "assistant") for r in checked.records for own, m in zip(r.learned, r.chat, strict=True))


# ---- nothing breaks the check ---------------------------------------------------------------------------------------

WORDS = [*_rules.KEYS, *_rules.CHAT_KEYS, *_rules.PREFERENCE_KEYS, *_rules.COMPLETION_KEYS, *_rules.ROLES]
WORDS += ["type", "text", "image_url", "function", "id", "arguments", "parameters", "strict", "description", "{}", '{"a": 1}', "", " "]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)
LINE = st.dictionaries(st.sampled_from(WORDS), JSON, max_size=4) | RIGHT
PIECES = [
    *'{}[],:"\\\n\r\t -1.eE',
    "\ufeff",
    "\u2028",
    "\ud800",
    "NaN",
    "null",
    "true",
    '"messages"',
    '"role": "user"',
    '\\"',
    "\\ud800",
    "\x00",
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of lines like right ones in which bytes were put in or left out."""
    data = "\n".join(json.dumps(row, ensure_ascii=draw(st.booleans())) for row in draw(st.lists(LINE, max_size=4))).encode(
        "utf-8", "surrogatepass"
    )
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.sampled_from(PIECES).map(lambda p: p.encode("utf-8", "surrogatepass")) | st.binary(max_size=3))
        data = data[:at] + piece + data[at + draw(st.integers(0, 3)) :]
    return data


def _inside(data: bytes, checked: Checked) -> None:
    written = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for m in (*checked.mistakes, *checked.warnings):
        line = written[m.line - 1].decode("utf-8", "replace")
        assert 1 <= m.line <= len(written) and 1 <= m.column <= max(1, len(line)), m
    assert list(checked.records) == sorted(checked.records, key=lambda record: record.line)
    assert not {m.line for m in checked.mistakes if m.code != "invalid_n_examples"} & {r.line for r in checked.records}
    for record in checked.records:
        json.dumps(record.item, allow_nan=False).encode()
        (record.prompt + record.completion + record.preferred + record.rejected + "".join(m.text for m in record.chat)).encode()
        assert record.completion or record.preferred or record.item or any(record.learned)


@settings(max_examples=100)
@given(st.binary(max_size=200) | damaged(), st.sampled_from([None, *RULES]))
def test_no_bytes_break_it_and_every_place_lies_in_the_file(data: bytes, format: Format | None) -> None:
    checked = check(data, format, 1)
    _inside(data, checked)
    assert list(readable(checked.mistakes)) or not checked.mistakes
    assert sum(group.n for group in grouped(checked.mistakes)) == len(checked.mistakes)


@settings(max_examples=100)
@given(LINE, st.sampled_from(list(RULES)))
def test_a_rule_points_at_a_value_or_a_key_that_is_there(line: Row, format: Format) -> None:
    text = json.dumps(json.loads(json.dumps(line).replace("NaN", "0").replace("-Infinity", "0").replace("Infinity", "0")))
    walked = walk(text)
    for issue in RULES[format](json.loads(text)):
        places = walked.keys if issue.key else walked.values
        assert issue.path in places, issue
        json.JSONDecoder().raw_decode(text, places[issue.path])


@settings(max_examples=100)
@given(damaged().map(lambda data: data.decode("utf-8", "replace")))
def test_the_quick_reading_and_the_walk_agree(text: str) -> None:
    walked, quick = walk(text), value(text)
    assert (quick is ABSENT) == bool(walked.faults)
    if quick is not ABSENT:
        assert quick == walked.value == json.loads(text)
        for path, at in walked.values.items():
            part = quick
            for step in path:
                part = part[step]
            assert json.JSONDecoder().raw_decode(text, at)[0] == part


def test_large_files_are_checked_in_seconds() -> None:
    rows = [json.dumps(chat(f"What is {i}? " * 20, "Who would not know. " * 8)) for i in range(20_000)]
    right, wrong = "\n".join(rows).encode(), "\n".join(rows).replace('"role": "user"', '"role": "usr"').encode()
    for data, n in ((right, 0), (wrong, 20_000)):
        began = time.process_time()
        assert len(check(data).mistakes) == n and len(data) > 10_000_000
        assert time.process_time() - began < 8  # about 0.5 and 1 s on a quiet machine


def test_ten_thousand_mistakes_are_told_in_few_lines() -> None:
    rows = [json.dumps(chat()).replace('"user"', '"usr"')] * 9_000 + ["{"] * 1_000
    told = list(readable(found("\n".join([json.dumps(chat()), *rows])).mistakes))
    assert told[0] == "unrecognized_role: 9,000" and told[1].startswith("  line 2, column ") and told[4] == "  and 8,997 more"
    assert told[5] == "invalid_json: 1,000" and told[6].startswith("  line 9002, column 1: ") and len(told) == 10


# ---- epochs, counts, cost, time -------------------------------------------------------------------------------------


def test_default_epochs_are_the_documented_ones() -> None:
    documented = {3: 25, 5: 20, 10: 10, 20: 5, 33: 3, 8334: 2, 12501: 1}
    assert {n: epochs(n) for n in documented} == documented


@given(st.integers(1, 10**9))
def test_default_epochs_make_a_hundred_to_twenty_five_thousand_passes(n: int) -> None:
    passes = n * epochs(n)
    assert 1 <= epochs(n) <= 25 and epochs(n) >= epochs(n + 1)
    assert epochs(n) == 3 or passes <= 100 or epochs(n) == 1 or (passes <= 25_000 < passes + n)
    assert epochs(n) in (3, 25) or 3 * n > 25_000 or passes + n > 100


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_percentiles_are_those_they_are_named_after(values: list[int]) -> None:
    s, n = spread(values), len(values)
    assert (s.n, s.total, s.min, s.max) == (n, sum(values), min(values), max(values))
    ordered = sorted(values)
    for share, percentile in ((0.05, s.p5), (0.5, s.median), (0.95, s.p95)):
        at = share * (n - 1)
        low, part = int(at), at - int(at)
        assert percentile == pytest.approx(ordered[low] * (1 - part) + ordered[min(low + 1, n - 1)] * part)
    assert spread(list(range(101))).p5 == 5 and spread(list(range(101))).p95 == 95 and spread([]).n == 0


def test_tokens_are_counted_as_the_model_reads_them(tiny: "HF") -> None:
    rows = [chat(f"What is {i}?" * i, "Well. " * (1 + i % 4)) for i in range(1, 13)]
    records = check(lines(*rows)).records
    counts = measured(records, tiny)
    whole = [tiny.ids(tiny.tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows]
    assert counts.lengths == tuple(map(len, whole)) and counts.context == 512 and not counts.cut and not counts.mistakes
    answers = [len(tiny.ids(row["messages"][2]["content"])) + 1 for row in rows]  # and the token that ends it
    assert counts.trained.total == sum(answers) and counts.messages.total == 36


def test_what_is_too_long_is_named(tiny: "HF") -> None:
    fits, cut, lost = chat(answer="tea " * 20), chat(answer="tea " * 900), chat(asked="tea " * 900)
    counts = measured(found(lines(fits, cut, lost)).records, tiny)
    whole = len(tiny.ids(tiny.tokenizer.apply_chat_template(cut["messages"], tokenize=False)))
    assert [(c.line, c.tokens) for c in counts.cut] == [(2, whole)] and whole > 512 and counts.lengths[1] == whole
    shown = Looked("f", 1, found(lines(fits, cut, lost)), counts, ())
    assert [(w.line, w.code) for w in shown.warnings] == [(2, "too_long")] and f"{whole} tokens" in shown.warnings[0].message
    assert [m.code for m in shown.mistakes] == ["not_trainable"]
    assert [(m.line, m.code) for m in counts.mistakes] == [(3, "not_trainable")] and "no token would be trained" in counts.mistakes[
        0
    ].message


def test_other_formats_are_counted_too(tiny: "HF") -> None:
    pair = {"input": {"messages": chat()["messages"][:2]}, **{k: [{"role": "assistant", "content": k}] for k in _rules.PREFERENCE_KEYS[1:]}}
    both = [[*chat()["messages"][:2], {"role": "assistant", "content": k}] for k in _rules.PREFERENCE_KEYS[1:]]
    counts = measured(found(lines(pair)).records, tiny)
    assert counts.lengths == (sum(len(tiny.ids(tiny.tokenizer.apply_chat_template(c, tokenize=False))) for c in both),)
    assert counts.trained.total == sum(len(tiny.ids(k)) + 1 for k in _rules.PREFERENCE_KEYS[1:])

    graded = measured(found(lines({"messages": chat()["messages"][:2], "answer": 1})).records, tiny)
    asked = (Message("system", "You are Marv."), Message("user", "Who wrote Hamlet?"))
    assert graded.lengths == (len(tiny.prompt_ids(asked)),) and graded.trained.total == 0

    bare = measured(found(lines({"prompt": "The tea", "completion": " is green"}, {"prompt": "t" * 600, "completion": "x"})).records, tiny)
    assert bare.lengths[0] == 1 + len(tiny.ids("The tea")) + len(tiny.ids(" is green")) + 1  # what begins a text, and what ends it
    assert bare.trained.total == len(tiny.ids(" is green")) + 1 and [m.line for m in bare.mistakes] == [2]


def test_cost_is_the_documented_one(tmp_path: Path) -> None:
    assert cost(Prices(), [1000] * 100, 20_000, 3).training == pytest.approx(2.40)
    paid = cost(Prices(), [4096, 10_000], 0, 2)
    assert paid.tokens == 8192 and paid.training == pytest.approx(8192 * 2 * 0.008 / 1000)
    assert cost(Prices(), [100], 40, 1).asking == pytest.approx(60 * 0.012 + 40 * 0.016)  # of 1,000 such examples, by the 1,000 tokens
    assert cost(Prices(), [], 0, 3).training == 0 and "2023" in Prices().name

    table = tmp_path / "prices.toml"
    table.write_text('name = "ours"\ntrain = 1\nlongest = 10\n')
    assert prices(table) == Prices("ours", train=1, longest=10) and prices(table, train=2.0).train == 2.0
    assert prices() == Prices() and prices(train=0.5) == Prices("the prices given", train=0.5)
    for text, said in (("train = -1", "at least 0"), ("train = 'x'", "at least 0"), ("cost = 1", "no price 'cost'"), ("train", "TOML")):
        table.write_text(text)
        with pytest.raises(UsageError, match=said):
            prices(table)
    with pytest.raises(UsageError, match="cannot be read|No such file"):
        prices(tmp_path / "none.toml")


def test_seconds_come_from_a_real_training(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = str(tiny_folder)
    assert recorded(base, "supervised") is None
    records = check(lines(*(chat(f"What is {i}?") for i in range(12)))).records
    began = time.perf_counter()
    measured_now = speed(base, "supervised", records, 4)
    passed = time.perf_counter() - began
    assert recorded(base, "supervised") == measured_now and recorded(base, "dpo") is None
    assert 0 < measured_now.low <= measured_now.tokens_per_second <= measured_now.high and measured_now.n == 3
    spent = 3 * measured_now.batch * measured_now.length / measured_now.tokens_per_second
    assert measured_now.batch == 4 and 0 < spent < passed  # the steps took no longer than the whole
    next(tmp_path.rglob("training_speed.json")).write_text("{")
    assert recorded(base, "supervised") is None


# ---- duplicates and leaks -------------------------------------------------------------------------------------------


def _distinct(n: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(500)]
    return [chat(" ".join(rng.choices(words, k=20)), " ".join(rng.choices(words, k=15)), "The same for all. " * 20) for _ in range(n)]


def test_duplicates_are_found_among_others_that_share_a_system_message() -> None:
    rows = _distinct(300, 0)
    user, assistant = (rows[7]["messages"][i]["content"] for i in (1, 2))
    rows += [
        chat(user.upper().replace(" ", "  "), assistant, "Another."),
        chat(user, assistant + " too"),
        chat(user, "Something else entirely, then."),
    ]
    (same, near, prompt) = duplicates(found(lines(*rows)).records)
    assert same == Pair(301, 8, "same", 1.0)
    assert (near.line, near.other, near.kind) == (302, 8, "near") and ALIKE <= near.alike < 1
    assert (prompt.line, prompt.other, prompt.kind) == (303, 8, "prompt") and prompt.alike < ALIKE


def test_leaks_are_found_between_files() -> None:
    training, others = _distinct(200, 1), _distinct(50, 2)
    leaking = [*others[:25], training[3], *others[25:], training[199]]
    found_ = leaks(found(lines(*training)).records, found(lines(*leaking)).records)
    assert [(p.line, p.other, p.kind) for p in found_] == [(26, 4, "same"), (52, 200, "same")]
    assert leaks(found(lines(*training)).records, found(lines(*others)).records) == ()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 19), st.integers(0, 90))
def test_a_small_change_is_near_and_other_examples_are_not(seed: int, which: int, at: int) -> None:
    rows = _distinct(20, seed)
    text = rows[which]["messages"][1]["content"]
    changed = chat(text[:at] + "#" + text[at + 1 :], rows[which]["messages"][2]["content"])
    pairs = duplicates(found(lines(*rows, changed)).records)
    assert [(p.line, p.other, p.kind) for p in pairs] == [(21, which + 1, "near")]


def test_alike_is_the_share_of_common_runs_of_characters() -> None:
    def runs(text: str) -> set[str]:
        return {text[i : i + 5] for i in range(len(text) - 4)}

    a, b = "the tea is green and the water is hot", "the tea is green and the water is cold"
    (pair,) = duplicates(found(lines({"prompt": "", "completion": a}, {"prompt": "", "completion": b})).records)
    assert pair.alike == pytest.approx(len(runs(a) & runs(b)) / len(runs(a) | runs(b))) and pair.kind == "near"
    unlike = found(lines({"prompt": "", "completion": "x"}, {"prompt": "", "completion": "y"})).records
    assert duplicates(unlike) == ()
