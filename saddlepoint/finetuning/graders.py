"""What an answer is worth by a grader: checks of text, likeness, another model's opinion, or a sum of those. See `grader_types`."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from saddlepoint.errors import SaddlepointError
from saddlepoint.finetuning import formula
from saddlepoint.finetuning.grader_types import HOLE, VARIABLE, Grader, LabelModel, Multi, ScoreModel, StringCheck, TextSimilarity, at
from saddlepoint.finetuning.similarity import METRICS
from saddlepoint.judges.refusal import refuses
from saddlepoint.types import Chat, Completion, Message, Sampling

Ask = Callable[[str, Chat, Sampling, Mapping[str, Any]], Completion]
"""Asks a model, by its name, a chat whose answer should be JSON of a schema. Raises SaddlepointError where there is no such model."""
Error = Literal["formula", "sample_parse", "invalid_variable", "truncated", "model_server", "model_refusal", "model_parse", "other"]
OF_THE_ANSWER: frozenset[Error] = frozenset({"sample_parse", "invalid_variable", "truncated"})
"""Errors that say something of the answer: it is worth 0. After any other it is not known what it is worth."""
LONGEST = 100_000  # characters of a template with what is filled in
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?![\w.]*\w)")


@dataclass(frozen=True)
class Graded:
    """What an answer is worth.

    Args:
        reward: 0 where something in `errors` went wrong.
        sub_rewards: Of each grader of a `multi`, by its key.
        errors: What went wrong, each with why.
        tokens: That each model which was asked read and wrote.
    """

    reward: float
    sub_rewards: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[Error, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)


def grade(grader: Grader, sample: str, item: Mapping[str, Any], ask: Ask) -> Graded:
    """Grade the answer `sample` to a line of data. Never raises for what an answer, a line or a model does."""
    if not isinstance(grader, Multi):
        return _single(grader, sample, item, ask)
    parts = {name: _single(one, sample, item, ask) for name, one in grader.graders.items()}
    tokens: dict[str, int] = {}
    for part in parts.values():
        for model, spent in part.tokens.items():
            tokens[model] = tokens.get(model, 0) + spent
    errors: dict[Error, str] = {kind: f"{name}: {why}" for name, part in parts.items() for kind, why in part.errors.items()}
    rewards = {name: part.reward for name, part in parts.items()}
    try:
        # A grader that could not grade is worth 0, and the others still count.
        return Graded(formula.value(formula.parsed(grader.calculate_output, rewards), rewards), rewards, errors, tokens)
    except (ArithmeticError, ValueError) as wrong:
        return Graded(0.0, rewards, {**errors, "formula": f"{grader.calculate_output}: {wrong}"}, tokens)


def _single(grader: StringCheck | TextSimilarity | ScoreModel | LabelModel, sample: str, item: Mapping[str, Any], ask: Ask) -> Graded:
    try:
        filled = _Filled(sample, item)
        if isinstance(grader, StringCheck):
            return Graded(_checked(grader.operation, filled(grader.input), filled(grader.reference)))
        if isinstance(grader, TextSimilarity):
            return Graded(METRICS[grader.evaluation_metric](filled(grader.input), filled(grader.reference)))
        return _asked(grader, tuple(Message(_role(turn.role), filled(turn.text)) for turn in grader.input), ask)
    except _NotJson as wrong:
        return Graded(0.0, errors={"sample_parse": str(wrong)})
    except _TooLong as wrong:
        return Graded(0.0, errors={"truncated": str(wrong)})
    except LookupError as wrong:
        return Graded(0.0, errors={"invalid_variable": str(wrong.args[0])})
    except SaddlepointError as wrong:
        return Graded(0.0, errors={"other": str(wrong)})


def _checked(operation: str, text: str, reference: str) -> float:
    if operation in ("eq", "ne"):
        return float((text == reference) == (operation == "eq"))
    return float(reference.lower() in text.lower() if operation == "ilike" else reference in text)


def _asked(grader: ScoreModel | LabelModel, chat: Chat, ask: Ask) -> Graded:
    drawn = grader.sampling_params
    # An answer of the schema needs few tokens; a model that thinks aloud before it is given more by its own parameter.
    nucleus = 1.0 if drawn.top_p is None else max(drawn.top_p, 1e-6)
    sampling = Sampling(drawn.max_completions_tokens or 32, drawn.temperature or 0.0, nucleus, (drawn.seed or 0) % 2**48)
    try:
        said = ask(grader.model, chat, sampling, grader.shape)
    except SaddlepointError as wrong:
        return Graded(0.0, errors={"model_server": str(wrong)})
    tokens = {grader.model: said.tokens}
    if said.finish in ("error", "filter"):
        kind: Error = "model_server" if said.finish == "error" else "model_refusal"
        return Graded(0.0, errors={kind: said.error or said.blocked or said.text}, tokens=tokens)
    found = _score(grader, said.text) if isinstance(grader, ScoreModel) else _label(grader, said.text)
    if found is None:
        return Graded(0.0, errors={"model_refusal" if refuses(said.text) else "model_parse": said.text[:200]}, tokens=tokens)
    return Graded(found, tokens=tokens)


def _score(grader: ScoreModel, text: str) -> float | None:
    """The number of an answer: the field of a JSON object, or the only number that a text holds."""
    given = _field(text, "result", "score")
    if isinstance(given, str) or given is None:
        numbers = _NUMBER.findall(given if isinstance(given, str) else text)
        given = float(numbers[0]) if len(numbers) == 1 else None
    low, high = grader.range
    return float(given) if isinstance(given, int | float) and not isinstance(given, bool) and low <= given <= high else None


def _label(grader: LabelModel, text: str) -> float | None:
    """Whether the label of an answer passes: the field of a JSON object, or the only label that a text holds."""
    given = _field(text, "label", "result")
    if given not in grader.labels:
        said = [label for label in grader.labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE)]
        longest = [a for a in said if not any(a.lower() in b.lower() for b in said if b != a)]  # "harmful" is no part of "not harmful"
        given = longest[0] if len(longest) == 1 else None
    return None if given is None else float(given in grader.passing_labels)


def _field(text: str, *names: str) -> Any:
    """A field of the JSON object that an answer is, or that stands in it."""
    try:
        given = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    return next((given[name] for name in names if name in given), None) if isinstance(given, dict) else None


def _role(role: str) -> Literal["system", "user", "assistant"]:
    return "system" if role == "developer" else role  # type: ignore[return-value]


class _NotJson(ValueError): ...


class _TooLong(ValueError): ...


@dataclass(frozen=True)
class _Filled:
    """Fills templates in for one answer. What is filled in is never read as a template itself."""

    sample: str
    item: Mapping[str, Any]

    def __call__(self, template: str) -> str:
        size = len(template)

        def put(hole: re.Match[str]) -> str:
            nonlocal size
            text = _written(self._value(hole[1]))
            size += len(text)
            if size > LONGEST:
                raise _TooLong(f"{{{{{hole[1]}}}}} makes a text of more than {LONGEST} characters")
            return text

        # Half a character, which JSON may hold, would break what measures likeness.
        return HOLE.sub(put, template).encode("utf-8", "replace").decode()

    def _value(self, variable: str) -> Any:
        found = VARIABLE.fullmatch(variable)
        assert found  # templates were checked when they were read
        namespace, path = found.groups()
        if namespace == "item":
            return at(self.item, path)
        return self.sample if path == ".output_text" else at(self._json, path.removeprefix(".output_json"))

    @cached_property
    def _json(self) -> Any:
        try:
            return json.loads(self.sample)
        except (ValueError, RecursionError) as wrong:
            raise _NotJson(f"the answer is not JSON: {wrong}") from None


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
