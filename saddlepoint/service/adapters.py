"""Fine-tuned models by their names, for whoever may see them: loaded when they are first asked, beside the base that they share.

The database is asked at each request, so a model can be asked the moment its job has published it, by any server of that database, and
no longer once it is deleted. The files come from the blob store; what is in memory longest without being asked makes room.
"""

import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from saddlepoint.defenses._stack import layers
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.chat import Served
from saddlepoint.service.errors import ApiError
from saddlepoint.service.records import Model
from saddlepoint.service.state import State
from saddlepoint.types import Defense, Target

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

MOST = 16  # fine-tuned models in memory
WHOLE = 2  # of them with every weight of their own, each as large as its base
ADAPTER = "adapter_config.json"  # a file of every adapter, and of no whole model
Load = Callable[[str, Path, Served], Target]
"""(name, folder, its base) -> the fine-tuned model without defenses. The folder is removed afterwards."""


def beside(name: str, folder: Path, base: Served) -> "HF":
    """An adapter beside its base, or a whole model by itself.

    Raises:
        ModelError: What the folder holds does not belong to the base.
        ApiError: The base has no weights here.
    """
    from saddlepoint.targets.hf import HF

    *_, bare = layers(base.target)
    if not isinstance(bare, HF):
        raise ApiError(
            400, f"'{base.name}' has no weights on this server, so nothing can be served beside it", "model_not_servable", "model"
        )
    if (folder / ADAPTER).is_file():
        return bare.adapted(name, folder)
    whole = HF.load(str(folder), str(bare.model.dtype).removeprefix("torch."), bare.device.type)
    whole.name = name
    return whole


class Adapters:
    """The fine-tuned models of a server.

    Args:
        bases: The served bases by their names; a fine-tuned model has its base's defenses around it, as they were calibrated there.
        load: How a model is made of its files.
        unload: Told the name of a model that makes room, or is gone.
        most: Models in memory at once, >= 1.
    """

    def __init__(
        self,
        state: State,
        blobs: Blobs,
        bases: Mapping[str, Served],
        load: Load = beside,
        unload: Callable[[str], None] = lambda name: None,
        most: int = MOST,
    ):
        self._state, self._blobs, self._bases, self._load, self._unload, self._most = state, blobs, bases, load, unload, most
        self._guard = threading.Lock()
        self._known: OrderedDict[str, tuple[Model, Future[Served]]] = OrderedDict()

    def served(self, name: str, owner: str | None) -> Served | None:
        """A fine-tuned model or checkpoint; None where there is none that `owner` may see (None sees all).

        Raises:
            ApiError: Its base is not served here.
            ModelError, StoreError: Its files cannot be had.
        """
        if not name.startswith("ft:") or re.search("[\x00\ud800-\udfff]", name):  # no database need be asked
            return None
        found = self._state.model(name, owner)
        if found is None:
            if self._state.model(name) is None:
                self._drop(name)
            return None
        if found.base not in self._bases:
            said = f"The model '{name}' was trained on '{found.base}', which this server does not serve; ask the one that does"
            raise ApiError(404, said, "model_not_found", "model")
        with self._guard:
            known = self._known.get(name)
            mine = known is None or known[0] != found
            if mine:
                known = self._known[name] = (found, Future())
            self._known.move_to_end(name)
            whole = [name for name, (model, _) in self._known.items() if ADAPTER not in model.manifest]
            gone = {*whole[:-WHOLE], *list(self._known)[: -self._most]}
            for other in gone:
                del self._known[other]
        assert known
        for other in gone:
            self._unload(other)
        if mine:
            self._make(found, known[1])
        return known[1].result()

    @property
    def loaded(self) -> list[str]:
        """The names of those that are in memory, or are being loaded, the one that was asked last at the end."""
        return list(self._known)

    def _make(self, model: Model, promise: "Future[Served]") -> None:
        place = Path(tempfile.mkdtemp(prefix="saddlepoint-"))
        try:
            self._blobs.fetch(model.manifest, place / "model")
            base = self._bases[model.base]
            target = behind(base.target, self._load(model.name, place / "model", base))
            promise.set_result(replace(base, name=model.name, target=target, created=model.created_at))
        except BaseException as wrong:
            promise.set_exception(wrong)
            self._drop(model.name)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _drop(self, name: str) -> None:
        with self._guard:
            there = self._known.pop(name, None)
        if there:
            self._unload(name)


def behind(stack: Target, target: Target) -> Target:
    """The defenses of a stack around another target, as they are calibrated."""
    return replace(stack, inner=behind(stack.inner, target)) if isinstance(stack, Defense) else target  # type: ignore[type-var]
