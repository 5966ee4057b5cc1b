"""What a training costs: money by a price table, and seconds on this machine by what a short real training took."""

import json
import os
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from platformdirs import user_cache_path

from saddlepoint.errors import UsageError
from saddlepoint.finetuning.data import Record
from saddlepoint.finetuning.plan import Event, Method, Spec, Step
from saddlepoint.metrics import mean

STEPS = 4  # of the short training; the first warms up and is not counted


@dataclass(frozen=True)
class Prices:
    """Prices per 1,000 tokens, each >= 0. The defaults are those of 2023 for gpt-3.5-turbo, which nobody need still ask.

    Args:
        name: Whose they are.
        train: Of a token that is trained on, once for each epoch.
        input, output: Of asking the tuned model: a token of the prompt, and one of the answer.
        longest: Tokens of an example that are billed; the rest is cut off.
    """

    name: str = "OpenAI, gpt-3.5-turbo, 2023, in US dollars"
    train: float = 0.008
    input: float = 0.012
    output: float = 0.016
    longest: int = 4096


def prices(file: Path | None = None, **given: float | None) -> Prices:
    """A price table: the defaults, a TOML file of the fields of `Prices` over them, and what is given by name over both.

    Raises:
        UsageError: The file cannot be read, or holds something else than prices.
    """
    found: dict[str, object] = {}
    if file:
        try:
            found = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as wrong:
            raise UsageError(f'{file}: {wrong}; give a TOML file such as: name = "mine", train = 0.008, input = 0.012') from None
        found.setdefault("name", str(file))
    found |= {key: value for key, value in given.items() if value is not None}
    known = {f.name for f in fields(Prices)}
    if wrong_keys := sorted(found.keys() - known):
        raise UsageError(f"{file}: no price '{wrong_keys[0]}'; allowed: {', '.join(sorted(known))}")
    for key, value in found.items():
        if key != "name" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf")):
            raise UsageError(f"{key} must be a number of at least 0; got {value!r}")
    if given and not file and any(value is not None for value in given.values()):
        found["name"] = "the prices given"
    return replace(Prices(), **found)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cost:
    """What a training is billed.

    Args:
        tokens: Billed tokens of one epoch.
        training: Price of all epochs.
        asking: Price of asking the tuned model the prompts of 1,000 such examples, with answers as long as theirs.
    """

    prices: Prices
    tokens: int
    epochs: int
    training: float
    asking: float


def cost(table: Prices, lengths: Sequence[int], trained: int, epochs: int) -> Cost:
    """The cost of examples of these lengths, of whose tokens `trained` are learned."""
    tokens = sum(min(length, table.longest) for length in lengths)
    asked = max(0, sum(lengths) - trained) * table.input + trained * table.output
    return Cost(table, tokens, epochs, tokens * epochs * table.train / 1000, asked / max(1, len(lengths)))


@dataclass(frozen=True)
class Speed:
    """How fast this machine trains a base.

    Args:
        tokens_per_second: Mean of `n` steps over one batch, with its 95% interval `low`..`high`.
        batch: Examples of the batch.
        length: Their mean length in tokens.
        measured: When, in UTC.
    """

    base: str
    method: Method
    tokens_per_second: float
    low: float
    high: float
    n: int
    batch: int
    length: float
    threads: int
    measured: str


def speed(base: str, method: Method, records: Sequence[Record], batch: int) -> Speed:
    """Train `base` for a few steps on one batch drawn from `records`, and write down how fast that was. Takes some seconds.

    Raises:
        SaddlepointError: As `train`.
    """
    import torch  # the prices need none

    from saddlepoint.finetuning.train import train

    some = Random(0).sample(list(records), min(batch, len(records)))
    took: list[float] = []
    began = 0.0

    def starts() -> bool:
        """Asked as the first thing in each step, before anything is computed."""
        nonlocal began
        began = began or time.perf_counter()
        return False

    def tell(event: Event) -> None:
        nonlocal began
        if isinstance(event, Step):
            took.append(time.perf_counter() - began)
        began = 0.0

    with TemporaryDirectory() as folder:
        done = train(Spec(base, method=method, epochs=STEPS, batch=len(some)), some, [], Path(folder), tell, starts)
    assert done  # it was not told to stop
    rates = mean([done.trained_tokens / STEPS / seconds for seconds in took[1:]])
    threads, now = torch.get_num_threads(), time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    found = Speed(
        base, method, rates.value, rates.low, rates.high, rates.n, len(some), done.trained_tokens / STEPS / len(some), threads, now
    )
    _written(found)
    return found


def recorded(base: str, method: Method) -> Speed | None:
    """What `speed` wrote down when it was last measured for this base on this machine."""
    try:
        return Speed(**json.loads(_file().read_text(encoding="utf-8"))[f"{method} {base}"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file() -> Path:
    return user_cache_path("saddlepoint") / "training_speed.json"


def _written(found: Speed) -> None:
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    _file().parent.mkdir(parents=True, exist_ok=True)
    partial = _file().with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known | {f"{found.method} {found.base}": asdict(found)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(_file())
