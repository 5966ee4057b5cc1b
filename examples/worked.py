"""What the worked examples share: tune a model over the protocol, ask models, and compare them on the same validation items.

Everything here is the official client (`pip install openai`) against a running `saddlepoint serve`; only the intervals come from Saddlepoint.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from saddlepoint.metrics import difference, rate

DATA = Path(__file__).parent / "data"
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a model answered, and how many tokens its prompt had."""

    text: str
    prompt_tokens: int


Ask = Callable[[str, Sequence[Chat]], list[Answer]]
"""Asks a model, by its name, each chat; greedily."""


@dataclass(frozen=True)
class Example:
    """A worked example.

    Args:
        name: Of its files in `data/`.
        hyperparameters: As on the wire; chosen on a part of the training data.
        max_tokens: Longest answer.
        long: The prompt that makes the base do it: the messages before the item's.
        short: The same of the tuned model, as in the training file.
        judges: For each measure its name and, for every answer to a validation item, whether it holds. The first one decides.
    """

    name: str
    hyperparameters: Mapping[str, Any]
    max_tokens: int
    long: Chat
    short: Chat
    judges: Callable[[Ask, str, Sequence[Mapping[str, Any]], Sequence[str]], dict[str, list[bool]]]


def lines(name: str) -> list[dict[str, Any]]:
    """The objects of a file in `data/`."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def measured(example: Example, ask: Ask, base: str, tuned: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ask the base with the long and with the short prompt, and the tuned model with the short one, the same items; compare."""
    asked = [("base, long prompt", base, example.long), ("base, short prompt", base, example.short)]
    asked += [("tuned, short prompt", tuned, example.short)] if tuned else []
    found: dict[str, Any] = {}
    for name, model, prompt in asked:
        answers = ask(model, [[*prompt, item["messages"][-2]] for item in items])
        held = example.judges(ask, base, items, [answer.text for answer in answers])
        found[name] = {"held": held, "tokens": sum(a.prompt_tokens for a in answers) / len(answers), "answers": [a.text for a in answers]}
    return found


def shown(found: Mapping[str, Any]) -> str:
    """The rates with n and 95% intervals, the paired changes, and by how much the prompt became shorter."""
    out = []
    for name, row in found.items():
        out.append(f"{name}: {row['tokens']:.0f} tokens of prompt")
        out += [f"    {measure}: {rate(held)}" for measure, held in row["held"].items()]
    if "tuned, short prompt" in found:
        tuned = found["tuned, short prompt"]
        for other in ("base, long prompt", "base, short prompt"):
            for measure, held in tuned["held"].items():
                before = found[other]["held"][measure]
                change = difference({str(i): x for i, x in enumerate(before)}, {str(i): x for i, x in enumerate(held)})
                out.append(
                    f"tuned against {other}, {measure}: {change.value:+.0%} [{change.low:+.0%}, {change.high:+.0%}] n={change.n}, paired"
                )
        out.append(f"prompt shortened by {1 - tuned['tokens'] / found['base, long prompt']['tokens']:.1%}")
    return "\n".join(out)


# ---- over the protocol


def main(example: Example) -> None:
    """Tune on a running server, or take a model that was, and measure."""
    flags = argparse.ArgumentParser(description="Tune on a running `saddlepoint serve --target smollm2-135m-instruct`, and measure.")
    flags.add_argument("--url", default="http://127.0.0.1:8000/v1")
    flags.add_argument("--key", default="none")
    flags.add_argument("--base", default="smollm2-135m-instruct")
    flags.add_argument("--model", default="", help="A model that was tuned before; a new one is tuned if not given.")
    flags.add_argument("--out", type=Path, help="Where to write the answers and measures as JSON.")
    given = flags.parse_args()
    with OpenAI(base_url=given.url, api_key=given.key, timeout=600) as client:
        tuned = given.model or tune(client, example, given.base)
        found = measured(example, over(client, example.max_tokens), given.base, tuned, lines(f"{example.name}.validation.jsonl"))
    print(shown(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def over(client: OpenAI, max_tokens: int) -> Ask:
    """Asks a server, 16 chats at once."""

    def ask(model: str, chats: Sequence[Chat]) -> list[Answer]:
        def one(chat: Chat) -> Answer:
            made = client.chat.completions.create(model=model, messages=chat, temperature=0, max_tokens=max_tokens)  # type: ignore[arg-type]
            return Answer(made.choices[0].message.content or "", made.usage.prompt_tokens if made.usage else 0)

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(one, chats))

    return ask


def tune(client: OpenAI, example: Example, base: str) -> str:
    """Upload both files, run a job, tell what it tells; the tuned model's name."""
    files = {}
    for split in ("train", "validation"):
        with (DATA / f"{example.name}.{split}.jsonl").open("rb") as file:
            files[split] = client.files.create(file=file, purpose="fine-tune").id
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": dict(example.hyperparameters)}}
    job = client.fine_tuning.jobs.create(
        model=base, training_file=files["train"], validation_file=files["validation"], method=method, suffix=example.name, seed=0
    )
    told: set[str] = set()
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(2)
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(list(client.fine_tuning.jobs.list_events(job.id, limit=100))):
            if event.id not in told:
                told.add(event.id)
                print(event.message, flush=True)
    if not job.fine_tuned_model:
        raise SystemExit(f"the job {job.status}: {job.error and job.error.message}")
    return job.fine_tuned_model
