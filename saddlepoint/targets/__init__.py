"""The system under attack, one way to reach a model per file, named the same way everywhere.

organism                       the embedded model with its planted policy
smollm2-135m-instruct          an embedded model, as it is
hf:ORG/NAME                    a model of the Hugging Face hub
path/to/folder                 a local model, or a checkpoint that `saddlepoint harden` wrote
http://HOST:PORT/v1#MODEL      any OpenAI-compatible endpoint
"""

from pathlib import Path

from saddlepoint.errors import MissingExtraError, UsageError
from saddlepoint.models import EMBEDDED, base_of, card
from saddlepoint.types import Target


def open_target(name: str, dtype: str = "auto", device: str = "auto") -> Target:
    """Open a target by its name.

    Raises:
        UsageError: The name has none of the forms above.
        MissingExtraError: It needs torch, which is not installed.
        ModelError: The weights cannot be had.
    """
    if name.startswith(("http://", "https://")):
        from saddlepoint.targets.openai import OpenAI

        return OpenAI.at(name)
    if not (name == "organism" or name in EMBEDDED or name.startswith("hf:") or Path(name).is_dir()):
        forms = "organism, smollm2-135m-instruct, hf:ORG/NAME, a folder, http://HOST:PORT/v1#MODEL"
        raise UsageError(f"no target '{name}'; allowed: {forms}")
    try:
        from saddlepoint.targets.hf import HF
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"target '{name}' needs {missing.name}: pip install 'saddlepoint[local]'") from missing
    return HF.load(name, dtype=dtype, device=device)


def trained_on(name: str) -> frozenset[str]:
    """The ids of the behaviors that a checkpoint, or any checkpoint below it, was hardened on."""
    seen: set[str] = set()
    passed: set[Path] = set()  # a card that names itself as its base must not hold us
    while name and "://" not in name and Path(name).is_dir() and Path(name).resolve() not in passed:
        passed.add(Path(name).resolve())
        seen.update(card(Path(name)).get("trained_on", ()))
        name = base_of(Path(name))
    return frozenset(seen)
