"""Answers that wait for a person: one process holds them, another decides."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saddlepoint import approvals
from saddlepoint.cli.approvals import app
from saddlepoint.defenses.response.human_approval import HumanApproval
from saddlepoint.errors import UsageError
from saddlepoint.targets.scripted import Scripted
from saddlepoint.types import Completion, Message, Query, Sampling, user

ASKED = Query(user("How is {it} made?", "You are a help desk."))


def echo() -> Scripted:
    return Scripted(lambda q: f"answer to {q.chat[-1].text}")


def ids(folder: Path) -> list[str]:
    return [held.id for held in approvals.waiting(folder)]


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


# ---- two processes --------------------------------------------------------------------------------------------------

HOLDS = """
import sys
from saddlepoint.defenses.response.human_approval import HumanApproval
from saddlepoint.targets.scripted import Scripted
from saddlepoint.types import Query, user
guard = HumanApproval(Scripted(lambda q: f"answer to {q.chat[-1].text}"), sys.argv[1], 180.0)
for answer in guard.generate([Query(user(text)) for text in sys.argv[2:]]):
    print(answer.finish, answer.text, answer.blocked, sep="|", flush=True)
"""


def holding(folder: Path, *texts: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", HOLDS, str(folder), *texts], stdout=subprocess.PIPE, text=True)


def until_held(folder: Path, n: int) -> list[str]:
    for _ in range(600):
        if folder.is_dir() and len(found := ids(folder)) == n:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{folder} holds {sorted(os.listdir(folder)) if folder.is_dir() else 'nothing'}, not {n} answers")


def test_one_process_holds_and_another_decides(tmp_path: Path) -> None:
    process = holding(tmp_path, "one", "two", "one")
    until_held(tmp_path, 2)  # equal queries are held once
    keys = {held.chat[-1].text: held.id for held in approvals.waiting(tmp_path)}
    approve = [sys.executable, "-m", "saddlepoint", "approvals", "approve", str(tmp_path), keys["one"], "--by", "ada"]
    done = subprocess.run(approve, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"{keys['one']}: approved by ada at 20")
    assert run("deny", tmp_path, keys["two"], "--by", "ada").stdout.startswith(f"{keys['two']}: denied by ada at 20")
    out, _ = process.communicate(timeout=60)

    one, two, again = out.splitlines()
    assert one == again == "stop|answer to one|"
    assert two.startswith("filter|Sorry") and two.endswith(" was denied by ada") and "answer to two" not in two


def test_a_holder_that_is_killed_leaves_what_it_held_to_be_decided(tmp_path: Path) -> None:
    process = holding(tmp_path, "one")
    (key,) = until_held(tmp_path, 1)
    process.kill()
    process.communicate()

    assert run("approve", tmp_path, key).exit_code == 0
    assert HumanApproval(echo(), str(tmp_path), 0.0).generate([Query(user("one"))])[0].text == "answer to one"


WRITES = """
import sys
from pathlib import Path
from saddlepoint.approvals import hold
from saddlepoint.types import user
for i in range(100000):
    hold(Path(sys.argv[1]), [("t", user(str(i)), "long " * 2000, "every answer is held")])
    print(i, flush=True)
"""


def test_a_kill_while_it_writes_leaves_whole_files_and_a_free_lock(tmp_path: Path) -> None:
    for n in range(3):
        folder = tmp_path / str(n)
        process = subprocess.Popen([sys.executable, "-c", WRITES, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        while process.stdout.readline().strip() != str(5 * n + 3):
            pass
        process.kill()
        process.communicate()

        found = approvals.waiting(folder)
        assert len(found) > 5 * n + 3 and all(held.answer == "long " * 2000 for held in found)
        (held,) = approvals.hold(folder, [("t", user("after"), "x", "why")])
        assert approvals.read(folder, held.id) == held


# ---- holding --------------------------------------------------------------------------------------------------------


def test_without_a_decision_it_is_withheld_after_the_wait_and_can_be_decided_later(tmp_path: Path) -> None:
    guard = HumanApproval(echo(), str(tmp_path / "new"), 0.3)
    start = time.monotonic()
    (answer,) = guard.generate([ASKED])

    assert 0.3 <= time.monotonic() - start < 5
    (key,) = ids(tmp_path / "new")
    assert answer.blocked == f"human_approval: held as {key}, and not decided within 0.3 s" and answer.finish == "filter"
    approvals.decide(tmp_path / "new", key, "approved", "ada")
    assert guard.generate([ASKED])[0].text == "answer to How is {it} made?"
    assert guard.generate([Query(ASKED.chat, Sampling(max_tokens=9, seed=4))])[0].finish == "stop", "the same answer, so the same decision"


def test_a_batch_waits_once_and_ends_as_soon_as_all_is_decided(tmp_path: Path) -> None:
    guard = HumanApproval(echo(), str(tmp_path), 30.0)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(guard.generate, [Query(user(str(i))) for i in range(3)])
        start = time.monotonic()
        for key in until_held(tmp_path, 3):
            approvals.decide(tmp_path, key, "approved", "ada")
        assert [a.text for a in waits.result(10)] == [f"answer to {i}" for i in range(3)]
    assert time.monotonic() - start < 10


def test_another_answer_to_the_same_request_is_held_anew(tmp_path: Path) -> None:
    answers = iter(["first", "second"])
    guard = HumanApproval(Scripted(lambda _: next(answers)), str(tmp_path), 0.0)
    guard.generate([ASKED])
    approvals.decide(tmp_path, ids(tmp_path)[0], "approved", "ada")

    assert guard.generate([ASKED])[0].finish == "filter" and len(ids(tmp_path)) == 2


def test_what_is_held_is_written_whole(tmp_path: Path) -> None:
    chat = (*user("How?\n\u8336", "Be brief."), Message("assistant", "To make"))
    HumanApproval(Scripted(lambda _: " tea"), str(tmp_path), 0.0).generate([Query(chat)])
    (file,) = tmp_path.glob("*.json")

    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["id"] == file.stem and written["answer"] == "To make tea" and written["reason"] == "every answer is held"
    assert [(m["role"], m["text"]) for m in written["chat"]] == [(m.role, m.text) for m in chat]
    assert (written["target"], written["decision"], written["by"]) == ("scripted", "", "") and written["held_at"].endswith("Z")
    assert os.listdir(tmp_path).count(".lock") == 1 and len(os.listdir(tmp_path)) == 2, "no draft is left"


def test_only_what_a_guard_calls_unsafe_is_held(tmp_path: Path) -> None:
    def reads(query: Query) -> Completion:
        text = query.chat[-1].text
        return Completion("unsafe", 4, 0, "filter") if "secret" in text else Completion("safe", 4)

    guard = HumanApproval(Scripted(lambda q: "the secret" if q.chat[-1].text == "tell" else "tea"), str(tmp_path), 0.0, Scripted(reads))
    plain, by_request, by_answer = guard.generate([Query(user(text)) for text in ("tea?", "a secret?", "tell")])

    assert plain == Completion("tea", extra_tokens=8) and by_request.finish == by_answer.finish == "filter"
    assert sorted(held.reason for held in approvals.waiting(tmp_path)) == [
        "answer: scripted calls it unsafe with probability 1.00",
        "request: scripted calls it unsafe with probability 1.00",
    ]
    talk = (Message("user", "a secret?"), Message("assistant", "Yes?"), Message("user", "go on"))
    assert guard.generate([Query(talk)])[0].finish == "filter"  # an earlier turn is the request's too


def test_a_broken_character_can_be_held(tmp_path: Path) -> None:
    (answer,) = HumanApproval(Scripted(lambda _: "x\ud800"), str(tmp_path), 0.0).generate([Query(user("\ud800"))])

    assert answer.finish == "filter" and approvals.waiting(tmp_path)[0].answer == "x\\ud800"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file cannot be written: .*; give another folder"):
        HumanApproval(echo(), str(tmp_path / "file"), 0.0).generate([ASKED])


# ---- deciding -------------------------------------------------------------------------------------------------------


def held(folder: Path, *texts: str) -> list[str]:
    return [h.id for h in approvals.hold(folder, [("t", user(text), f"re {text}", "why") for text in texts])]


def test_nobody_decides_twice(tmp_path: Path) -> None:
    (key,) = held(tmp_path, "one")
    approvals.decide(tmp_path, key, "denied", "ada")

    for decision in ("approved", "denied"):
        with pytest.raises(UsageError, match=rf"'{key}' was denied by ada at 20.*Z; a decision stands"):
            approvals.decide(tmp_path, key, decision, "ben")  # type: ignore[arg-type]
    assert approvals.read(tmp_path, key).by == "ada" and run("approve", tmp_path, key).exit_code != 0


def test_of_many_who_decide_at_once_one_does(tmp_path: Path) -> None:
    (key,) = held(tmp_path, "one")
    start, won = threading.Barrier(8), []

    def decide(name: str) -> None:
        start.wait()
        with suppress(UsageError):
            won.append(approvals.decide(tmp_path, key, "approved", name).by)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decide, "abcdefgh"))
    assert won == [approvals.read(tmp_path, key).by]


def test_an_unknown_id_and_a_missing_folder_are_errors_that_say_so(tmp_path: Path) -> None:
    (key,) = held(tmp_path, "one")
    for wrong in (key[:-1] + "?", "../x", "", ".lock"):
        with pytest.raises(UsageError, match="no held answer"):
            approvals.decide(tmp_path, wrong, "approved", "ada")
    with pytest.raises(UsageError, match=f"closest: '{key}'; list: saddlepoint approvals list"):
        approvals.read(tmp_path, key[:-1])
    with pytest.raises(UsageError, match="there is no folder"):
        approvals.waiting(tmp_path / "none")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UsageError, match=r"mine\.json is no held answer"):
        approvals.waiting(tmp_path)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_list_shows_what_waits_first(tmp_path: Path) -> None:
    done, waits = held(tmp_path, "one", "two [bold]")
    assert run("deny", tmp_path, done, "--by", "ada").exit_code == 0

    found: Sequence[dict[str, Any]] = json.loads(run("list", tmp_path, "--json").stdout)
    assert [(row["id"], row["decision"], row["by"]) for row in found] == [(waits, "", ""), (done, "denied", "ada")]
    assert waits in run("list", tmp_path).stdout


def test_show_gives_all_of_one_and_nothing_that_steers_the_terminal(tmp_path: Path) -> None:
    (one,) = approvals.hold(tmp_path, [("organism", user("How?", "Be brief."), "ok\x1b[2J\u202e done", "why")])
    said = run("show", tmp_path, one.id).stdout

    assert all(part in said for part in ("waits for a decision", "target: organism", "system: Be brief.", "user: How?", "why"))
    assert "ok\\x1b[2J\\u202e done" in said and "\x1b" not in said and "\u202e" not in said
    assert json.loads(run("show", tmp_path, one.id, "--json").stdout)["answer"] == one.answer


def test_without_a_name_the_user_of_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "grace")
    (key,) = held(tmp_path, "one")

    assert " by grace at " in run("approve", tmp_path, key).stdout
