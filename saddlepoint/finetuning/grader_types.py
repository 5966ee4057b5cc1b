"""The graders of the fine-tuning protocol as types: which there are, and what is wrong with one that cannot be had.

Their texts are templates: `{{sample.output_text}}` is the answer, `{{sample.output_json.x}}` a field of an answer that is JSON, and
`{{item.x}}` a field of the data's line. `python` graders run a stranger's code and are refused.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from saddlepoint.errors import UsageError
from saddlepoint.finetuning import formula
from saddlepoint.finetuning.similarity import METRICS

HOLE = re.compile(r"\{\{([^{}]*)\}\}")
VARIABLE = re.compile(r" *(item|sample)((?:\.[\w-]+|\[\d{1,6}\])+) *")
_SAMPLE = re.compile(r"\.output_text|\.output_json(?:[.\[].*)?")


def _template(text: str) -> str:
    for hole in HOLE.findall(text):
        variable = VARIABLE.fullmatch(hole)
        if not variable or (variable[1] == "sample" and not _SAMPLE.fullmatch(variable[2])):
            allowed = "{{item.FIELD}}, {{sample.output_text}} and {{sample.output_json.FIELD}}"
            raise ValueError(f"'{{{{{hole}}}}}' is no variable; there are {allowed}")
    return text


Template = Annotated[str, Field(max_length=100_000), AfterValidator(_template)]


class _Grader(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = ""


class StringCheck(_Grader):
    """1 or 0: whether `input` equals `reference` (eq), does not (ne), or holds it (like; ilike whatever the case)."""

    type: Literal["string_check"]
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(_Grader):
    """How alike `input` and `reference` are; see `similarity`."""

    type: Literal["text_similarity"]
    input: Template
    reference: Template
    evaluation_metric: str

    @model_validator(mode="after")
    def _there(self) -> "TextSimilarity":
        if self.evaluation_metric not in METRICS:
            said = "meteor needs WordNet, which this service does not have" if self.evaluation_metric == "meteor" else "no such metric"
            raise ValueError(f"evaluation_metric '{self.evaluation_metric}': {said}; there are: {', '.join(METRICS)}")
        return self


class Text(BaseModel):
    """A part of a message; only text can be read."""

    model_config = ConfigDict(frozen=True)

    type: Literal["input_text", "output_text", "text"]
    text: Template


class Turn(BaseModel):
    """One message to the model that grades."""

    model_config = ConfigDict(frozen=True)

    role: Literal["user", "assistant", "system", "developer"]
    content: Template | Text | tuple[Template | Text, ...]

    @property
    def text(self) -> str:
        parts = self.content if isinstance(self.content, tuple) else (self.content,)
        return "".join(part.text if isinstance(part, Text) else part for part in parts)


class Drawn(BaseModel):
    """How the model that grades is sampled; greedily where nothing is said."""

    model_config = ConfigDict(frozen=True)

    max_completions_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    reasoning_effort: str | None = None  # taken, as by the chat route, and without effect


class ScoreModel(_Grader):
    """The number that a model gives, within `range`."""

    type: Literal["score_model"]
    model: str
    input: Annotated[tuple[Turn, ...], Field(min_length=1)]
    range: tuple[float, float] = (0.0, 1.0)
    sampling_params: Drawn = Drawn()

    @model_validator(mode="after")
    def _ordered(self) -> "ScoreModel":
        if self.range[0] >= self.range[1]:
            raise ValueError(f"range must be [lowest, highest], not {list(self.range)}")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        low, high = self.range
        return _object("result", {"type": "number", "minimum": low, "maximum": high})


Label = Annotated[str, Field(min_length=1, max_length=200)]


class LabelModel(_Grader):
    """1 or 0: whether the label that a model gives is one of `passing_labels`."""

    type: Literal["label_model"]
    model: str
    input: Annotated[tuple[Turn, ...], Field(min_length=1)]
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    passing_labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    sampling_params: Drawn = Drawn()

    @model_validator(mode="after")
    def _known(self) -> "LabelModel":
        if unknown := sorted(set(self.passing_labels) - set(self.labels)):
            raise ValueError(f"passing_labels names {', '.join(unknown)}, which labels does not have")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        return _object("label", {"type": "string", "enum": list(self.labels)})


def _object(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: dict(value)}, "required": [name], "additionalProperties": False}


Single = Annotated[StringCheck | TextSimilarity | ScoreModel | LabelModel, Field(discriminator="type")]


class Multi(_Grader):
    """What `calculate_output` makes of the rewards of several graders, which it knows by their keys; see `formula`."""

    type: Literal["multi"]
    graders: Annotated[dict[str, Single], Field(min_length=1, max_length=32)]
    calculate_output: str

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """A list of graders, or one alone, stands for what goes by the graders' own names."""
        held = given.get("graders") if isinstance(given, dict) else None
        if isinstance(held, dict) and isinstance(held.get("type"), str):
            held = [held]
        if not isinstance(held, list):
            return given
        names = [one.get("name", "") if isinstance(one, dict) else "" for one in held]
        if len({*names} - {""}) < len(names):
            raise ValueError(f"each of several graders needs a name of its own; got {names}")
        return {**given, "graders": dict(zip(names, held, strict=True))}

    @model_validator(mode="after")
    def _computable(self) -> "Multi":
        if wrong := [name for name in self.graders if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in formula.FUNCTIONS]:
            raise ValueError(f"{wrong[0]!r} cannot be a name in calculate_output; take letters, digits and _, and no function's name")
        formula.parsed(self.calculate_output, self.graders)
        return self


Grader = Annotated[StringCheck | TextSimilarity | ScoreModel | LabelModel | Multi, Field(discriminator="type")]
_GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)


def read(given: object) -> Grader:
    """A grader as the protocol writes it.

    Raises:
        UsageError: It is none, or one that cannot be had here.
    """
    kinds = [given.get("type")] if isinstance(given, dict) else []
    held = given.get("graders") if isinstance(given, dict) else None
    kinds += [
        one.get("type")
        for one in (held.values() if isinstance(held, dict) else held if isinstance(held, list) else [])
        if isinstance(one, dict)
    ]
    if "python" in kinds:
        raise UsageError("python graders run code that a request brings, and are refused; combine the others by a multi grader")
    try:
        return _GRADER.validate_python(given)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"grader{'.' if where else ''}{where}: {first['msg'].removeprefix('Value error, ')}") from None


def models(grader: Grader) -> set[str]:
    """The names of the models that a grader asks."""
    parts = grader.graders.values() if isinstance(grader, Multi) else (grader,)
    return {part.model for part in parts if isinstance(part, ScoreModel | LabelModel)}


def renamed(grader: Mapping[str, Any], name_of: Callable[[str], str]) -> dict[str, Any]:
    """A grader as the protocol writes it, with other names for the models that it asks."""
    made = read(grader).model_dump(mode="json")
    for part in made["graders"].values() if made["type"] == "multi" else (made,):
        if "model" in part:
            part["model"] = name_of(part["model"])
    return made


def missing(grader: Grader, item: Mapping[str, Any]) -> str:
    """The first variable of a line's own fields that the line does not have; "" where all are there."""
    for variable in HOLE.findall(grader.model_dump_json()):
        found = VARIABLE.fullmatch(variable)
        if found and found[1] == "item":
            try:
                at(item, found[2])
            except LookupError:
                return f"item{found[2]}"
    return ""


def at(value: Any, path: str) -> Any:
    """What stands in nested objects and lists at a path such as `.name` or `.rows[0].name`.

    Raises:
        LookupError: Nothing does.
    """
    for key, place in re.findall(r"\.([\w-]+)|\[(\d+)\]", path):
        if key and isinstance(value, Mapping) and key in value:
            value = value[key]
        elif place and isinstance(value, list) and int(place) < len(value):
            value = value[int(place)]
        else:
            raise LookupError(f"there is no '{path}'")
    return value
