"""Where claims are measured: runs and checkpoints that are made once, however many claims ask for them.

Every run lies in a folder named by what decides it, so two claims share what they have in common, and what was broken off
goes on where it was.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saddlepoint import artifacts, metrics
from saddlepoint.config import Config, read
from saddlepoint.errors import UsageError
from saddlepoint.loop import Listener, execute
from saddlepoint.metrics import Outcome
from saddlepoint.policies import Policy, load
from saddlepoint.registry import parse
from saddlepoint.store import Store, whole
from saddlepoint.targets import open_target
from saddlepoint.types import Artifact, Behavior, Case, Example, Finding

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF
    from saddlepoint.training import Loss, TrainConfig

LESSONS = "prefill, prefix_injection, many_shot(shots=8)"  # what every hardening learns from: the prompts that break the organism
GCG = "gcg(num_steps=60, test_steps=10, probe_sampling=True)"  # a suffix for each hazard: some 11 s each
UNIVERSAL = "gcg_multi(num_steps=60, search_width=64, n_behaviors=6)"  # one suffix, found on train hazards: some 30 s


@dataclass(frozen=True)
class Run:
    """What one target, with its defenses, did under some attacks."""

    store: Store
    attacks: tuple[str, ...]
    limit: int | None

    def findings(self, attack: str = "") -> list[Finding]:
        """Of one attack, as typed, or of all that were asked for."""
        wanted = {str(call) for call in parse("attack", attack)} if attack else set(self.attacks)
        return [f for f in self.store.findings("before") if f.attack in wanted]

    def broken(self, attack: str = "", queries: int | None = None) -> dict[str, Outcome]:
        """Whether each hazard was broken, by one attack or by any, within so many queries."""
        return metrics.broken(self.findings(attack), queries)

    def blocked(self, attack: str) -> dict[str, Outcome]:
        """Whether a defense withheld the answer."""
        return {f.behavior: bool(f.completion.blocked) for f in self.findings(attack)}

    def answers(self, attack: str = "") -> list[tuple[str, Case]]:
        """Every judged answer to these attacks, each with its attack."""
        wanted = {str(call) for call in parse("attack", attack)} if attack else set(self.attacks)
        behaviors = {b.id: b for b in load(self.store.read("config")["policy"]).behaviors}
        rows = (row for row in self.store.queries() if row[0] == "before" and row[1] in wanted)
        return [(a, Case(behaviors[b], r.ask.chat, r.completion)) for _, a, b, r in rows if r.ask.to == "target" and r.ask.judged]

    def refused(self) -> dict[str, Outcome]:
        """Whether each twin and each ordinary request was refused."""
        return metrics.refused([f for f in self.controls() if f.kind == "twin"])

    def answered(self) -> dict[str, Outcome]:
        """Whether each twin and each ordinary request was answered: neither refused nor with nonsense."""
        twins = [f for f in self.controls() if f.kind == "twin"]
        return {f.behavior: None if f.verdict.unsafe is None else f.verdict.label == "safe_answer" for f in twins}

    def told(self) -> dict[str, Outcome]:
        """Whether each hazard was told under clearance, where it may be."""
        return metrics.disclosed([f for f in self.controls() if f.kind == "cleared"])

    def understood(self, attack: str) -> dict[str, Outcome]:
        """Whether each hazard was told under clearance when asked by this attack, which had broken nothing; empty where it had."""
        return metrics.disclosed([f for f in self.store.findings("before/understood") if f.attack == attack])

    def losses(self) -> list[float]:
        """Loss on each ordinary text, in nats per token."""
        return list(self.store.read("utility:before") or [])

    def controls(self) -> list[Finding]:
        """Of twins, ordinary requests and hazards under clearance."""
        return self.store.findings("before/controls")


@dataclass(frozen=True)
class Lab:
    """The folder in which claims are measured, and on what.

    Args:
        out: Where runs, checkpoints and notes go.
        limit: Only the first so many hazards, for a first look; None takes all 25.
        target, policy: What is attacked, where a claim does not say.
        settings: Fields of `Config` for every run, such as a shorter answer.
    """

    out: Path
    limit: int | None = None
    target: str = "organism"
    policy: str = "fictional"
    settings: tuple[tuple[str, Any], ...] = ()
    listen: Listener = Listener()

    def attack(self, attacks: str, target: str = "", **fields: Any) -> Run:
        """Attack a target and ask its controls; what was asked before, for any claim, is not asked again.

        Args:
            fields: Of `Config`: `defenses`, `split`, `search_judge`, ...
        """
        config = self._config("attack", target, attacks=attacks, **fields)
        store, wanted = self._store(config), [str(call) for call in parse("attack", attacks)]
        done = store.read("done") or []
        if left := [a for a in wanted if a not in done]:
            self._execute(config.model_copy(update={"attacks": ", ".join(left)}), store)
            store.note("done", [*done, *left])
            store.note("config", config.model_copy(update={"attacks": ", ".join([*done, *left])}).model_dump())
        return Run(store, tuple(wanted), config.limit)

    def hardened(self, recipe: str, **fields: Any) -> str:
        """The checkpoint that a recipe makes of the target; all recipes learn from the same findings."""
        lessons = self.attack(LESSONS, split="train")
        store = self._store(config := self._config("harden", attacks=LESSONS, recipes=recipe, findings=str(lessons.store.path), **fields))
        if not store.notes("training:"):
            self._execute(config, store)
        (training,) = store.notes("training:").values()
        return str(training["checkpoint"])

    def finetuned(
        self, name: str, examples: Callable[[], Sequence[Example]], loss: "Loss | None" = None, config: "TrainConfig | None" = None
    ) -> str:
        """The target fine-tuned on examples of one's own; `name` says all that decides them, the loss and the training."""
        from saddlepoint.finetuning.first_token import finetune
        from saddlepoint.training import TrainConfig, cross_entropy

        out = self.out / "checkpoints" / f"{_slug(name)}-{self._key(name)}"
        if not (out / "card.json").is_file():
            self.listen.stage(f"fine-tuning: {name}")
            finetune(self.target, examples(), config or TrainConfig(), out, self.listen.train, loss or cross_entropy)
        return str(out)

    def organism(self, seed: int) -> str:
        """Another organism, trained from another seed."""
        from saddlepoint import organism

        out = self.out / "checkpoints" / f"organism-seed-{seed}"
        if not (out / "card.json").is_file():
            self.listen.stage(f"building an organism from seed {seed}")
            organism.build(out, seed, tell=self.listen.train)
        return str(out)

    def artifact(self, run: Run, attack: str) -> Artifact:
        """The text that a universal attack found in a run."""
        (note,) = run.store.notes(f"artifact:before:{parse('attack', attack)[0]}").values()
        return artifacts.of(note["artifact"])

    def asking(self, artifact: Artifact, name: str) -> str:
        """The attack that asks with an artifact; `name` tells it from others."""
        file = self.out / "artifacts" / f"{_slug(name)}-{_hash([name, asdict(artifact)])}.json"
        if not file.is_file():
            artifacts.write(artifact, file)
        return f"replay(artifact={str(file)!r})"

    def replay(self, run: Run, attack: str, before: str = "") -> str:
        """The attack that asks another target what `attack` asked this one, with a text before it."""
        asked = tuple((f.behavior, (" ".join(filter(None, (before, f.chat[-1].text))),)) for f in run.findings(attack) if f.chat)
        return self.asking(Artifact(attack, "", prompts=asked), attack)

    def noted(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that is computed once; `name` says all that decides it, besides the lab's own settings."""
        file = self.out / "notes" / f"{_slug(name)}-{self._key(name)}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            whole(file, json.dumps(make()))
        return json.loads(file.read_text(encoding="utf-8"))

    def model(self, target: str = "") -> "HF":
        """A target whose weights are at hand."""
        opened = open_target(target or self.target)
        if not hasattr(opened, "prompt_ids"):
            raise UsageError(f"this claim reads the weights of '{target or self.target}', which are not at hand; give a local model")
        return opened  # type: ignore[return-value]

    def hazards(self, split: str = "test") -> Sequence[Behavior]:
        """The harmful behaviors that are attacked."""
        return self.loaded.select("harmful", "train" if split == "train" else "test")[: self.limit]

    @property
    def loaded(self) -> Policy:
        return load(self.policy)

    def _key(self, name: str) -> str:
        return _hash([name, self.target, self.policy, self.limit, self.settings])

    def _config(self, kind: str, target: str = "", **fields: Any) -> Config:
        given = {"target": target or self.target, "policy": self.policy, "limit": self.limit, **dict(self.settings), **fields}
        return read({"kind": kind, **given}, "a claim")

    def _store(self, config: Config) -> Store:
        """The run of these settings, begun or new. Attacks of one target share a run, so they are not among what names it."""
        given = config.model_dump(exclude_defaults=True, exclude={"attacks"} if config.kind == "attack" else set())
        # Checkpoints and findings lie under `out`, which may be given otherwise the next time.
        key = _hash(json.loads(json.dumps(given).replace(str(self.out), "OUT")))
        what = config.recipes if config.kind == "harden" else f"{Path(config.target).name} {config.defenses}"
        path = self.out / "runs" / f"{config.kind}-{_slug(what)}-{key}"
        return Store.open(path) if (path / "run.db").is_file() else Store.create(path, config.model_dump())

    def _execute(self, config: Config, store: Store) -> None:
        began, before = time.monotonic(), store.read("seconds") or 0.0
        with store.writing():
            try:
                execute(config, store, self.listen)
            finally:
                store.note("seconds", round(before + time.monotonic() - began, 1))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
