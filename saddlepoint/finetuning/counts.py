"""How long examples are for the model that is to be trained: by its own tokenizer and template, as its training will read them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from saddlepoint.errors import SaddlepointError
from saddlepoint.finetuning.cost import Prices, cost
from saddlepoint.finetuning.data import Mistake, Record
from saddlepoint.finetuning.plan import Note
from saddlepoint.types import Message

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over examples. `p5` and `p95` are the 5th and the 95th percentile, interpolated linearly.

    The check script of OpenAI's guide prints the 10th and the 90th under these names.
    """

    n: int
    total: int
    min: int
    max: int
    mean: float
    median: float
    p5: float
    p95: float


@dataclass(frozen=True)
class Cut:
    """An example that is longer than what the model reads; the rest is cut off."""

    line: int
    tokens: int


@dataclass(frozen=True)
class Counts:
    """What the examples are for one model.

    Args:
        base: The model's name.
        context: Tokens that it reads; what lies beyond is cut off.
        lengths: Tokens of each example that could be written, uncut, in order: of a preference, those of both answers.
        tokens: Their spread.
        trained: Tokens of each that are learned; none in reinforcement, where the model writes them.
        messages: Messages of each; 0 where there is no chat.
        cut: The examples that are too long.
        mistakes: Examples that this model cannot be trained on, and why.
    """

    base: str
    context: int
    lengths: tuple[int, ...]
    tokens: Spread
    trained: Spread
    messages: Spread
    cut: tuple[Cut, ...]
    mistakes: tuple[Mistake, ...]


def spread(values: Sequence[int]) -> Spread:
    """The distribution of whole numbers; zeros where there are none."""
    data = np.asarray(values or [0], dtype=np.int64)
    low, median, high = (float(q) for q in np.quantile(data, [0.05, 0.5, 0.95]))
    return Spread(len(values), int(data.sum()), int(data.min()), int(data.max()), float(data.mean()), median, low, high)


def told(
    records: Sequence[Record], sides: Sequence[Sequence[int]], learned: Sequence[int], room: int, epochs: int | None
) -> Iterator[Note]:
    """What a job tells of its examples: how long they are, which fill the context, and what they would be billed elsewhere; of none nothing.

    Args:
        sides: Tokens of each text that an example becomes, as far as the model reads it: of a preference two.
        learned: Tokens of each example that are trained on.
        room: Tokens of the context.
        epochs: None for validation examples, which nobody bills.
    """
    if not records:
        return
    lengths = [sum(both) for both in sides]
    tokens, trained = spread(lengths), spread(learned)
    filled = [r.line for r, both in zip(records, sides, strict=True) if max(both) >= room]
    kind = "validation " if epochs is None else ""
    said = f"{tokens.n} {kind}examples of {tokens.min} to {tokens.max} tokens, {tokens.total} in all"
    data = {f"{kind}tokens".replace(" ", "_"): asdict(tokens), "truncated_lines": filled[:200]}
    if epochs is not None:
        paid = cost(Prices(), lengths, trained.total, epochs)
        said += f", of which {trained.total} are trained on" if trained.total else ""
        said += f"; {epochs} epoch(s) of them are {paid.training:,.2f} by the prices of {paid.prices.name}"
        data |= {"trained_tokens": asdict(trained), "cost": asdict(paid)}
    yield Note(said, data, warns=False)
    if filled:
        said = f"{len(filled)} of {tokens.n} {kind}examples fill the context of {room} tokens; what lies beyond is cut off"
        yield Note(f"{said}: {lines(filled)}")


def lines(numbers: Sequence[int]) -> str:
    """Lines of a file, the first few of them by their numbers."""
    return "lines " + ", ".join(map(str, numbers[:5])) + ", ..." * (len(numbers) > 5)


def measured(records: Sequence[Record], model: "HF", tell: Callable[[int], None] = lambda _: None) -> Counts:
    """Count the tokens of examples as `model` will be trained on them.

    Args:
        tell: Is told after each example how many are counted.
    """
    room = model.context
    lengths: list[int] = []
    trained: list[int] = []
    cut: list[Cut] = []
    mistakes: list[Mistake] = []
    for done, record in enumerate(records, 1):
        try:
            sides, learned = _counted(model, record)
        except SaddlepointError as wrong:
            mistakes.append(Mistake(record.line, 1, "not_trainable", str(wrong)))
            continue
        lengths.append(sum(sides))
        trained.append(learned)
        if max(sides) > room:
            cut.append(Cut(record.line, max(sides)))
        tell(done)
    turns = spread([len(record.chat) for record in records])
    return Counts(model.name, room, tuple(lengths), spread(lengths), spread(trained), turns, tuple(cut), tuple(mistakes))


def _counted(model: "HF", record: Record) -> tuple[list[int], int]:
    """The tokens of each text that a record becomes, uncut, and how many of them are learned."""
    from saddlepoint.finetuning.masks import encoded  # loads torch, which a file's rules do not need

    if record.item:
        return [len(model.prompt_ids(record.chat))], 0
    whole = encoded(model, record)
    texts = [e for e in (whole, whole.rejected) if e]
    sides = [len(e.ids) for e in texts]
    if max(sides) >= model.context:  # it may have been cut
        answers = [(*record.chat, Message("assistant", text)) for text in (record.preferred, record.rejected) if text] or [record.chat]
        turns = [[{"role": m.role, "content": m.text} for m in chat] for chat in answers]
        bare = len(model.text_ids(record.prompt)) + len(model.ids(record.completion)) + 1  # the token that ends it
        sides = [len(model.ids(model.tokenizer.apply_chat_template(t, tokenize=False))) for t in turns] if record.chat else [bare]
    return sides, sum(token != -100 for e in texts for token in e.learned)
