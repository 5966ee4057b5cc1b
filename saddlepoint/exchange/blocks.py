"""What a guarded server flagged (`saddlepoint serve --log FILE`) as a run: monitoring goes back into the loop.

Each line of the log is a JSON object with `defense`, `direction`, `reason`, `model`, `time`, `chat` and, where an answer was
withheld, `answer`. A guard's word is no judge's verdict: an answer that a guard of the output withheld is taken for unsafe with the
guard's reason, one that was never written for refused; `judge` has them judged again.
"""

import re
from collections import Counter
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from saddlepoint.errors import UsageError
from saddlepoint.exchange import RUBRIC, Record, again, keep
from saddlepoint.policies import load as load_policy
from saddlepoint.types import Behavior, Completion, Finding, Message, Role, Verdict


class _Message(BaseModel):
    role: Role
    text: str


class _Line(BaseModel):
    """One line of the log, as far as it is read."""

    model_config = ConfigDict(extra="ignore")
    time: str
    model: str
    defense: str
    direction: str
    reason: str
    chat: list[_Message] | None = None
    answer: str = ""

    @property
    def request(self) -> str:
        """What was flagged: guards of the input read all that users and tools wrote, an answer is to the last user message."""
        texts = [m.text.strip() for m in self.chat or [] if m.role == "user" or (m.role == "tool" and self.direction == "input")]
        return "\n".join(filter(None, texts if self.direction == "input" else texts[-1:]))


def export(log: Path, folder: Path, policy: str = "", judge: str = "") -> list[str]:
    """Write a log of blocks to a new folder: a run with a finding for each request, and a policy that has them as train behaviors.

    Args:
        policy: A policy whose train hazards the requests name: the findings are then on those, so that `guard build` and `harden`
            learn from them, and requests that name none, or a test hazard, are left out. "" makes each request a behavior.
        judge: A judge that judges the answers again.

    Returns:
        What to do with it: commands, in words.

    Raises:
        UsageError: The log cannot be read, or holds nothing that can be exported.
        StoreError: The folder is not empty.
    """
    try:
        text = log.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        raise UsageError(f"{log}: cannot be read: {wrong}; give what --log of saddlepoint serve wrote") from None
    record, left_out = load(text, str(log), policy)
    record = again(record, judge) if judge else record
    file = policy or str(folder / "policy.jsonl")
    came = {"format": "blocks", "file": str(log), "judge": record.judge, "date": record.date}
    keep(record, file, folder, judge or "imported", came)
    unsafe = sum(f.verdict.unsafe is True for f in record.findings)
    told = [
        f"{len(record.findings)} blocked requests, {unsafe} with an unsafe answer; {left_out} left out",
        f"its report: saddlepoint report {folder}",
    ]
    if not policy:
        told.append(f"attack with them: saddlepoint attack --policy {file} --split train --attacks direct --judge rubric")
    told.append(f"harden against them: saddlepoint harden --policy {file} --findings {folder} --judge rubric")
    if policy:
        told.append(f"mend the guard: saddlepoint guard build --findings {folder} --out GUARD")
    return told


def load(text: str, where: str, policy: str = "") -> tuple[Record, int]:
    """Read a log; of a request that stands there several times one is taken, with an answer if there is one.

    Returns:
        The record, and how many requests were left out.

    Raises:
        UsageError: A line is no block, or there is none whose text was logged.
    """
    lines: list[_Line] = []
    for number, written in enumerate(text.splitlines(), 1):
        if written.strip():
            try:
                lines.append(_Line.model_validate_json(written))
            except ValidationError as wrong:
                first = wrong.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise UsageError(
                    f"{where}, line {number}: {place or 'the line'}: {first['msg']}; give what saddlepoint serve --log wrote"
                ) from None
    there = [line for line in lines if line.request]
    if not there:
        why = "the texts were left out; serve with --log-texts" if lines else "it is empty"
        raise UsageError(f"{where}: holds no blocked request to export: {why}")
    once: dict[str, _Line] = {}
    for line in sorted(there, key=lambda line: not line.answer):
        once.setdefault(re.sub(r"\s+", " ", line.request).lower(), line)
    hazards = load_policy(policy).select("harmful") if policy else ()
    things = load_policy(policy).things if policy else {}
    behaviors: dict[str, Behavior] = {b.id: b for b in hazards}
    findings: list[Finding] = []
    numbers: Counter[str] = Counter()
    for key, line in once.items():
        behavior = _made(key, line)
        if policy:
            named = [b for b in hazards if things.get(b.id, b.prompt).lower() in key]
            if len(named) != 1 or named[0].split != "train":
                continue
            (behavior,) = named
        behaviors[behavior.id] = behavior
        numbers[behavior.id] += 1
        findings.append(_finding(behavior, line, numbers[behavior.id]))
    if not findings:
        raise UsageError(f"{where}: no blocked request names a train hazard of '{policy}'; leave --policy out to make them behaviors")
    models = dict.fromkeys(line.model for line in there)
    day = max(line.time for line in there)[:10]
    return Record(", ".join(models), "guards", policy, day, tuple(behaviors.values()), tuple(findings)), len(once) - len(findings)


def _made(key: str, line: _Line) -> Behavior:
    name = f"block.{sha256(key.encode()).hexdigest()[:10]}"
    return Behavior(name, line.request, category=line.defense, split="train", phrasings=(line.request,), rubric=RUBRIC, pair=name)


def _finding(behavior: Behavior, line: _Line, number: int) -> Finding:
    said = f"{line.defense}: {line.reason}"
    if line.answer:
        completion, verdict = Completion(line.answer), Verdict("harmful", True, 1.0, said)
    else:
        completion, verdict = Completion("", finish="filter", blocked=said), Verdict("refusal", False, 0.0, said)
    return Finding(
        phase="before",
        behavior=behavior.id,
        kind="harmful",
        category=behavior.category,
        attack=f"request {number}",
        params={},
        target=line.model,
        chat=tuple(Message(m.role, m.text) for m in line.chat or []),
        completion=completion,
        verdict=verdict,
        queries=1,
        tokens=0,
        gradients=0,
        seconds=0.0,
        seed=0,
        broken_at=1 if verdict.unsafe else None,
    )
