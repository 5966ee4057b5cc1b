"""The system under attack, one way to reach a model per file, named the same way everywhere.

organism                       the embedded model with its planted policy
smollm2-135m-instruct          an embedded model, as it is
guard                          the embedded classifier of requests
hf:ORG/NAME                    a model of the Hugging Face hub
path/to/folder                 a local model, or a checkpoint that `saddlepoint harden` or `saddlepoint guard build` wrote
http://HOST:PORT/v1#MODEL      any OpenAI-compatible endpoint
inspect:PROVIDER/MODEL         a hosted model, through Inspect and the provider's own environment variables
clerk                          the embedded model that was taught to use tools; it does what it reads (see clerk.py)
agent:NAME                     any of these with tools in a sandbox, such as agent:clerk

A sequence classifier, on the hub or in a folder, is a target too; `NAME#LABEL` says which label lets a request pass, where
the labels' names do not say it.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from saddlepoint.errors import ContaminationError, MissingExtraError, UsageError
from saddlepoint.models import EMBEDDED, GUARD, HEAD, base_of, history, hub_snapshot
from saddlepoint.types import Behavior, Target


def open_target(name: str, dtype: str = "auto", device: str = "auto") -> Target:
    """Open a target by its name.

    Raises:
        UsageError: The name has none of the forms above.
        MissingExtraError: It needs torch or inspect-ai, which is not installed.
        ModelError: The weights cannot be had.
    """
    if name.startswith("agent:"):
        from saddlepoint.targets.agent import Agent

        return Agent(open_target(name.removeprefix("agent:"), dtype, device))
    if name.startswith(("http://", "https://")):
        from saddlepoint.targets.openai import OpenAI

        return OpenAI.at(name)
    if name.startswith("inspect:"):
        try:
            from saddlepoint.targets.inspect import Inspect
        except ModuleNotFoundError as missing:
            raise MissingExtraError(f"target '{name}' needs {missing.name}: pip install 'saddlepoint[inspect]'") from missing
        return Inspect(name.removeprefix("inspect:"))
    bare = bare_name(name)
    if not (bare in ("organism", "clerk", "guard") or bare in EMBEDDED or bare.startswith("hf:") or Path(bare).is_dir()):
        forms = "organism, clerk, smollm2-135m-instruct, guard, hf:ORG/NAME, a folder, http://HOST:PORT/v1#MODEL, inspect:PROVIDER/MODEL, agent:NAME"
        raise UsageError(f"no target '{name}'; allowed: {forms}")
    if bare in EMBEDDED and not EMBEDDED[bare].chats:
        raise UsageError(f"'{bare}' is {EMBEDDED[bare].about} and answers nothing; the classifier that stands on it: --target guard")
    try:
        from saddlepoint.targets.classifier import Classifier
        from saddlepoint.targets.hf import HF
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"target '{name}' needs {missing.name}: pip install 'saddlepoint[local]'") from missing
    if classifies(folder_of(bare)):
        return Classifier.load(name, dtype=dtype, device=device)
    if bare == "guard":
        raise UsageError(f"the guard is not built; build it: saddlepoint guard build --out {GUARD}")
    if bare != name:
        raise UsageError(f"'{bare}' is no classifier, so it has no label '{name.partition('#')[2]}'; give the name alone")
    return HF.load(name, dtype=dtype, device=device)


def folder_of(bare: str) -> Path:
    """Where the files of a classifier, or of any local or hub model, lie."""
    if bare.startswith("hf:"):
        return hub_snapshot(bare[3:], say=logging.getLogger("saddlepoint").info)
    return GUARD if bare == "guard" else Path(bare)


def classifies(folder: Path) -> bool:
    """Whether a folder holds a classifier: a guard, or a transformers model of an architecture ...ForSequenceClassification."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
    except (OSError, ValueError, AttributeError):
        return (folder / HEAD).is_file()


def bare_name(name: str) -> str:
    """A target's name without the label that may stand behind it."""
    return name if Path(name).is_dir() else name.partition("#")[0]


def acts(target: object) -> bool:
    """Whether a target, or what its defenses wrap, is an agent."""
    from saddlepoint.targets.agent import Agent

    return isinstance(target, Agent) or (hasattr(target, "inner") and acts(target.inner))


def trained_on(name: str) -> frozenset[str]:
    """The ids of the behaviors that a checkpoint, or any checkpoint below it, was hardened on."""
    seen: set[str] = set()
    name = name if "://" in name else bare_name(name)
    passed: set[Path] = set()  # a card that names itself as its base must not hold us
    while name and "://" not in name and Path(name).is_dir() and Path(name).resolve() not in passed:
        passed.add(Path(name).resolve())
        seen.update(history(Path(name)).get("trained_on", ()))
        name = base_of(Path(name))
    return frozenset(seen)


def check_unseen(what: str, name: str, behaviors: Iterable[Behavior]) -> None:
    """Stop before a model is scored on what it was trained on.

    Args:
        what: The model's part, such as "target".

    Raises:
        ContaminationError: It was trained on some of these behaviors.
    """
    if seen := sorted({b.pair or b.id for b in behaviors} & trained_on(name)):
        shown = ", ".join(seen[:5])
        raise ContaminationError(
            f"the {what} '{name}' was trained on {len(seen)} of these behaviors ({shown}); score it on others: --split test"
        )
