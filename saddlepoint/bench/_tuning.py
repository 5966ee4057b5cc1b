"""Our own training in a process of its own, stepped like `_trl`: one step for each line on standard input, one JSON line about it on
standard output. It is what the service runs: states and checkpoints are written, and that counts."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from saddlepoint.finetuning.data import Record
from saddlepoint.types import Message


def as_record(line: int, chat: list[dict[str, str]]) -> Record:
    """A chat of which the last answer is trained on."""
    messages = tuple(Message(m["role"], m["content"]) for m in chat)  # type: ignore[arg-type]
    return Record(line, messages, (False,) * (len(messages) - 1) + (True,))


def main(given: dict[str, Any]) -> None:
    import torch

    from saddlepoint.finetuning import train as engine

    torch.set_num_threads(given["threads"])
    records = [as_record(line, chat) for line, chat in enumerate(given["chats"], 1)]
    spec = engine.Spec(given["base"], epochs=given["epochs"], batch=given["batch"], seed=given["seed"])
    began = cpu = 0.0

    def turn() -> None:
        nonlocal began, cpu
        if not sys.stdin.readline().strip():
            raise SystemExit
        began, cpu = time.perf_counter(), time.process_time()

    def tell(event: engine.Event) -> None:
        if isinstance(event, engine.Step):
            epoch, at = divmod(event.step - 1, -(-len(records) // spec.batch))
            batch = engine.order(spec, epoch, len(records))[at * spec.batch : (at + 1) * spec.batch]
            spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
            print(json.dumps({**spent, "tokens": sum(given["lengths"][i] for i in batch), "loss": event.train_loss}), flush=True)
            if event.step < event.steps:
                turn()  # writing the state and the checkpoint of this step counts to the next

    print(json.dumps({"ready": True}), flush=True)
    turn()  # loading the base counts to the first step, which is not counted
    result = engine.train(spec, records, [], Path(given["out"]), tell)
    print(json.dumps({"done": str(result.folder) if result else ""}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
