"""Another server does the generating: vLLM, or any endpoint that loads LoRA adapters while it runs; guards, keys and names stay here.

The route is vLLM's: POST /v1/load_lora_adapter {"lora_name", "lora_path"}, and unload_lora_adapter. The endpoint must be able to read the
path, so `folder` lies on a disk that both see. vLLM itself warns to leave that route open to nobody else: serve the upstream on loopback.

A name may be unloaded there at any time: because it made room here while it was still answering, by another server of the same
upstream, or by a restart. So whoever has an adapter keeps a copy of its own as long as anybody answers with it, and loads it again.
"""

import fcntl
import shutil
import weakref
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from saddlepoint.errors import ModelError, TargetError
from saddlepoint.service.chat import Served
from saddlepoint.types import Chat, Completion, Query, Shaping

if TYPE_CHECKING:
    from saddlepoint.targets.openai import OpenAI

LOCK = "lock"  # a file beside an adapter's own, locked by the server that has it


@dataclass(frozen=True)
class Upstream:
    """An endpoint that answers for this server.

    Args:
        url: Up to the version, such as http://127.0.0.1:8001/v1.
        folder: Where adapters lie for it; several servers may share one.
    """

    url: str
    folder: Path

    def base(self, model: str = "") -> "OpenAI":
        """A base model of it; its only one if none is named.

        Raises:
            TargetError, UsageError: As `OpenAI.at`.
        """
        from saddlepoint.targets.openai import OpenAI

        return OpenAI.at(f"{self.url}#{model}" if model else self.url)

    def load(self, name: str, folder: Path, base: Served) -> "Remote":
        """Have the adapter in `folder` loaded there; see `adapters.Load`.

        Raises:
            ModelError: It is no adapter, or the endpoint does not take it.
        """
        from saddlepoint.targets.openai import OpenAI

        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"'{name}' is a whole model, and {self.url} loads adapters only; serve its files there under this name")
        _sweep(self.folder)
        place = self.folder / uuid4().hex
        place.mkdir(parents=True)
        lock = (place / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        remote = Remote(OpenAI(self.url, name), name, place)
        weakref.finalize(remote, _remove, place, lock)
        shutil.copytree(folder, place, dirs_exist_ok=True)
        remote.load()
        return remote

    def unload(self, name: str) -> None:
        """Have an adapter forgotten there; one that it does not know is forgotten already."""
        from saddlepoint.targets.openai import OpenAI

        _unload(OpenAI(self.url, name))


def _unload(endpoint: "OpenAI") -> None:
    with suppress(TargetError):
        endpoint.post("unload_lora_adapter", {"lora_name": endpoint.model})


def _remove(place: Path, lock: IO[str]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    lock.close()


def _sweep(folder: Path) -> None:
    """Remove the copies of servers that were killed: nobody holds their locks."""
    for file in folder.glob(f"*/{LOCK}"):
        with suppress(OSError), file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Remote:
    """An adapter at an upstream, which is loaded again where the upstream has forgotten it. Implements `Streaming` and `Shapes`.

    Args:
        folder: The copy that is loaded; it is removed with this.
    """

    endpoint: "OpenAI"
    name: str
    folder: Path

    def load(self) -> None:
        """Have it loaded, from this copy even where the endpoint knows the name: the copy that it knows may soon be gone.

        Raises:
            ModelError: The endpoint says why it does not.
        """
        _unload(self.endpoint)
        try:
            self.endpoint.post("load_lora_adapter", {"lora_name": self.name, "lora_path": str(self.folder)})
        except TargetError as wrong:
            if "already been loaded" not in str(wrong):  # by another request for it, a moment ago
                said = "it must run with runtime LoRA loading (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora for vLLM)"
                raise ModelError(f"'{self.name}' cannot be loaded: {wrong}; {said}") from wrong

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """As `OpenAI.generate`."""
        try:
            return self.endpoint.generate(queries)
        except TargetError:  # such as 404: it was started anew
            self.load()
            return self.endpoint.generate(queries)

    def stream(self, query: Query) -> Generator[Completion, None, None]:
        """As `OpenAI.stream`."""
        begun = False
        try:
            for piece in self.endpoint.stream(query):
                begun = True
                yield piece
        except TargetError:
            if begun:
                raise
            self.load()
            yield from self.endpoint.stream(query)

    def room(self, chat: Chat) -> int:
        """As `OpenAI.room`."""
        return self.endpoint.room(chat)

    def misshapen(self, shaping: Shaping) -> str:
        """As `OpenAI.misshapen`."""
        return self.endpoint.misshapen(shaping)
