"""The records of the fine-tuning service, as its database holds them. Times are seconds since 1970."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
ACTIVE: tuple[Status, ...] = ("validating_files", "queued", "running", "paused")
Manifest = Mapping[str, str]  # the files of a folder: a relative path to the SHA-256 of what it holds


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded or a written file.

    Args:
        owner: The name of the key that made it.
        sha: SHA-256 of its bytes, under which the blob store has them.
        expires_at: None keeps it.
    """

    id: str
    owner: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    sha: str
    status: str = "processed"
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that is sent in parts."""

    id: str
    owner: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    mime_type: str
    lifetime: int | None = None  # seconds that the file is kept
    status: str = "pending"
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    id: str
    upload: str
    created_at: int
    sha: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job.

    Args:
        model: What was asked for: a base, or an earlier fine-tuned model.
        base: The served base that it is trained on.
        name: What the trained model is called; its checkpoints are `NAME:ckpt-step-N`.
        fine_tuned_model: The same, once it is published.
        method: {"type": "supervised", "supervised": {"hyperparameters": {...}}}, and so the other types.
        hyperparameters: What is trained with, as far as it is known; "auto" until a worker has resolved it.
        validated: Its files were found to be good.
        worker: Who has it; "" for nobody.
        lease: Until when, in seconds of the database's clock.
        claims: How many times a worker took it.
        held: The files of a model that the gate did not publish.
    """

    id: str
    owner: str
    created_at: int
    model: str
    base: str
    name: str
    training_file: str
    method: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    seed: int
    status: Status = "validating_files"
    validation_file: str | None = None
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    result_files: tuple[str, ...] = ()
    trained_tokens: int | None = None
    error: Mapping[str, Any] | None = None
    validated: bool = False
    worker: str = ""
    lease: float = 0.0
    claims: int = 0
    held: Manifest | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    id: str
    job: str
    created_at: int
    level: str
    message: str
    type: str
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model at the end of an epoch; callable once its job has succeeded."""

    id: str
    job: str
    created_at: int
    step: int
    name: str
    metrics: Mapping[str, Any]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Model:
    """A published adapter.

    Args:
        base: The served base that it belongs to.
        manifest: Its files.
        step: Of a checkpoint; None for a job's last weights.
    """

    name: str
    owner: str
    created_at: int
    base: str
    job: str
    manifest: Manifest
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook that is to be sent."""

    id: str
    url: str
    secret: str
    body: str
    created_at: int
    tries: int = 0
