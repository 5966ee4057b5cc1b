"""The worked examples: their data is right, nothing leaks, their measures tell right from wrong, and they really train."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1] / "examples"
NAMES = ("headlines", "sarcasm")
pytest.importorskip("openai"), pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The scripts can be imported."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def rows(name: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "data" / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def questions(name: str, split: str) -> list[str]:
    return [row["messages"][1]["content"] for row in rows(name, split)]


def answers(name: str, split: str) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows(name, split)]


# ---- the data


@pytest.mark.parametrize(("name", "train", "validation"), [("headlines", 100, 30), ("sarcasm", 60, 25)])
def test_the_data_passes_the_check(name: str, train: int, validation: int) -> None:
    from saddlepoint.finetuning.data import check

    for split, least in (("train", train), ("validation", validation)):
        found = check((ROOT / "data" / f"{name}.{split}.jsonl").read_bytes(), least=least)
        assert found.format == "chat" and not found.mistakes and {w.code for w in found.warnings} <= {"few_examples"}
        assert all(record.learned == (False, False, True) for record in found.records)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_finds_nothing_wrong_and_no_leak(name: str) -> None:
    from saddlepoint.cli import app

    files = [str(ROOT / "data" / f"{name}.{split}.jsonl") for split in ("train", "validation")]
    done = CliRunner().invoke(app, ["finetune", "check", files[0], "--validation", files[1], "--base", ""])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_validation_is_in_the_training(name: str) -> None:
    from saddlepoint.finetuning.data import check
    from saddlepoint.finetuning.overlap import duplicates, leaks

    training, validation = (check((ROOT / "data" / f"{name}.{split}.jsonl").read_bytes()).records for split in ("train", "validation"))
    assert leaks(training, validation) == () and duplicates(training) == duplicates(validation) == ()


def test_the_facts_of_the_training_are_not_asked_again() -> None:
    facts = rows("sarcasm", "facts")
    assert [fact["question"] for fact in facts] == questions("sarcasm", "train") + questions("sarcasm", "validation")
    named = {split: {f["key"][0] for f in facts if f["split"] == split and not f["key"][0].isdigit()} for split in ("train", "validation")}
    numbers = {"seven", "eight", "four", "two", "five", "zero"}
    assert named["train"] & named["validation"] - numbers <= {"green"}  # one color answers two questions


def test_no_name_or_place_of_a_headline_is_in_two_splits() -> None:
    split = {which: [json.loads(answer) for answer in answers("headlines", which)] for which in ("train", "validation")}
    for field in ("who", "place"):
        train, validation = ({one[field] for one in made} - {None} for made in split.values())
        assert train & validation <= {"Council", "Parliament"}


# ---- the measures


def test_every_headline_answer_is_of_the_schema() -> None:
    import headlines

    for which in ("train", "validation"):
        for headline, answer in zip(questions("headlines", which), answers("headlines", which), strict=True):
            made = headlines.valid(answer)
            assert made is not None and made["place"] in headline and (made["who"] is None or made["who"] in headline)
            assert made["number"] is None or str(made["number"]) in headline
    assert {json.loads(answer)["topic"] for answer in answers("headlines", "validation")} == set(headlines.TOPICS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"topic": "sports", "who": null, "place": "X"}',
        '{"topic": "sports", "who": null, "place": "X", "number": null, "more": 1}',
        '{"who": null, "topic": "sports", "place": "X", "number": null}',
        '{"topic": "travel", "who": null, "place": "X", "number": null}',
        '{"topic": "sports", "who": null, "place": null, "number": null}',
        '{"topic": "sports", "who": null, "place": "X", "number": "3"}',
        '{"topic": "sports", "who": null, "place": "X", "number": true}',
        '{"topic": "sports", "who": null, "place": "X", "number": null} and',
        '```json\n{"topic": "sports", "who": null, "place": "X", "number": null}\n```',
    ],
)
def test_what_is_not_of_the_schema_is_not_valid(text: str) -> None:
    import headlines

    assert headlines.valid(text) is None


def test_a_fact_is_stated_as_a_whole() -> None:
    import sarcasm

    assert sarcasm.stated("There are 100 cents.", ["100", "hundred"]) and sarcasm.stated("Butterflies!", ["butterfl"])
    assert (
        not sarcasm.stated("There are 1000.", ["100"]) and not sarcasm.stated("In comparison", ["Paris"]) and not sarcasm.stated("", ["a"])
    )
    facts = {fact["question"]: fact["key"] for fact in rows("sarcasm", "facts")}
    for which in ("train", "validation"):
        for question, answer in zip(questions("sarcasm", which), answers("sarcasm", which), strict=True):
            assert sarcasm.stated(answer, facts[question]), question


def test_the_style_is_told_from_plain_answers_that_it_has_not_seen() -> None:
    """Of the validation file's answers, which neither the classifier nor the tuned model was trained on."""
    import sarcasm
    import worked

    def plainly(model: str, chats: Sequence[Any]) -> list[worked.Answer]:
        facts = {fact["question"]: fact["plain"] for fact in worked.lines("sarcasm.facts.jsonl")}
        return [worked.Answer(facts[chat[-1]["content"]], 1) for chat in chats]

    items = worked.lines("sarcasm.validation.jsonl")
    told = sarcasm.judges(plainly, "base", items, answers("sarcasm", "validation"))
    plain = plainly("base", [[item["messages"][1]] for item in items])
    stated = sarcasm.judges(plainly, "base", items, [answer.text for answer in plain])
    assert all(told["factual"]) and all(stated["factual"])
    assert sum(told["sarcastic"]) >= 27 and sum(stated["sarcastic"]) <= 1  # of 30


def test_long_prompts_hold_nothing_of_the_validation() -> None:
    import headlines
    import sarcasm

    for module in (headlines, sarcasm):
        said = json.dumps(module.EXAMPLE.long)
        assert not [q for q in questions(module.EXAMPLE.name, "validation") if q in said]
        assert [turn["role"] for turn in module.EXAMPLE.long] == ["system", *["user", "assistant"] * module.SHOTS]
        assert all(row["messages"][:1] == module.EXAMPLE.short for row in rows(module.EXAMPLE.name, "train"))


def test_the_report_compares_item_by_item() -> None:
    import worked

    held = {
        "base, long prompt": [True, False, True, False],
        "base, short prompt": [False] * 4,
        "tuned, short prompt": [True, True, True, False],
    }
    tokens = {"base, long prompt": 500.0, "base, short prompt": 40.0, "tuned, short prompt": 40.0}
    said = worked.shown({name: {"held": {"right": held[name]}, "tokens": tokens[name]} for name in held})
    assert "right: 75% [30%, 95%] n=4" in said and "tuned against base, long prompt, right: +25%" in said
    assert "prompt shortened by 92.0%" in said


def test_a_script_tunes_and_measures_on_a_running_service(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user runs it, but for the model, which is random and small, and so for the long prompt and most of the epochs."""
    pytest.importorskip("fastapi"), pytest.importorskip("peft")
    import headlines
    import worked

    command = [sys.executable, "-m", "saddlepoint", "serve", "--target", str(tiny_folder), "--model", "tiny", "--defense", "", "--no-key"]
    command += ["--port", "0", "--gate", "off", "--state", str(tmp_path / "state")]
    with (tmp_path / "log").open("w") as log:
        runs = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert runs.stdout
        found = re.match(r"(http://\S+/v1) serves 'tiny'", runs.stdout.readline())
        assert found, (tmp_path / "log").read_text()
        small = replace(headlines.EXAMPLE, long=headlines.EXAMPLE.short, hyperparameters={"n_epochs": 1, "batch_size": 16})
        flags = ["headlines.py", "--url", found[1], "--base", "tiny", "--out", str(tmp_path / "out.json")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", flags)
            worked.main(small)
        said = capsys.readouterr().out
        assert "Step 7/7: training loss=" in said and "New fine-tuned model created: ft:tiny:local:headlines:" in said
        assert "prompt shortened by 0.0%" in said  # the prompts are equal here
        measured = json.loads((tmp_path / "out.json").read_text())
        assert measured["tuned, short prompt"]["answers"] != measured["base, short prompt"]["answers"]
        assert all(len(row["answers"]) == 36 and row["tokens"] > 10 for row in measured.values())
    finally:
        runs.terminate()
        runs.communicate(timeout=30)


@pytest.mark.slow  # a training of a minute of processor time
def test_the_headlines_really_train(tmp_path: Path) -> None:
    """On the embedded base, as the script has it but in process: the answers to headlines that it has not seen are valid JSON."""
    pytest.importorskip("peft")
    import headlines
    import worked

    from saddlepoint import models
    from saddlepoint.errors import ModelError
    from saddlepoint.finetuning.data import check
    from saddlepoint.finetuning.plan import Spec, resolved
    from saddlepoint.finetuning.train import train
    from saddlepoint.targets.hf import HF
    from saddlepoint.types import Message, Query, Sampling

    base = "smollm2-135m-instruct"
    try:
        models.pull(base)
    except ModelError as wrong:
        pytest.skip(f"the base cannot be had: {wrong}")
    training = check((ROOT / "data" / "headlines.train.jsonl").read_bytes()).records
    done = train(Spec(base, **resolved("supervised", headlines.EXAMPLE.hyperparameters, len(training))), training, (), tmp_path / "out")
    assert done

    def ask(model: str, chats: Sequence[Any]) -> list[worked.Answer]:
        queries = [Query(tuple(Message(t["role"], t["content"]) for t in chat), Sampling(headlines.EXAMPLE.max_tokens)) for chat in chats]
        return [worked.Answer(answer.text, answer.prompt_tokens) for answer in HF.load(model).generate(queries)]

    items = worked.lines("headlines.validation.jsonl")
    found = worked.measured(headlines.EXAMPLE, ask, base, str(done.folder), items)
    rates = {name: {measure: sum(held) / len(held) for measure, held in row["held"].items()} for name, row in found.items()}
    assert rates["tuned, short prompt"]["valid JSON with the exact fields"] >= 0.95 > 0.05 > rates["base, short prompt"]["all fields right"]
    assert rates["tuned, short prompt"]["all fields right"] > rates["base, long prompt"]["all fields right"] + 0.2
    assert found["tuned, short prompt"]["tokens"] < 0.1 * found["base, long prompt"]["tokens"]
