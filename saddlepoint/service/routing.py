"""What the fine-tuning routes stand on, whose a request is, and the types that their bodies are made of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Request
from platformdirs import user_data_path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from saddlepoint.errors import UsageError
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.errors import ApiError
from saddlepoint.service.setting import Setting
from saddlepoint.service.state import State

EVERYONE = "everyone"  # whose files are, where there are no keys


@dataclass(frozen=True)
class Tuning:
    """The fine-tuning part of a server.

    Args:
        bases: The names of served models that can be trained, with the targets that they stand for.
        max_file: Bytes of a file.
        quota: Bytes that a key may store; 0 is no limit.
        most_jobs: Jobs of a key that have not ended; 0 is no limit.
        worker: What `python -m saddlepoint.service.worker` is started with; () starts none, for a server whose workers run elsewhere.
    """

    state: State
    blobs: Blobs
    bases: Mapping[str, str] = field(default_factory=dict)
    max_file: int = 50 << 20
    quota: int = 10 << 30
    most_jobs: int = 100
    worker: tuple[str, ...] = ()

    @classmethod
    def at(cls, state: str, files: str, bases: Mapping[str, str], gate: str, **limits: int) -> "Tuning":
        """The fine-tuning part of a server whose worker is its own.

        Args:
            state: Of the database: a folder, or a URL; "" is a folder of the user's.
            files: Of the blob store: a folder, or a URL of fsspec; "" is within the folder of `state`.
            gate: The policy by which new models are tested, or "off".

        Raises:
            UsageError: One cannot be had.
            StoreError: The database cannot be reached, or another version wrote it.
        """
        if "://" in state and not files:
            raise UsageError("--state is a database; say where files lie: --files FOLDER, or a URL of fsspec that all servers reach")
        folder = home(state)
        place, files = state or str(folder), files or str(folder / "files")
        blobs = Blobs(files)
        worker = Setting(place, files, folder / "work", bases, gate).flags
        opened = State.open(place, blobs.remove, blobs.size)
        blobs.belong(opened.id)
        return cls(opened, blobs, bases, worker=(*worker, "--attached") if bases else (), **limits)


def home(state: str) -> Path:
    """The folder of a service on this machine: that of its database, or one of the user's where that is a URL or not given."""
    return user_data_path("saddlepoint") / "service" if not state or "://" in state else Path(state)


def owner(request: Request) -> str:
    """Whose what a request makes will be: the name of its key."""
    return request.state.key or EVERYONE


def sees(request: Request) -> str | None:
    """Whose things a request may see; None is everybody's, which is for administrators."""
    return None if is_admin(request) else owner(request)


def is_admin(request: Request) -> bool:
    """Whether a request came with an administrator's key: the generated one, or one named `admin` or `admin-...`."""
    key: str = request.state.key
    return key in ("generated", "admin") or key.startswith("admin-")


def missing(what: str, id: str) -> ApiError:
    """The error for what is not there, or is somebody else's, which is the same to whoever asks."""
    return ApiError(404, f"No such {what}: {id}", "not_found", "id")


def _plain(text: str) -> str:
    """Text that any database can hold."""
    if re.search("[\x00\ud800-\udfff]", text):
        raise ValueError("holds a zero byte or half a character; leave it out")
    return text


Text = Annotated[str, AfterValidator(_plain)]


class Body(BaseModel):
    """The body of a request; a field that the protocol does not know is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Expiry(Body):
    """When a file is removed by itself."""

    anchor: str = Field(pattern="^created_at$")
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


def listed(data: list[dict[str, Any]], more: bool, ends: bool = True) -> dict[str, Any]:
    """A page of a list."""
    page: dict[str, Any] = {"object": "list", "data": data, "has_more": more}
    return page | {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None} if ends else page
