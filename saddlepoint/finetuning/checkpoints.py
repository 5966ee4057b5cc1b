"""What a training needs to go on, in one safetensors file that is there whole or not at all; nothing is pickled.

Beside it stand the training's last checkpoints, in folders `checkpoint-STEP`.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saddlepoint.errors import TrainingError
from saddlepoint.finetuning.plan import Step

KEPT = 3  # checkpoints of a training


@dataclass
class State:
    """Where a training stands, between two of its steps.

    Args:
        step: How many updates were made.
        told: The steps whose numbers are known, in order.
        pending: Loss and accuracy of the last update, while its validation is still to come.
        weights, first, second: float32 (parameters,): the trained weights behind one another, and AdamW's moments.
    """

    weights: Tensor
    first: Tensor
    second: Tensor
    step: int = 0
    told: list[Step] = field(default_factory=list)
    pending: tuple[float, float] | None = None


def save(state: State, folder: Path, run: str) -> None:
    """Replace the state in `folder`.

    Args:
        run: Names the training, so that another one does not go on from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {"run": run, "step": state.step, "told": [asdict(s) for s in state.told], "pending": state.pending}
    partial = folder / f".partial-{os.getpid()}"
    tensors = {"weights": state.weights, "first": state.first, "second": state.second}
    save_file({name: x.detach().cpu() for name, x in tensors.items()}, partial, {"state": json.dumps(written)})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(folder / "state.safetensors")
    where = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(where)  # the new name, too, is on the disk
    finally:
        os.close(where)


def load(folder: Path, run: str, device: torch.device) -> State | None:
    """The state in `folder`; None where there is none.

    Raises:
        TrainingError: It is another training's.
    """
    for left in folder.glob(".partial-*"):  # of a process that was killed as it wrote
        left.unlink(missing_ok=True)
    if not (folder / "state.safetensors").is_file():
        return None
    with safe_open(folder / "state.safetensors", framework="pt", device=str(device)) as file:
        written = json.loads(file.metadata()["state"])
        weights, first, second = (file.get_tensor(name) for name in ("weights", "first", "second"))
    if written["run"] != run:
        raise TrainingError(
            f"{folder} holds the state of a training with other examples or settings; give each training a folder of its own"
        )
    pending = written["pending"] and (written["pending"][0], written["pending"][1])
    return State(weights, first, second, written["step"], [Step(**s) for s in written["told"]], pending)


def sweep(folder: Path) -> None:
    """Remove the checkpoints that were being written when a process was killed."""
    for left in folder.glob(".partial-*"):
        shutil.rmtree(left)


def keep_last(folder: Path) -> None:
    """Drop all but the last checkpoints."""
    for old in sorted(folder.glob("checkpoint-*"), key=lambda place: int(place.name.rpartition("-")[2]))[:-KEPT]:
        shutil.rmtree(old)
