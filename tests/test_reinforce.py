"""Reinforcement by a grader: it raises the reward, it goes on exactly, and what cannot be graded is said."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("trl"), pytest.importorskip("rapidfuzz"), pytest.importorskip("fsspec")
# ruff: noqa: E402
import torch
from safetensors.torch import load_file
from service_place import TRAINER, Place, jsonl, placed

from saddlepoint.errors import TrainingError, UsageError
from saddlepoint.finetuning import reinforce
from saddlepoint.finetuning.data import Record, check
from saddlepoint.finetuning.plan import Note, Saved, Spec, Step
from saddlepoint.service.records import Job
from saddlepoint.service.rows import fresh
from saddlepoint.types import user

if TYPE_CHECKING:
    from saddlepoint.finetuning.plan import Event

QUESTIONS = ["How do I make tea?", "What is the weather like?", "Is the wind strong?", "Where is the cup?", "Who are you?"]
LETTERS = {"type": "text_similarity", "name": "letters", "input": "{{sample.output_text}}", "reference": "{{item.wanted}}", "evaluation_metric": "fuzzy_match"}  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce, "MAX_TOKENS", 8)


def records(n: int = 5, **more: Any) -> tuple[Record, ...]:
    more = {"wanted": "the cup, the cup, the cup", **more}
    lines = [{"messages": [{"role": "user", "content": f"{q} {i}"}], **more} for i, q in enumerate((QUESTIONS * 4)[:n])]
    found = check("\n".join(map(json.dumps, lines)).encode(), "reinforcement", least=1)
    assert not found.mistakes
    return found.records


def spec(folder: Path, **more: Any) -> Spec:
    return Spec(str(folder), method="reinforcement", **({"epochs": 2, "batch": 2, "grader": LETTERS} | more))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_training_goes_on_exactly_from_wherever_it_was_broken_off(tiny_folder: Path, tmp_path: Path) -> None:
    whole: list[Event] = []
    done = reinforce.train(spec(tiny_folder), records(), records(2), tmp_path / "whole", whole.append)
    assert done and done.steps == 6 and [e.step for e in whole if isinstance(e, Saved)] == [3, 6]
    (note,) = [e for e in whole if isinstance(e, Note)]
    assert note.data and note.data["tokens"]["n"] == 5 and note.data["trained_tokens"]["total"] == 0 and "trained on" not in note.message
    steps = [e for e in whole if isinstance(e, Step)]
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6] and {s.steps for s in steps} == {6}
    assert all(0 < s.train_accuracy < 1 for s in steps) and [s.full_valid_accuracy is not None for s in steps] == [False, False, True] * 2

    told: list[Event] = []
    asked, found = 0, None
    for last in (7, 60, 25, 10**6):  # broken off in the first update, and in two later ones
        asked = 0

        def stop(last: int = last) -> bool:
            nonlocal asked
            asked += 1
            return asked > last

        found = reinforce.train(spec(tiny_folder), records(), records(2), tmp_path / "parts", told.append, stop)
        assert (found is None) == (last < 10**6)
    assert found and found.csv == done.csv and found.trained_tokens == done.trained_tokens
    assert {e.step: e for e in told if isinstance(e, Step)} == {e.step: e for e in steps}
    ours, theirs = weights(found.folder), weights(done.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = reinforce.train(spec(tiny_folder), records(), records(2), tmp_path / "parts")  # one that is done is done
    assert again == found
    with pytest.raises(TrainingError, match="a training with other examples"):
        reinforce.train(spec(tiny_folder, seed=1), records(), records(2), tmp_path / "parts")


def test_the_reward_rises(tiny_folder: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    marks = {"type": "string_check", "name": "t", "input": "{{sample.output_text}}", "reference": "t", "operation": "like"}
    learn = spec(tiny_folder, epochs=8, batch=4, grader=marks, lr_multiplier=30.0)
    reinforce.train(learn, records(8), (), tmp_path / "out", lambda e: steps.append(e) if isinstance(e, Step) else None)
    rewards = [s.train_accuracy for s in steps]
    assert len(rewards) == 16 and sum(rewards[:4]) < 2.5 and sum(rewards[-4:]) > 3.5


def test_an_adapter_is_gone_on_from(tiny_folder: Path, tmp_path: Path) -> None:
    first = reinforce.train(spec(tiny_folder, epochs=1), records(2), (), tmp_path / "first")
    assert first
    more = reinforce.train(spec(tiny_folder, epochs=1, start=str(first.folder)), records(2), (), tmp_path / "more")
    assert more and weights(more.folder).keys() == weights(first.folder).keys()
    assert sorted(p.name for p in more.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "card.json"]
    with pytest.raises(UsageError, match=r"holds no adapter_model\.safetensors"):
        reinforce.train(spec(tiny_folder, start=str(tmp_path)), records(2), (), tmp_path / "none")


def test_the_base_grades_with_the_weights_that_it_had(tiny_folder: Path, tmp_path: Path) -> None:
    """A grader that asks the base is asked the model without what it has learned: the same answer to the same question, always."""
    asked = {"type": "score_model", "name": "s", "model": str(tiny_folder), "input": [{"role": "user", "content": "How good is tea?"}]}
    steps: list[Step] = []
    note = lambda e: steps.append(e) if isinstance(e, Step) else None
    reinforce.train(spec(tiny_folder, grader=asked, lr_multiplier=100.0), records(4), (), tmp_path / "out", note)
    assert len(steps) == 4 and len({s.train_accuracy for s in steps}) == 1 and 0 <= steps[0].train_accuracy <= 1


def test_what_cannot_be_graded_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    broken = {"type": "multi", "name": "m", "graders": {"a": LETTERS}, "calculate_output": "1 / (a - a)"}
    for grader, lines, said in [
        (LETTERS, records(2) + check(b'{"messages": [{"role": "user", "content": "Hi"}], "more": 1}', "reinforcement", 1).records, "line 1: there is no item.wanted"),
        (broken, records(2), "the grader could grade no answer of an update"),
    ]:  # fmt: skip
        with pytest.raises(TrainingError, match=said):
            reinforce.train(spec(tiny_folder, grader=grader), lines, (), tmp_path / "out")
    with pytest.raises(TrainingError, match="line 2 of the validation examples: there is no item.wanted"):
        reinforce.train(spec(tiny_folder), records(2), [Record(2, user("Hi"), (False,), item={"more": 1})], tmp_path / "out")
    with pytest.raises(UsageError, match="python graders"):
        reinforce.train(spec(tiny_folder, grader={"type": "python", "source": "1", "name": "p"}), records(2), (), tmp_path / "out")
    with pytest.raises(UsageError, match="no items were given"):
        reinforce.train(spec(tiny_folder), (), (), tmp_path / "out")


# ---- as a job


@pytest.fixture
def place(tiny_folder: Path, tmp_path: Path) -> Iterator[Place]:
    """A service with a worker."""
    with placed(tmp_path / "service", tiny_folder) as made:
        worker = made.worker()
        yield made
        worker.stdin.close()  # type: ignore[union-attr]


def begun(place: Place, file: str, epochs: int) -> Job:
    """A job whose grader asks the base."""
    judge = {"type": "score_model", "name": "j", "model": "tiny", "input": [{"role": "user", "content": "Score {{sample.output_text}}"}]}
    grader = {"type": "multi", "name": "m", "graders": {"near": LETTERS, "liked": judge}, "calculate_output": "near + liked / 10"}
    chosen = {"n_epochs": epochs, "batch_size": 2, "learning_rate_multiplier": "auto"}
    asked = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": chosen}}
    name = f"ft:tiny:local::{fresh('', 8)}"
    return place.state.create(Job(fresh("ftjob-"), "me", int(time.time()), "tiny", "tiny", name, file, asked, chosen, 7))


def items() -> bytes:
    return jsonl([{"messages": [{"role": "user", "content": f"{q} {i}"}], "wanted": "tea and a cup"} for i, q in enumerate(QUESTIONS * 2)])


def test_a_job_learns_by_a_grader(place: Place) -> None:
    job = begun(place, place.file(items()), 1)
    done = place.ended(job)
    assert done.status == "succeeded" and done.fine_tuned_model == job.name, place.messages(job)
    steps = place.steps(job)
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5] and all(0 < s["train_reward_mean"] < 1.2 for s in steps)
    assert [m for m in place.messages(job) if m.startswith("Step 5/5: training reward=")]
    assert [c.step for c in place.state.checkpoints(job.id)] == [5] and len(place.result(job)) == 5


@pytest.mark.slow  # three processes that load torch and trl
def test_a_job_survives_kill_9(place: Place, tmp_path: Path) -> None:
    """Of two equal jobs one loses its trainer in the middle; both tell the same rewards and end with the same weights."""
    file = place.file(items())
    jobs = [begun(place, file, 2) for _ in range(2)]
    place.ended(jobs[0])
    place.until(lambda: len(place.steps(jobs[1])) >= 4)
    for pid in place.running(TRAINER):
        os.kill(pid, signal.SIGKILL)
    assert [place.ended(job).status for job in jobs] == ["succeeded"] * 2
    assert place.steps(jobs[0]) == place.steps(jobs[1]) and len(place.steps(jobs[0])) == 10
    found = []
    for job in jobs:
        model = place.state.model(job.name)
        assert model
        place.blobs.fetch(model.manifest, tmp_path / job.id)
        found.append(weights(tmp_path / job.id))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
