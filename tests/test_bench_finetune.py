"""The bench beside trl on a tiny model: every tool takes every step on the same tokens, and the numbers add up."""

from pathlib import Path

import pytest

pytest.importorskip("torch"), pytest.importorskip("trl")

from saddlepoint.bench import finetune as bench  # noqa: E402
from saddlepoint.errors import UsageError  # noqa: E402


def test_every_tool_takes_the_same_steps_on_the_same_tokens(tiny_folder: Path) -> None:
    said: list[str] = []
    settings = bench.Settings(str(tiny_folder), n=10, batch=4, epochs=2, seeds=(0,), threads=1)
    found = bench.bench(settings, said.append)
    assert list(bench.TOOLS) == list(found["tools"])
    read = {name: sum(tool["runs"][0]["tokens"]) for name, tool in found["tools"].items()}
    for tool in found["tools"].values():
        (run,) = tool["runs"]
        assert tool["updates"] == [6] and len(run["losses"]) == 6 == len(run["seconds"]) + 1 == len(run["cpu"]) + 1
        assert run["held_out"] < found["held_out_before"]
    # The first step is not counted, and what it reads depends on the order; the epochs are the same.
    assert all(found["settings"]["tokens"] < tokens < 2 * found["settings"]["tokens"] for tokens in read.values())
    assert found["tools"]["saddlepoint"]["padding"] == 0 <= found["tools"]["trl"]["padding"]
    ratio = found["ratio"]["trl"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"] and ratio["n"] == 5
    assert all(name in bench.table(found) and name in bench.page(found) for name in bench.TOOLS)
    assert any("step 6 of 6" in line for line in said)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "How %d?"}, {"role": "assistant", "content": "So."}]}\n'
    (tmp_path / "own.jsonl").write_text("".join(line % i for i in range(20)))
    train_on, held_out = bench.chats(bench.Settings(data=str(tmp_path / "own.jsonl")))
    assert (16, 3) == (len(train_on), len(held_out))
    assert not {str(chat) for chat in train_on} & {str(chat) for chat in held_out}
    (tmp_path / "own.jsonl").write_text("{")
    with pytest.raises(UsageError, match="mistakes; see: saddlepoint finetune check"):
        bench.chats(bench.Settings(data=str(tmp_path / "own.jsonl")))
