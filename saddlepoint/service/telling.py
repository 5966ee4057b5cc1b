"""What a training tells, as the events and checkpoints of its job: in the words of OpenAI's service, and each once."""

import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from saddlepoint.finetuning.plan import Event, Note, Saved, Step
from saddlepoint.service.state import Lost
from saddlepoint.service.task import Task

MEASURED = 5  # steps by whose time a training's speed is told
_PARTS = {"train": "training", "valid": "validation", "full_valid": "full validation"}


class Teller:
    """Tells a job's events as the training makes them, how fast it goes on this machine, and when the job will be done.

    What comes after the training, such as the gate's comparison, is taken to last as long as it did for the last job on this base.
    """

    def __init__(self, task: Task):
        self.task = task
        self.after = task.state.afterwards(task.job.base)
        self.first: tuple[int, float] | None = None  # the first step that this process told, and when
        self.estimated = 0.0  # when that was last told
        self.rewards = task.job.method["type"] == "reinforcement"

    def __call__(self, event: Event) -> None:
        tell = self.task.tell
        if isinstance(event, Step):
            tell(said(event, self.rewards), type="metrics", data=numbers(event, self.rewards), key=f"step {event.step}")
            self._estimate(event)
        elif isinstance(event, Saved):
            manifest = self.task.blobs.put_folder(event.folder)
            self.task.state.checkpoint(
                self.task.job.id, event.step, numbers(event.metrics, self.rewards), manifest, worker=self.task.worker
            )
            self.task.blobs.put_folder(event.folder)  # the last other reference to one of them may have been deleted meanwhile
        elif isinstance(event, Note):
            tell(event.message, "warn" if event.warns else "info", data=event.data, key=event.message)

    def _estimate(self, step: Step) -> None:
        now = time.time()
        self.first = self.first or (step.step, now)
        done, left = step.step - self.first[0], step.steps - step.step
        if done and now - self.estimated > 5:
            each = (now - self.first[1]) / done
            self.estimated = now
            with suppress(Lost):  # the job was paused a moment ago; the training will be told to stop
                self.task.state.learned(self.task.job.id, self.task.worker, estimated_finish=round(now + each * left + self.after))
        if done == MEASURED:
            each = (now - self.first[1]) / done
            told = f"A step takes {each:.2g} s on this machine, so the {left} steps that are left take about {each * left:,.0f} s"
            self.task.tell(told, data={"seconds_per_step": each, "steps_left": left}, key="speed")


def said(step: Step, rewards: bool = False) -> str:
    """The message of a step: `Step 300/300: training loss=0.15, validation loss=0.27, full validation loss=0.40`.

    Args:
        rewards: Say the mean rewards of a training by reinforcement in place of the losses.
    """
    what, fields = ("reward", "accuracy") if rewards else ("loss", "loss")
    found = {name: getattr(step, f"{kind}_{fields}") for kind, name in _PARTS.items()}
    shown = ", ".join(f"{name} {what}={value:.2f}" for name, value in found.items() if value is not None)
    return f"Step {step.step}/{step.steps}: {shown}"


def numbers(step: Step, rewards: bool = False) -> dict[str, Any]:
    """The data of a step, under the protocol's names; what a training by reinforcement has for accuracies are mean rewards."""
    last = "reward_mean" if rewards else "mean_token_accuracy"
    names = {"steps": "total_steps"} | {f"{kind}_accuracy": f"{kind}_{last}" for kind in _PARTS}
    return {names.get(name, name): value for name, value in asdict(step).items() if value is not None}
