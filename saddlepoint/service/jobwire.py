"""Fine-tuning jobs, their events and their checkpoints as the protocol has them."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from saddlepoint.errors import UsageError
from saddlepoint.finetuning import grader_types
from saddlepoint.service.errors import ApiError
from saddlepoint.service.records import Checkpoint, Job, JobEvent
from saddlepoint.service.routing import Body, Text

ORGANIZATION = "org-local"
# Hyperparameters that this service's trainings have.
TRAINED = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta", "full", "constraint", "safety")

Auto = Literal["auto"]


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """JSON that any database can hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("holds a number that JSON does not have, or is too deep") from None
    return value


Object = Annotated[dict[str, Any], AfterValidator(_plain)]


class Hyperparameters(Body):
    """Of every method; "auto" is decided when the examples are counted.

    This server's own: `full` trains every weight in place of a LoRA, `constraint` holds the first tokens of answers near those of the
    model that the job begins with, `safety` mixes in so many safety examples for each of the file's own.
    """

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"
    full: bool | None = None
    constraint: bool | None = None
    safety: Annotated[float, Field(gt=0, le=10)] | None = None


class PreferenceHyperparameters(Hyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"
    constraint: None = None  # it stands on supervised training's loss


class ReinforcementHyperparameters(Hyperparameters):
    full: None = None  # it trains a LoRA only
    constraint: None = None
    safety: None = None  # there are no rewards for those
    reasoning_effort: Literal["default", "low", "medium", "high"] | None = None
    compute_multiplier: Auto | Annotated[float, Field(gt=1e-5, le=10)] | None = None
    eval_interval: Auto | Annotated[int, Field(ge=1, le=2**31)] | None = None
    eval_samples: Auto | Annotated[int, Field(ge=1, le=2**31)] | None = None


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Preference(Body):
    hyperparameters: PreferenceHyperparameters | None = None


class Reinforcement(Body):
    grader: Object
    hyperparameters: ReinforcementHyperparameters | None = None
    response_format: Object | None = None


class Method(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Preference | None = None
    reinforcement: Reinforcement | None = None


class JobRequest(Body):
    """The body of POST /v1/fine_tuning/jobs."""

    model: Annotated[Text, Field(min_length=1, max_length=1024)]
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = None
    metadata: (
        Annotated[dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)] | None
    ) = None
    integrations: list[Object] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None

    def how(self) -> dict[str, Any]:
        """The method with every hyperparameter, those that were not given as "auto".

        Raises:
            ApiError: Fields that do not fit one another, or a grader that cannot be had.
        """
        method = self.method or Method(type="supervised", supervised=Supervised(hyperparameters=self.hyperparameters))
        if self.method and self.hyperparameters:
            said = f"'hyperparameters' is the older place; give them in 'method.{method.type}.hyperparameters' alone"
            raise ApiError(400, said, "invalid_value", "hyperparameters")
        for other in {"supervised", "dpo", "reinforcement"} - {method.type}:
            if getattr(method, other) is not None:
                raise ApiError(400, f"'method.{other}' is given, and the type is '{method.type}'", "invalid_value", f"method.{other}")
        if method.type == "supervised":
            return {"type": "supervised", "supervised": {"hyperparameters": _full(Hyperparameters, method.supervised)}}
        if method.type == "dpo":
            return {"type": "dpo", "dpo": {"hyperparameters": _full(PreferenceHyperparameters, method.dpo)}}
        if method.reinforcement is None:
            raise ApiError(400, "'method.reinforcement' with a grader is needed", "missing_required_parameter", "method.reinforcement")
        try:
            grader_types.read(method.reinforcement.grader)
        except UsageError as wrong:
            raise ApiError(400, str(wrong), "invalid_grader", "method.reinforcement.grader") from None
        if method.reinforcement.response_format not in (None, {"type": "text"}):
            said = "answers are sampled without a response_format here; leave it out, and let the grader read {{sample.output_json}}"
            raise ApiError(400, said, "unsupported_parameter", "method.reinforcement.response_format")
        asked = method.reinforcement.model_dump(exclude_none=True)
        hyperparameters = _full(ReinforcementHyperparameters, method.reinforcement)
        return {"type": "reinforcement", "reinforcement": {**asked, "hyperparameters": hyperparameters}}


def _full(kind: type[Hyperparameters], given: Supervised | Preference | Reinforcement | None) -> dict[str, Any]:
    return ((given.hyperparameters if given else None) or kind()).model_dump(exclude_none=True)


def shown(job: Job) -> dict[str, Any]:
    """A job; its `hyperparameters` stand where a client of 2023 looks for them too."""
    same = ("id", "created_at", "finished_at", "estimated_finish", "model", "fine_tuned_model", "status", "method", "training_file")
    more = ("validation_file", "trained_tokens", "error", "seed", "metadata")
    return {
        "object": "fine_tuning.job",
        **{name: getattr(job, name) for name in same + more},
        "organization_id": ORGANIZATION,
        "hyperparameters": job.hyperparameters,
        "result_files": list(job.result_files),
        "integrations": [],
        "user_provided_suffix": job.suffix,
        "usage_metrics": None,
        "shared_with_openai": False,
    }


def shown_event(event: JobEvent) -> dict[str, Any]:
    """An event of a job."""
    fields = ("id", "created_at", "level", "message", "type", "data")
    return {"object": "fine_tuning.job.event", **{name: getattr(event, name) for name in fields}}


def shown_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint of a job."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": checkpoint.job,
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
    }
