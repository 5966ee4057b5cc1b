"""A model that learns: what of it is trained, as it is and as it was, and how its two or more cores are kept busy."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from saddlepoint.errors import UsageError
from saddlepoint.finetuning.fused import fuse
from saddlepoint.finetuning.packed import packs
from saddlepoint.finetuning.plan import ALPHA, RANK, Spec
from saddlepoint.targets._lora import WEIGHTS
from saddlepoint.targets.hf import HF

T = TypeVar("T")


@dataclass
class Learner:
    """A model that learns.

    Args:
        wrapped: The peft model around it; None where every weight is trained.
        working: The weights that are multiplied, in the model's dtype; AdamW works on float32 masters, because a small step is lost
            in bfloat16.
        began: Copies of them as the training began; made where a loss asks the model as it was.
        streams: How many parts are computed side by side: on a processor two cores do more with a part each than with one together.
    """

    model: HF
    wrapped: Any
    working: list[Tensor]
    began: list[Tensor]
    streams: int

    @torch.no_grad()
    def take(self, weights: Tensor) -> None:
        """Work with these masters, float32 (parameters,)."""
        for p, own in zip(self.working, torch.split(weights, [p.numel() for p in self.working]), strict=True):
            p.copy_(own.view_as(p))

    @contextmanager
    def as_it_began(self, weights: Tensor) -> Iterator[None]:
        """While it is open, the model is the one that the training began with; `weights` are the masters of afterwards."""
        with torch.no_grad():
            for p, first in zip(self.working, self.began, strict=True):
                p.copy_(first)
        try:
            yield
        finally:
            self.take(weights)

    def side_by_side(self, jobs: Sequence[Callable[[], T]], check: Callable[[], None]) -> Iterator[T]:
        """What the jobs give, in order; before each is begun, and ten times a second while they are waited for, `check` may end it all."""
        if self.streams == 1 or len(jobs) == 1:
            for job in jobs:
                check()
                yield job()
            return
        each = max(1, torch.get_num_threads() // self.streams)
        with ThreadPoolExecutor(self.streams, initializer=lambda: torch.set_num_threads(each)) as pool:
            waiting = [pool.submit(job) for job in jobs]
            try:
                for future in waiting:
                    check()
                    while not wait([future], 0.1).done:
                        check()
                    yield future.result()
            finally:
                for future in waiting:
                    future.cancel()


def learner(model: HF, spec: Spec) -> Learner:
    """The model with a new adapter, with the one to go on from, or with every weight free."""
    wrapped: Any = None
    if spec.full and spec.start:
        raise UsageError("full training goes on from a model, not from an adapter; give the model as base, or train a LoRA")
    if spec.full:
        model.model.requires_grad_(True)
    elif spec.start:
        try:
            wrapped = PeftModel.from_pretrained(model.model, going_on(spec.start), is_trainable=True, autocast_adapter_dtype=False)
        except (RuntimeError, ValueError) as wrong:
            raise UsageError(f"the adapter {spec.start} does not fit '{spec.base}': {str(wrong).splitlines()[0]}") from wrong
    else:
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            how = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            wrapped = get_peft_model(model.model, how, autocast_adapter_dtype=False)
    model.model.eval()  # no dropout: nothing is drawn
    packs(model)
    if wrapped is not None:
        fuse(wrapped)
    working = [p for p in (wrapped or model.model).parameters() if p.requires_grad]
    asks = spec.constraint or spec.method == "dpo"
    streams = min(8, torch.get_num_threads()) if model.device.type == "cpu" else 1
    return Learner(model, wrapped, working, [p.detach().clone() for p in working] if asks else [], streams)


def going_on(start: str) -> str:
    """The folder of an adapter to go on from.

    Raises:
        UsageError: It holds none in safetensors; peft would go on to unpickle a .bin, or ask the hub.
    """
    if not (Path(start) / WEIGHTS).is_file():
        raise UsageError(f"{start} holds no {WEIGHTS}, so it is no adapter to go on from")
    return start
