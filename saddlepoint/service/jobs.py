"""The routes of fine-tuning jobs, and of the release of a model that the gate holds."""

import re
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from saddlepoint.finetuning import grader_types
from saddlepoint.service.errors import ApiError
from saddlepoint.service.jobwire import TRAINED, JobRequest, shown, shown_checkpoint, shown_event
from saddlepoint.service.records import File, Job
from saddlepoint.service.routing import Body, Text, Tuning, is_admin, listed, missing, owner, sees
from saddlepoint.service.rows import fresh

Limit = Annotated[int, Query(ge=1, le=1000)]


class ReleaseRequest(Body):
    """The body of POST /v1/saddlepoint/jobs/{id}/release."""

    reason: Annotated[Text, Field(min_length=1, max_length=2000)]


def routes(tuning: Tuning) -> APIRouter:
    """The routes under /v1/fine_tuning/jobs. Posts but the first have no body: the clients send an empty one and call it JSON."""
    made = APIRouter(prefix="/v1", tags=["fine-tuning"])
    state = tuning.state

    def _job(id: str, request: Request) -> Job:
        job = state.job(id, sees(request))
        if job is None:
            raise missing("fine-tuning job", id)
        return job

    def _file(id: str, param: str, request: Request) -> File:
        file = state.files.get(id, sees(request))
        if file is None:
            raise ApiError(400, f"invalid {param}: there is no file {id}", "invalid_file", param)
        if file.purpose != "fine-tune":
            said = f"invalid {param}: {id} was uploaded with the purpose '{file.purpose}'; upload it with 'fine-tune'"
            raise ApiError(400, said, "invalid_file_purpose", param)
        if file.status != "processed":
            raise ApiError(400, f"File not ready: {id}", "file_not_ready", param)
        return file

    def _base(model: str, request: Request) -> str:
        """The base that a model stands on."""
        if model in tuning.bases:
            return model
        found = state.model(model, sees(request))
        base = found.base if found else model
        if base not in tuning.bases:
            said = f"The model '{model}' does not exist or cannot be fine-tuned; there are: {', '.join(sorted(tuning.bases)) or 'none'}"
            raise ApiError(404, said, "model_not_found", "model")
        return base

    @made.post("/fine_tuning/jobs")
    def create_job(body: JobRequest, request: Request) -> dict[str, Any]:
        """Begin a job."""
        base, method = _base(body.model, request), body.how()
        if method["type"] == "reinforcement":
            for name in grader_types.models(grader_types.read(method["reinforcement"]["grader"])):
                _base(name, request)  # the trainer opens it: only what this key may tune from can grade
        if body.integrations:
            said = "this server sends nothing to others, so it has no integrations; leave them out and read the job's events"
            raise ApiError(400, said, "unsupported_parameter", "integrations")
        training = _file(body.training_file, "training_file", request)
        validation = _file(body.validation_file, "validation_file", request) if body.validation_file is not None else None
        if validation and validation.id == training.id:
            raise ApiError(400, "the validation file is the training file; give another", "invalid_file", "validation_file")
        hyperparameters = {name: value for name, value in method[method["type"]]["hyperparameters"].items() if name in TRAINED}
        job = Job(
            id=fresh("ftjob-"),
            owner=owner(request),
            created_at=int(time.time()),
            model=body.model,
            base=base,
            name=f"ft:{base}:local:{_slug(body.suffix)}:{fresh('', 8)}",
            training_file=training.id,
            validation_file=validation.id if validation else None,
            method=method,
            hyperparameters=hyperparameters,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            suffix=body.suffix,
            metadata=body.metadata,
        )
        return shown(state.create(job, tuning.most_jobs, tuning.quota))

    @made.get("/fine_tuning/jobs")
    def list_jobs(
        request: Request,
        limit: Limit = 20,
        after: str | None = None,
        starting_after: str | None = None,
        metadata: Annotated[str | None, Query(pattern="^null$", description="null, or metadata[KEY]=VALUE")] = None,
    ) -> dict[str, Any]:
        """The jobs of a key, the newest first."""
        page, more = state.jobs(sees(request), limit, after or starting_after, _labels(request.query_params), metadata is not None)
        return listed([shown(job) for job in page], more, ends=False)

    @made.get("/fine_tuning/jobs/{id}")
    def retrieve_job(id: str, request: Request) -> dict[str, Any]:
        """One job."""
        return shown(_job(id, request))

    @made.post("/fine_tuning/jobs/{id}/cancel")
    def cancel_job(id: str, request: Request) -> dict[str, Any]:
        """End a job."""
        return shown(state.cancel(_job(id, request).id))

    @made.post("/fine_tuning/jobs/{id}/pause")
    def pause_job(id: str, request: Request) -> dict[str, Any]:
        """Halt a job."""
        return shown(state.pause(_job(id, request).id))

    @made.post("/fine_tuning/jobs/{id}/resume")
    def resume_job(id: str, request: Request) -> dict[str, Any]:
        """Let a paused job go on."""
        return shown(state.resume(_job(id, request).id))

    @made.get("/fine_tuning/jobs/{id}/events")
    def list_events(
        id: str, request: Request, limit: Limit = 20, after: str | None = None, starting_after: str | None = None
    ) -> dict[str, Any]:
        """What happened to a job, the newest first."""
        page, more = state.events(_job(id, request).id, limit, after or starting_after)
        return listed([shown_event(event) for event in page], more, ends=False)

    @made.get("/fine_tuning/jobs/{id}/checkpoints")
    def list_checkpoints(
        id: str, request: Request, limit: Limit = 10, after: str | None = None, starting_after: str | None = None
    ) -> dict[str, Any]:
        """The checkpoints of a job, the highest step first."""
        found = state.checkpoints(_job(id, request).id)
        if last := after or starting_after:
            places = [at for at, checkpoint in enumerate(found) if checkpoint.id == last]
            if not places:
                raise ApiError(400, f"'after' names '{last}', which does not exist", "invalid_value", "after")
            found = found[places[0] + 1 :]
        return listed([shown_checkpoint(checkpoint) for checkpoint in found[:limit]], len(found) > limit)

    @made.post("/saddlepoint/jobs/{id}/release", tags=["saddlepoint"])
    def release_job(id: str, body: ReleaseRequest, request: Request) -> dict[str, Any]:
        """Publish a model that the gate holds; for administrators, and on the record."""
        if not is_admin(request):
            said = "only an administrator releases a model: a key named 'admin' or 'admin-...', or the generated one"
            raise ApiError(403, said, "forbidden")
        return shown(state.release(_job(id, request).id, owner(request), body.reason))

    return made


def _slug(suffix: str | None) -> str:
    """A suffix as a part of a name, which may hold no colon."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", suffix or "").strip("-")


def _labels(query: Mapping[str, str]) -> dict[str, str]:
    """The metadata that a list is narrowed to."""
    return {name[len("metadata[") : -1]: value for name, value in query.items() if name.startswith("metadata[") and name.endswith("]")}
