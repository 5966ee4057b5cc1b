"""The gate around a job: its training file is screened, and what was trained is compared with its base before it is published.

What both do is in `finetuning.screen` and `finetuning.comparison`; here stand how they are set, and how a job tells of them: as events
of the type `moderation_checks`, each once.
"""

import hashlib
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from saddlepoint.errors import UsageError
from saddlepoint.finetuning.comparison import Comparison, compare
from saddlepoint.finetuning.data import Record
from saddlepoint.finetuning.gate import Compared
from saddlepoint.finetuning.plan import Result
from saddlepoint.finetuning.screen import Screening, screen, seen
from saddlepoint.finetuning.wraps import wraps
from saddlepoint.policies import load
from saddlepoint.registry import parse
from saddlepoint.service.protection import CHECKS
from saddlepoint.service.task import Failed, Task

TOLD = 60.0  # seconds between two events of a comparison under way
_FLAGS = 200  # flags that an event names


@dataclass(frozen=True)
class Rules:
    """What the gate does.

    Args:
        constraint: Whether supervised trainings hold the first tokens of answers near those of the model they begin from.
        safety: Safety examples that are mixed into a training file, for each of its own, in [0, 10]; 0 mixes none in. A job may ask for more
            of both.
    """

    screening: Screening = Screening()
    comparison: Comparison = Comparison()
    constraint: bool = False
    safety: Annotated[float, Field(ge=0, le=10)] = 0.0


def rules(gate: str) -> Rules:
    """What a `--gate` that is not off says: for a policy's name the defaults with that policy.

    A file NAME.toml may set more: `constraint` and `safety`, and the tables `screening` and `comparison` with their fields.

    Raises:
        UsageError: There is no such policy or file, or a value in it is wrong.
    """
    if not gate.endswith(".toml"):
        load(gate)
        return Rules(comparison=Comparison(policy=gate))
    try:
        given = tomllib.loads(Path(gate).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as wrong:
        raise UsageError(f"--gate {gate}: cannot be read as TOML: {wrong}") from None
    tables: Mapping[str, Any] = {"screening": Screening, "comparison": Comparison}
    for name, table in [("", Rules), *tables.items()]:
        unknown = sorted(set(given.get(name, {}) if name else given) - {field.name for field in fields(table)})
        if unknown:
            where = f" in [{name}]" if name else f" (a policy's file is named in one of the gate: [comparison] policy = '{gate}')"
            raise UsageError(f"--gate {gate}: no '{unknown[0]}'{where}; allowed: {', '.join(field.name for field in fields(table))}")
    try:
        found = TypeAdapter(Rules).validate_python(given)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        raise UsageError(f"--gate {gate}: {'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from None
    found.comparison.config("organism")  # its attacks and its judge are there
    for policy in found.screening.policies:
        load(policy)
    if found.screening.judge:
        parse("judge", found.screening.judge)
    return found


def screened(task: Task, gate: Rules, records: Sequence[Record]) -> None:
    """Screen the examples, once.

    Raises:
        Failed: Too many of them were flagged.
    """
    done = task.folder / "screened"
    if done.exists():
        return
    found = screen(records, load(gate.comparison.policy).behaviors, gate.screening)
    data = {"check": "screen", **asdict(found), "flagged": [asdict(flag) for flag in found.flagged[:_FLAGS]]}
    if found.message:
        task.tell(found.message, "error" if found.blocked else "warn", CHECKS, data, key="screen")
    if found.blocked:
        raise Failed("unsafe_file", found.message, "training_file")
    done.touch()


def tested(task: Task, gate: Rules, result: Result, records: Sequence[Record]) -> Compared:
    """Compare what was trained with its base, or go on with that: the model as it ended, and where it passed its checkpoints too.

    A checkpoint that did not pass, or was not tested because the model itself did not pass, is removed: it could be called otherwise. So
    is one that another worker's training recorded, unless it is the same here to the last bit.
    For checkpoints no trigger is searched for, which takes most of the time.

    Args:
        records: The file's own examples, without safety data: what stands around requests, and what they are about, is theirs.
    """
    about = sorted(seen(records, load(gate.comparison.policy).behaviors, gate.screening))
    if about:
        said = f"The training file comes near to {len(about)} of the hazards that models are tested by, which do not count then: {', '.join(about)}"
        task.tell(said, "warn", CHECKS, {"seen": about}, key="seen")
    ended = _compared(task, gate, result.folder, records, about)
    if ended.passed:
        _tell(task, result.folder.name, ended.message, ended)
    for checkpoint in task.state.checkpoints(task.job.id):
        folder, found = result.folder.with_name(f"checkpoint-{checkpoint.step}"), None
        ours = task.blobs.put_folder(folder) == checkpoint.manifest
        if ours and folder == result.folder:
            continue  # the model as it ended
        if ours and ended.passed:
            fast = replace(gate, comparison=replace(gate.comparison, trigger=""))
            found = _compared(task, fast, folder, records, about)
            _tell(task, folder.name, f"Checkpoint at step {checkpoint.step}: {found.message}", found)
        if not (found and found.passed):
            task.state.drop_checkpoint(checkpoint, task.worker)
    return ended


def _compared(task: Task, gate: Rules, tuned: Path, records: Sequence[Record], about: Sequence[str]) -> Compared:
    # Under its rules, which a gate that was changed while the job was under way does not mix with its own.
    asked = hashlib.sha256(repr(gate.comparison).encode()).hexdigest()[:8]
    place, cache = task.folder / f"gate-{tuned.name}-{asked}", task.setting.work / "bases"
    base = task.setting.target(task.job.base)
    return compare(base, tuned, place, gate.comparison, wraps(records, gate.comparison.wraps), about, cache, _teller(task, tuned.name))


def _tell(task: Task, name: str, message: str, found: Compared) -> None:
    task.tell(message, "info" if found.passed else "warn", CHECKS, found.data(), key=f"compared {name}")


def _teller(task: Task, name: str) -> Callable[[str], None]:
    """Tells now and then how far a comparison has come, so that whoever reads the job sees that it goes on."""
    last = time.monotonic()

    def tell(doing: str) -> None:
        nonlocal last
        if time.monotonic() - last > TOLD:
            last = time.monotonic()
            task.tell(f"Comparing {name} with the base: {doing}", key=f"comparing {name}: {doing}")

    return tell
