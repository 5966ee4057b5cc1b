"""The routes of uploads: a file in parts, put together at the end and checked by its MD5."""

import hashlib
import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.datastructures import UploadFile

from saddlepoint.service import files
from saddlepoint.service.errors import ApiError
from saddlepoint.service.records import File, Part, Upload
from saddlepoint.service.routing import Body, Expiry, Text, Tuning, missing, owner, sees
from saddlepoint.service.rows import fresh

HOUR = 3600  # seconds until an upload that was not completed is dropped
DATA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "format": "binary"}}}
            }
        },
    }
}


class UploadRequest(Body):
    """The body of POST /v1/uploads."""

    filename: Annotated[Text, Field(min_length=1, max_length=1024)]
    purpose: files.Purpose
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[Text, Field(max_length=255)]
    expires_after: Expiry | None = None


class CompleteRequest(Body):
    """The body of POST /v1/uploads/{id}/complete."""

    part_ids: Annotated[list[Text], Field(min_length=1, max_length=10000)]
    md5: Text | None = None


def routes(tuning: Tuning) -> APIRouter:
    """The routes under /v1/uploads."""
    made = APIRouter(prefix="/v1/uploads", tags=["uploads"])
    shelf = tuning.state.files

    def _upload(id: str, request: Request) -> Upload:
        upload = shelf.upload(id, sees(request))
        if upload is None:
            raise missing("Upload object", id)
        return upload

    def _shown(upload: Upload, file: File | None = None) -> dict[str, Any]:
        fields = ("id", "bytes", "created_at", "expires_at", "filename", "purpose", "status")
        return {"object": "upload", **{name: getattr(upload, name) for name in fields}, "file": files.shown(file) if file else None}

    @made.post("")
    def create_upload(body: UploadRequest, request: Request) -> dict[str, Any]:
        """Announce a file that is to come in parts."""
        files.sized(tuning, body.bytes)
        now, name = int(time.time()), files.filename(body.filename)
        kept = body.expires_after.seconds if body.expires_after else None
        upload = Upload(fresh("upload_"), owner(request), body.bytes, now, now + HOUR, name, body.purpose, body.mime_type, kept)
        return _shown(shelf.add_upload(upload))

    @made.post("/{id}/parts", openapi_extra=DATA)
    async def create_part(id: str, request: Request) -> dict[str, Any]:
        """Send one part; parts may come at the same time and in any order."""
        upload = await run_in_threadpool(_upload, id, request)
        async with files.form(request) as sent:
            data = sent.get("data")
            if not isinstance(data, UploadFile):
                raise ApiError(400, "'data' must be a file of the form", "missing_required_parameter", "data")
            sha, size = await run_in_threadpool(tuning.blobs.put, files.pieces(data))
            part = Part(fresh("part_"), upload.id, int(time.time()), sha, size)
            await run_in_threadpool(shelf.add_part, part, tuning.quota)
            if not await run_in_threadpool(tuning.blobs.has, sha):
                await run_in_threadpool(tuning.blobs.put, files.pieces(data))
        return {"id": part.id, "object": "upload.part", "upload_id": upload.id, "created_at": part.created_at}

    @made.post("/{id}/complete")
    def complete_upload(id: str, body: CompleteRequest, request: Request) -> dict[str, Any]:
        """Put the parts together, in the order given."""
        upload = shelf.pending(_upload(id, request).id)
        there = shelf.parts(id)
        if wrong := [part for part in body.part_ids if part not in there]:
            raise ApiError(400, f"the upload {id} has no part {wrong[0]}", "invalid_value", "part_ids")
        if len(set(body.part_ids)) < len(body.part_ids):
            raise ApiError(400, "a part is named twice", "invalid_value", "part_ids")
        if (size := sum(there[part].bytes for part in body.part_ids)) != upload.bytes:
            said = f"the parts have {size} bytes, and the upload was announced with {upload.bytes}"
            raise ApiError(400, said, "invalid_value", "part_ids")
        digest = hashlib.md5(usedforsecurity=False)

        def whole() -> Iterator[bytes]:
            for part in body.part_ids:
                for piece in tuning.blobs.chunks(there[part].sha):
                    digest.update(piece)
                    yield piece

        sha, size = tuning.blobs.put(whole())
        if body.md5 and body.md5.lower() != digest.hexdigest():
            shelf.forget(sha)
            raise ApiError(400, f"the parts have the MD5 {digest.hexdigest()}, not {body.md5}; send them again", "invalid_value", "md5")
        now = int(time.time())
        expires = now + upload.lifetime if upload.lifetime else None
        file = File(fresh("file-"), upload.owner, size, now, upload.filename, upload.purpose, sha, "uploaded", expires)
        shelf.complete(id, file)
        if not tuning.blobs.has(sha):
            tuning.blobs.put(whole())
        shelf.settle(id, file.id)
        return _shown(_upload(id, request), shelf.get(file.id))

    @made.post("/{id}/cancel")
    def cancel_upload(id: str, request: Request) -> dict[str, Any]:
        """Give an upload up; its parts are dropped."""
        _upload(id, request)
        shelf.cancel_upload(id)
        return _shown(_upload(id, request))

    return made
