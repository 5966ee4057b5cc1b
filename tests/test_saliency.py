"""Token saliency: each number against a plain computation of what it claims, and its speed's ingredients on a tiny model."""

from typing import TYPE_CHECKING

import pytest

from saddlepoint.errors import UsageError
from saddlepoint.types import Message, user

torch = pytest.importorskip("torch")
from saddlepoint.saliency import _inserted, saliency  # noqa: E402

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

CHAT = user("How do I make green tea?", "You are a helpful assistant.")
SAID = "Sure, here is"


def loss(model: "HF", before: list[int], affirmative: str = SAID) -> float:
    answer = model.ids(affirmative)
    return float(model.loss([torch.tensor(before + answer)], len(answer)))


def test_the_tokens_are_those_of_the_message_and_the_loss_that_of_the_chat(tiny: "HF") -> None:
    found = saliency(tiny, CHAT, SAID, first=99)

    assert "".join(t.text for t in found.tokens) == CHAT[-1].text
    assert found.loss == pytest.approx(loss(tiny, tiny.prompt_ids(CHAT)), abs=1e-4) and found.affirmative == SAID


def test_only_the_first_tokens_of_a_long_affirmative_are_explained(tiny: "HF") -> None:
    begun = tiny.tokenizer.decode(tiny.ids(SAID)[:2])
    short, long = saliency(tiny, CHAT, begun), saliency(tiny, CHAT, SAID, first=2)

    assert long.affirmative == begun and long.loss == pytest.approx(short.loss, abs=1e-5)
    assert [t.leave_one_out for t in long.tokens] == pytest.approx([t.leave_one_out for t in short.tokens], abs=1e-5)


def test_leave_one_out_is_what_the_loss_rises_without_the_token(tiny: "HF") -> None:
    ids = tiny.prompt_ids(CHAT)
    head, _ = tiny.render(CHAT).split(CHAT[-1].text)
    start = len(tiny.ids(head))
    wanted = [loss(tiny, ids[: start + i] + ids[start + i + 1 :]) - loss(tiny, ids) for i in range(len(tiny.ids(CHAT[-1].text)))]
    exact, quick = ([t.leave_one_out for t in saliency(tiny, CHAT, SAID, first=99, exact=e).tokens] for e in (True, False))

    assert exact == pytest.approx(wanted, abs=1e-4)
    assert quick != pytest.approx(wanted, abs=1e-4)  # hidden from the answer only


def test_a_token_hidden_from_the_answer_is_masked_there_and_only_there(tiny: "HF") -> None:
    """The quick number by hand: a full mask in which only the scored places cannot see the token."""
    ids, answer = tiny.prompt_ids(CHAT), tiny.ids(SAID)
    row = torch.tensor(ids + answer)
    head, _ = tiny.render(CHAT).split(CHAT[-1].text)
    start, n = len(tiny.ids(head)), len(row)
    found = saliency(tiny, CHAT, SAID, first=99)
    for i in (0, 3, len(found.tokens) - 1):
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        mask[n - 1 - len(answer) :, start + i] = False
        bias = torch.zeros(1, 1, n, n).masked_fill(~mask, -torch.inf)
        with torch.no_grad():
            logits = tiny.model(input_ids=row[None], attention_mask=bias).logits[0]
        wanted = torch.nn.functional.cross_entropy(logits[-len(answer) - 1 : -1], row[-len(answer) :])
        assert found.tokens[i].leave_one_out == pytest.approx(float(wanted) - found.loss, abs=1e-4)


def test_gradient_times_embedding_and_replacements_are_those_of_an_explicit_gradient(tiny: "HF") -> None:
    ids, answer = tiny.prompt_ids(CHAT), tiny.ids(SAID)
    head, _ = tiny.render(CHAT).split(CHAT[-1].text)
    start, control = len(tiny.ids(head)), tiny.ids(CHAT[-1].text)
    embeds = tiny.embedding[torch.tensor(ids + answer)].clone().requires_grad_()
    with torch.enable_grad():
        logits = tiny.model(inputs_embeds=embeds[None]).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[-len(answer) - 1 : -1], torch.tensor(answer))
        (grad,) = torch.autograd.grad(nll, embeds)
    allowed = tiny.candidates(True)
    found = saliency(tiny, CHAT, SAID, first=99, suggestions=3).tokens
    for i, token in enumerate(found):
        g, own = grad[start + i], tiny.embedding[control[i]]
        assert token.gradient == pytest.approx(-float(g @ own), rel=1e-3, abs=1e-5)
        gains = {t: float(g @ (own - tiny.embedding[t])) for t in allowed.nonzero().flatten().tolist() if t != control[i]}
        best = sorted(gains, key=gains.__getitem__, reverse=True)[:3]
        assert [text for text, _ in token.replacements] == [tiny.tokenizer.decode([t]) for t in best]
        assert [gain for _, gain in token.replacements] == pytest.approx([gains[t] for t in best], rel=1e-3, abs=1e-5)


def test_an_insertion_is_counted_as_a_run_of_flips() -> None:
    grad, control = torch.randn(4, 9, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 1, 4, 2])
    gains = _inserted(grad, control)
    for place in range(4):
        for token in range(9):
            after = [*control[:place].tolist(), token, *control[place:-1].tolist()]
            change = sum(float(grad[j, control[j]] - grad[j, after[j]]) for j in range(4))
            assert float(gains[place, token]) == pytest.approx(change / (2 * (4 - place)) ** 0.5, abs=1e-5)


@pytest.mark.parametrize("chat", [(), (Message("system", "Be kind."),), user(""), user("How?")])
def test_what_cannot_be_explained_is_an_error(tiny: "HF", chat: tuple[Message, ...]) -> None:
    with pytest.raises(UsageError):
        saliency(tiny, chat, "" if chat == user("How?") else SAID)


def test_one_letter_is_explained_too(tiny: "HF") -> None:
    (token,) = saliency(tiny, user("a"), "b").tokens
    assert token.text == "a" and len(token.replacements) == 5
