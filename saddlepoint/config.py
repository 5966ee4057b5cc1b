"""A run as one typed record: what the CLI's flags, a TOML file and the record of a run all become.

Precedence: flag > file > default.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saddlepoint.errors import UsageError
from saddlepoint.registry import parse
from saddlepoint.types import Budget

DEMO_ATTACKS = (
    "direct, refusal_suppression, past_tense, base64, payload_splitting, role_play, prefix_injection, many_shot(shots=8), best_of_n(n=8), prefill"
)


class Config(BaseModel):
    """Everything that decides what a run does.

    Attributes:
        kind: "attack" scores a target; "loop" attacks, hardens and attacks again.
        target: The system under attack, by name.
        attacker, helper: Models for attacks that need them.
        policy: "fictional", or the path of a policy file.
        attacks, defenses, recipes: Methods with parameters, as in `prefill, best_of_n(n=32)`.
        search_judge: Steers the attacks.
        judge: Decides. It must be another.
        split: Which hazards are scored; a loop always scores "test" and learns from "train".
        limit: Only the first so many hazards; None takes all.
        queries, tokens, seconds: Budget of each attack on each behavior.
        max_tokens: Longest answer.
        rounds: How often to harden and attack again.
        seed: Decides every random choice.
        epochs, lr, batch: Training.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    kind: Literal["attack", "loop"] = "attack"
    target: str = "organism"
    attacker: str = ""
    helper: str = ""
    policy: str = "fictional"
    attacks: str = DEMO_ATTACKS
    defenses: str = ""
    recipes: str = "derta"
    search_judge: str = "refusal"
    judge: str = "oracle"
    split: Literal["train", "test"] = "test"
    limit: Annotated[int, Field(ge=1)] | None = None
    queries: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 64
    rounds: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    epochs: Annotated[int, Field(ge=1)] = 2
    lr: Annotated[float, Field(gt=0)] = 4e-4
    batch: Annotated[int, Field(ge=1)] = 16

    @model_validator(mode="after")
    def _methods_exist(self) -> "Config":
        parse("attack", self.attacks)
        parse("judge", self.judge), parse("judge", self.search_judge)
        if self.defenses:
            parse("defense", self.defenses)
        if self.kind == "loop":
            parse("recipe", self.recipes)
        return self

    @property
    def budget(self) -> Budget:
        return Budget(self.queries, self.tokens, self.seconds)


def read(values: dict[str, Any], where: str) -> Config:
    """Check values into a Config.

    Raises:
        UsageError: A name that does not exist, or a value of the wrong type; `where` says where it stands.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), UsageError):
            raise UsageError(f"{where}: {cause}") from None
        name = ".".join(map(str, first["loc"]))
        allowed = f"; allowed: {', '.join(Config.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise UsageError(f"{where}: {name}: {first['msg']}, got {first['input']!r}{allowed}") from None


def load(path: Path, flags: dict[str, Any]) -> Config:
    """Read a campaign file (TOML) and put the flags over it."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as wrong:
        raise UsageError(f"{path}: cannot be read as TOML: {wrong}") from None
    return read({**values, **flags}, str(path))
