"""The routes of models: those that are served, and a key's own fine-tuned ones, by their names or by their jobs' ids."""

from typing import Any

from fastapi import APIRouter, Request

from saddlepoint.service.chat import Served
from saddlepoint.service.errors import ApiError
from saddlepoint.service.jobwire import ORGANIZATION
from saddlepoint.service.records import Job, Model
from saddlepoint.service.routing import Tuning, owner, sees


def routes(bases: dict[str, Served], tuning: Tuning | None) -> APIRouter:
    """The routes under /v1/models.

    Args:
        bases: By the names under which they are asked.
    """
    made = APIRouter(prefix="/v1/models", tags=["models"])

    def _job(name: str, request: Request) -> Job | None:
        return tuning.state.job(name, sees(request)) if tuning and name.startswith(("ft-", "ftjob-")) else None

    def _tuned(name: str, request: Request) -> Model | None:
        """A fine-tuned model by its name, or by the id of the job that made it."""
        if tuning is None:
            return None
        job = _job(name, request)
        return tuning.state.model((job.fine_tuned_model or "") if job else name, sees(request))

    def _missing(name: str) -> ApiError:
        return ApiError(404, f"The model '{name}' does not exist", "model_not_found", "model")

    @made.get("")
    def list_models(request: Request) -> dict[str, Any]:
        """The models that may be asked."""
        tuned = tuning.state.models(sees(request)) if tuning else []
        return {"object": "list", "data": [served.card for served in bases.values()] + [card(model) for model in tuned]}

    @made.get("/{model:path}")
    def retrieve_model(model: str, request: Request) -> dict[str, Any]:
        """One model."""
        if model in bases:
            return bases[model].card
        if found := _tuned(model, request):
            return card(found)
        raise _missing(model)

    if tuning:

        @made.delete("/{model:path}")
        def delete_model(model: str, request: Request) -> dict[str, Any]:
            """Delete a fine-tuned model, or one of its checkpoints; by its job's id also one that the gate holds."""
            if model in bases:
                said = f"'{model}' is served because the server was started with it; only fine-tuned models can be deleted"
                raise ApiError(400, said, "invalid_value", "model")
            job = _job(model, request)
            if job and job.held is not None:
                tuning.state.discard(job.id, f"by {owner(request)}")
                return {"id": job.name, "object": "model", "deleted": True}
            found = _tuned(model, request)
            if found is None or not tuning.state.delete_model(found.name, sees(request)):
                raise _missing(model)
            return {"id": found.name, "object": "model", "deleted": True}

    return made


def card(model: Model) -> dict[str, Any]:
    """A fine-tuned model as the protocol has it."""
    return {"id": model.name, "object": "model", "created": model.created_at, "owned_by": ORGANIZATION}
