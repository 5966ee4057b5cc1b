"""What a training is told to do and what it tells, as records; no torch, so that whoever plans one need not load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saddlepoint.errors import UsageError
from saddlepoint.finetuning.data import epochs as epochs_of

Method = Literal["supervised", "dpo", "reinforcement"]
RANK, ALPHA = 16, 32  # of a LoRA, on every linear layer
LIMITS = {"n_epochs": (1, 50), "batch_size": (1, 256), "learning_rate_multiplier": (0.0, 1000.0), "beta": (0.0, 2.0)}


@dataclass(frozen=True)
class Spec:
    """One training.

    Args:
        base: A target's name: an embedded model, `organism`, `hf:ORG/NAME` or a folder.
        start: The folder of an adapter of that base to go on from; "" begins a new one.
        epochs: Passes over the examples, >= 1.
        batch: Examples per step, >= 1.
        lr_multiplier: Times the method's own learning rate, > 0.
        beta: Of dpo: how soon a pair counts as learned, in (0, 2].
        seed: Of the first weights and of the order of the examples.
        full: Train every weight in place of a LoRA.
        constraint: Hold the first tokens of answers near those of the model it began from: `first_token.first_token_constraint`.
        grader: Of reinforcement: what an answer is worth.
    """

    base: str
    start: str = ""
    method: Method = "supervised"
    epochs: int = 3
    batch: int = 16
    lr_multiplier: float = 1.0
    beta: float = 0.1
    seed: int = 0
    full: bool = False
    constraint: bool = False
    grader: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """A step is done. Losses are in nats.

    Args:
        step, steps: From 1, and how many there are.
        train_loss: What the step minimized, over its batch, before its update: of supervised training the mean cross-entropy of
            the trained tokens, of dpo the mean of -log sigmoid(beta * margin).
        train_accuracy: Share in [0, 1] of the trained tokens that were the most likely ones; of dpo, of the pairs whose margin is positive.
        valid_loss, valid_accuracy: The same of a batch of the validation examples after the update; None where there are none.
        full_valid_loss, full_valid_accuracy: The same of all of them; at the ends of epochs only.
    """

    step: int
    steps: int
    train_loss: float
    train_accuracy: float
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_accuracy: float | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint stands in `folder`, whole: an adapter as peft writes it with a `card.json`, or, of full training, a model."""

    step: int
    folder: Path
    metrics: Step


@dataclass(frozen=True)
class Note:
    """Something that whoever started the training should read, such as how many examples were truncated.

    Args:
        data: The same for programs, as JSON values.
        warns: Whether it may not be what was wanted.
    """

    message: str
    data: Mapping[str, Any] | None = None
    warns: bool = True


Event = Step | Saved | Note


@dataclass(frozen=True)
class Result:
    """A training that came to its end.

    Args:
        trained_tokens: Tokens of all examples, prompts too, times epochs.
        steps: How many there were.
        csv: The result file: a line for each step under `step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy`.
        folder: The last checkpoint.
    """

    trained_tokens: int
    steps: int
    csv: str
    folder: Path


def resolved(method: Method, hyperparameters: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The fields of a `Spec` that hyperparameters as on the wire decide; "auto" or a missing one is decided here.

    Epochs follow the documented rule (`data.epochs`); a batch is a tenth of the examples, at most 16, so that even a small file
    makes some thirty steps; beta is 0.1.

    Args:
        n: Training examples.

    Raises:
        UsageError: A hyperparameter is unknown or out of its range.
    """
    given = {name: value for name, value in hyperparameters.items() if value not in (None, "auto")}
    names = {"n_epochs": "epochs", "batch_size": "batch", "learning_rate_multiplier": "lr_multiplier", "beta": "beta"}
    for name, value in given.items():
        if name not in names or (name == "beta" and method != "dpo"):
            allowed = [k for k in names if k != "beta" or method == "dpo"]
            raise UsageError(f"no hyperparameter '{name}' of {method}; allowed: {', '.join(allowed)}")
        low, high = LIMITS[name]
        whole = name in ("n_epochs", "batch_size")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not (low <= value <= high) or value <= 0:
            kind = f"a whole number in {low}..{high}" if whole else f"a number in ({low:g}, {high:g}]"
            raise UsageError(f"{name} must be 'auto' or {kind}; got {value!r}")
    auto = {"epochs": epochs_of(n), "batch": max(1, min(16, n // 10)), "lr_multiplier": 1.0, "beta": 0.1}
    return auto | {names[name]: value for name, value in given.items()}
