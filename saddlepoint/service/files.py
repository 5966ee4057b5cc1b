"""The routes of files. Nothing that a client names is ever a path here: what it sends lies under its own SHA-256."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from saddlepoint.service.blobs import PIECE
from saddlepoint.service.errors import ApiError
from saddlepoint.service.records import File
from saddlepoint.service.routing import Expiry, Tuning, listed, missing, owner, sees
from saddlepoint.service.rows import fresh

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
FIELDS = 8  # of a form, besides the file
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


def routes(tuning: Tuning) -> APIRouter:
    """The routes under /v1/files."""
    made = APIRouter(prefix="/v1/files", tags=["files"])
    shelf = tuning.state.files

    @made.post("", openapi_extra=FORM)
    async def create_file(request: Request) -> dict[str, Any]:
        """Keep a file; it is written as it comes and never held in memory."""
        async with form(request) as sent:
            upload, purpose = sent.get("file"), sent.get("purpose")
            if not isinstance(upload, UploadFile):
                raise ApiError(400, "'file' must be a file of the form", "missing_required_parameter", "file")
            if purpose not in PURPOSES:
                raise ApiError(400, f"'purpose' must be one of {', '.join(PURPOSES)}; got {purpose!r}", "invalid_value", "purpose")
            kept = _expiry(sent)
            sized(tuning, upload.size or 0)
            sha, size = await run_in_threadpool(tuning.blobs.put, pieces(upload))
            now = int(time.time())
            name = filename(upload.filename or "")
            file = File(fresh("file-"), owner(request), size, now, name, purpose, sha, "uploaded", now + kept if kept else None)
            await run_in_threadpool(shelf.add, file, tuning.quota)
            if not await run_in_threadpool(tuning.blobs.has, sha):
                await run_in_threadpool(tuning.blobs.put, pieces(upload))
        await run_in_threadpool(shelf.ready, file.id)
        return shown(replace(file, status="processed"))

    def _file(id: str, whose: str | None) -> File:
        file = shelf.get(id, whose)
        if file is None:
            raise missing("File object", id)
        return file

    @made.get("")
    def list_files(
        request: Request,
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        starting_after: str | None = None,
    ) -> dict[str, Any]:
        """The files of a key."""
        files, more = shelf.page(sees(request), purpose, limit, after or starting_after, order == "desc")
        return listed([shown(file) for file in files], more)

    @made.get("/{id}")
    def retrieve_file(id: str, request: Request) -> dict[str, Any]:
        """One file."""
        return shown(_file(id, sees(request)))

    @made.delete("/{id}")
    def delete_file(id: str, request: Request) -> dict[str, Any]:
        """Delete a file."""
        if not shelf.delete(id, sees(request)):
            raise missing("File object", id)
        return {"id": id, "object": "file", "deleted": True}

    @made.get("/{id}/content")
    def retrieve_content(id: str, request: Request) -> StreamingResponse:
        """What a file holds, byte for byte."""
        file = _file(id, sees(request))
        if file.status != "processed":
            raise ApiError(400, f"File not ready: {id}", "file_not_ready", "id")
        headers = {
            "content-length": str(file.bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
            "x-content-type-options": "nosniff",
        }
        held = tuning.blobs.chunks(file.sha)
        whole = chain([next(held, b"")], held)  # what is gone is told before a response begins
        return StreamingResponse(whole, media_type="application/octet-stream", headers=headers)

    return made


def form(request: Request) -> Any:
    """A multipart form with one file at most.

    Raises:
        ApiError: The body is of another kind.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, "send the file as multipart/form-data", "invalid_content_type")
    return request.form(max_files=1, max_fields=FIELDS, max_part_size=4096)


def pieces(upload: UploadFile) -> Iterator[bytes]:
    """What was sent, from its beginning."""
    upload.file.seek(0)
    while piece := upload.file.read(PIECE):
        yield piece


def sized(tuning: Tuning, size: int) -> None:
    """
    Raises:
        ApiError: A file is larger than this server takes.
    """
    if size > tuning.max_file:
        raise ApiError(413, f"the file has {size} bytes, and this server takes files of up to {tuning.max_file}", "file_too_large", "file")


def filename(said: str) -> str:
    """The last part of a file's name, without what only a terminal would understand."""
    name = PurePosixPath(said.replace("\\", "/")).name
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", "", name)[:255] or "file"


def shown(file: File) -> dict[str, Any]:
    """A file as the protocol has it."""
    fields = ("id", "bytes", "created_at", "filename", "purpose", "status", "expires_at")
    return {"object": "file", **{name: getattr(file, name) for name in fields}, "status_details": None}


def _expiry(sent: FormData) -> int | None:
    """Seconds that a file is kept."""
    given = {name.removeprefix("expires_after[").rstrip("]"): value for name, value in sent.items() if name.startswith("expires_after")}
    known = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
    if unknown := sorted(set(sent) - known):
        raise ApiError(400, f"no such parameter: '{unknown[0]}'", "unknown_parameter", unknown[0])
    if not given:
        return None
    try:
        return Expiry.model_validate_strings(given).seconds
    except ValidationError as wrong:
        first = wrong.errors()[0]
        raise ApiError(400, f"expires_after.{first['loc'][0]}: {first['msg']}", "invalid_value", "expires_after") from None
