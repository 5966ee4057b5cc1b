"""Which tokens of an example are trained on: found by writing the chat turn by turn with the model's own template.

What the template writes for a turn is what it adds to the chat before it. That holds only if it writes the earlier turns alike
whatever follows, which is checked for every trained turn; no marker in the text is searched for. The end-of-turn token is trained
on, what a template writes behind it is not.
"""

from typing import TYPE_CHECKING, Any

from saddlepoint.errors import TrainingError
from saddlepoint.targets.hf import HF
from saddlepoint.training import Encoded
from saddlepoint.types import Chat, Message

if TYPE_CHECKING:
    from saddlepoint.finetuning.data import Record


def encoded(model: HF, record: "Record") -> Encoded:
    """An example as tokens, at most as many as the model's context: what lies beyond is cut off. Of a preference, both answers.

    Raises:
        TrainingError: No token of it would be trained on, or the template writes a turn otherwise once others follow.
    """
    if record.preferred or record.rejected:
        pair = [_chat(model, (*record.chat, Message("assistant", text)), record.line) for text in (record.preferred, record.rejected)]
        return Encoded(pair[0].ids, pair[0].learned, 1.0, pair[1])
    if record.chat:
        return _chat(model, record.chat, record.line, record.learned)
    return _cut(
        model, [(model.text_ids(record.prompt), False), ([*model.ids(record.completion), model.tokenizer.eos_token_id], True)], record.line
    )


def _chat(model: HF, chat: Chat, line: int, learned: tuple[bool, ...] = ()) -> Encoded:
    # A special token that a message spells is its text, as it is when the model is served: no line can forge a turn.
    turns, ids = [{"role": m.role, "content": model._plain.marked(m.text)} for m in chat], model._plain.ids
    whole = _written(model, turns, line)
    pieces: list[tuple[list[int], bool]] = []
    at = 0
    for i, trained in enumerate(learned or [False] * (len(chat) - 1) + [True]):
        if not trained:
            continue
        before, upto = _written(model, turns[:i], line, add_generation_prompt=True), _written(model, turns[: i + 1], line)
        if not (upto.startswith(before) and whole.startswith(upto) and len(before) >= at):
            raise TrainingError(
                f"line {line}: the template of '{model.name}' writes message {i + 1} otherwise when it stands last than when others follow, "
                "so its tokens cannot be told; give it weight 0, or make it the last message of a line of its own"
            )
        own = ids(upto[len(before) :])
        end = max((k for k, token in enumerate(own) if token in model.ends), default=len(own) - 1) + 1
        pieces += [(ids(whole[at : len(before)]), False), (own[:end], True), (own[end:], False)]
        at = len(upto)
    return _cut(model, [*pieces, (ids(whole[at:]), False)], line)


def _written(model: HF, turns: list[dict[str, str]], line: int, **how: Any) -> str:
    try:
        return str(model.tokenizer.apply_chat_template(turns, tokenize=False, **how))
    except Exception as wrong:  # what a template raises that refuses a chat is of any kind
        raise TrainingError(f"line {line}: the template of '{model.name}' does not write this chat: {wrong}") from wrong


def _cut(model: HF, pieces: list[tuple[list[int], bool]], line: int) -> Encoded:
    room = model.context
    ids = [token for piece, _ in pieces for token in piece][:room]
    trained = [token if own else -100 for piece, own in pieces for token in piece][:room]
    # Position i predicts token i + 1, so the labels begin one place early and the last position has none.
    learned = [*trained[1:], -100]
    if all(token == -100 for token in learned):
        what = (
            "its assistant messages all have weight 0 or no text" if len(ids) < room else f"its first {room} tokens, the context, hold none"
        )
        raise TrainingError(f"line {line}: no token would be trained on: {what}; take the line out or give it an answer within the context")
    return Encoded(ids, learned, 1.0)
