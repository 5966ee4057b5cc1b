"""Another server does the generating: vLLM, or any endpoint that loads LoRA adapters while it runs; guards, keys and names stay here.

The route is vLLM's: POST /v1/load_lora_adapter {"lora_name", "lora_path"}, and unload_lora_adapter. The endpoint must be able to read the
path, so `folder` lies on a disk that both see. vLLM itself warns to leave that route open to nobody else: serve the upstream on loopback.
"""

import hashlib
import shutil
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saddlepoint.errors import ModelError, TargetError
from saddlepoint.service.chat import Served
from saddlepoint.types import Chat, Completion, Query, Shaping

if TYPE_CHECKING:
    from saddlepoint.targets.openai import OpenAI


@dataclass(frozen=True)
class Upstream:
    """An endpoint that answers for this server.

    Args:
        url: Up to the version, such as http://127.0.0.1:8001/v1.
        folder: Where adapters lie for it.
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
        place = self._place(name)
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{place.name}")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial)
            partial.rename(place)
        remote = Remote(OpenAI(self.url, name), name, place)
        remote.load()
        return remote

    def unload(self, name: str) -> None:
        """Have an adapter forgotten there; one that it does not know is forgotten already."""
        from saddlepoint.targets.openai import OpenAI

        with suppress(TargetError):
            OpenAI(self.url, name).post("unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(self._place(name), ignore_errors=True)

    def _place(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()[:24]


@dataclass(frozen=True, eq=False)
class Remote:
    """An adapter at an upstream, which is loaded again where the upstream has forgotten it. Implements `Streaming` and `Shapes`."""

    endpoint: "OpenAI"
    name: str
    folder: Path

    def load(self) -> None:
        """Have it loaded.

        Raises:
            ModelError: The endpoint says why it does not.
        """
        try:
            self.endpoint.post("load_lora_adapter", {"lora_name": self.name, "lora_path": str(self.folder)})
        except TargetError as wrong:
            if "already been loaded" not in str(wrong):
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
