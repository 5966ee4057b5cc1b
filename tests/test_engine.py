"""The engine below the gradient attacks: shared keys, screens, soft embeddings and frames, each against a plain computation."""

from typing import TYPE_CHECKING, Any

import pytest

from saddlepoint.errors import UsageError
from saddlepoint.types import Chat, Message, Query, Sampling, user

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

TEA = user("How do I make green tea?", "You are a helpful assistant.")
ROWS = [[0, 379, 200, 42, 17 + i, 300, 5 * i + 2, 33, 60, 61 + i] for i in range(5)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("length", [20, 150])  # within one block of keys, and over three
def test_losses_near_a_row_do_not_depend_on_what_was_computed_before(tiny: "HF", exact: bool, length: int) -> None:
    generator = torch.Generator().manual_seed(3)
    near = torch.randint(2, 400, (length,), generator=generator)
    rows = near.repeat(8, 1)
    rows[torch.arange(8), torch.arange(8) + length // 2] = 7
    first = tiny.loss(rows, 4, near, exact)
    tiny.loss(rows[:, 3:], 4, near[3:])
    tiny.gradient(near, slice(5, 9), 4)
    changed = near.clone()
    changed[-1] = 9
    tiny.loss([near[: length - 3], rows[0]], 4, changed)

    assert tiny.loss(rows, 4, near, exact).equal(first)
    if exact:
        assert torch.allclose(first, tiny.loss(rows, 4), atol=1e-4)


def test_a_screen_takes_from_the_near_row_what_lies_between(tiny: "HF") -> None:
    near, row, scored = torch.tensor(ROWS[0]), torch.tensor(ROWS[0]), 2
    row[3] = 77
    (found,) = tiny.loss([row], scored, near, exact=False)

    # Told by hand: the row in full, but in each layer the places 4 to 6 have the keys and values that they had in `near`.
    kept: list[Any] = []
    for chosen, replaced in ((near, False), (row, True)):
        hooks = []
        for i, layer in enumerate(tiny.model.model.layers):
            for name in ("k_proj", "v_proj"):

                def hook(module: Any, given: Any, out: Any, place: int = 2 * i + (name == "v_proj"), replaced: bool = replaced) -> Any:
                    if not replaced:
                        kept.append(out.clone())
                        return out
                    return torch.cat([out[:, :4], kept[place][:, 4:7], out[:, 7:]], dim=1)

                hooks.append(getattr(layer.self_attn, name).register_forward_hook(hook))
        out = tiny.model(input_ids=chosen[None]).logits[0]
        for one in hooks:
            one.remove()
    assert float(found) == pytest.approx(float(F.cross_entropy(out[-3:-1], row[-2:])), abs=1e-4)
    assert float(found) != pytest.approx(float(tiny.loss([row], scored)[0]), abs=1e-4)  # so it is not exact


def test_memory_that_runs_out_makes_smaller_batches(tiny: "HF", monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sizes = torch.randint(2, 400, (64, 20), generator=torch.Generator().manual_seed(1)), []
    wanted = tiny.loss(rows, 4)
    body = tiny.model.base_model.forward

    def full(*args: Any, **inputs: Any) -> Any:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 600:
            raise torch.OutOfMemoryError
        return body(*args, **inputs)

    monkeypatch.setattr(tiny, "_tokens_at_once", 2048)
    monkeypatch.setattr(tiny.model.base_model, "forward", full)

    assert torch.allclose(tiny.loss(rows, 4), wanted, atol=1e-4)
    assert max(sizes) > 600 >= sizes[-1]

    def always(*args: Any, **inputs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tiny.model.base_model, "forward", always)
    with pytest.raises(torch.OutOfMemoryError):
        tiny.loss(rows, 4)


def test_a_model_whose_attention_cannot_be_shared_is_computed_in_full(tiny: "HF", monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from saddlepoint.targets import _tree

    rows = torch.tensor(ROWS)
    wanted, gradient = tiny.loss(rows, 3), tiny.gradient(rows[0], slice(2, 5), 3)
    monkeypatch.setattr(tiny, "_shares", True)
    monkeypatch.setattr(tiny, "_near", None)
    shared = ALL_ATTENTION_FUNCTIONS[_tree.NAME]
    ALL_ATTENTION_FUNCTIONS.register(_tree.NAME, lambda *a, **k: shared(*a, **k, softcap=3.0))
    try:
        assert torch.allclose(tiny.loss(rows, 3, rows[2]), wanted, atol=1e-4) and not tiny._shares
        assert torch.allclose(tiny.gradient(rows[0], slice(2, 5), 3), gradient, atol=1e-5)
    finally:
        ALL_ATTENTION_FUNCTIONS.register(_tree.NAME, shared)


@pytest.mark.parametrize("role", ["user", "system"])
def test_soft_embeddings_of_tokens_are_answered_as_the_tokens(tiny: "HF", role: Any) -> None:
    spoken = (Message("system", "You are a helpful assistant. Be kind"), Message("user", "How do I make tea? the water"))
    chat = []
    for message in spoken:
        text = message.text.rpartition(" ")[0]
        tail = torch.tensor(tiny.ids(message.text[len(text) :]))
        chat.append(Message(message.role, text, tuple(map(tuple, tiny.embedding[tail].tolist()))) if message.role == role else message)
    plain = Query((Message("user", "What is the weather?"),), Sampling(8))

    softened, other = tiny.generate([Query(tuple(chat), Sampling(8)), plain])
    assert softened.text == tiny.generate([Query(spoken, Sampling(8))])[0].text
    assert other == tiny.generate([plain])[0]
    with pytest.raises(UsageError, match="soft embeddings"):
        tiny.prompt_ids(tuple(chat))
    assert "width" in tiny.generate([Query((Message("user", "x", ((1.0,),)),), Sampling(8))])[0].error


def test_soft_loss_of_tokens_is_their_loss_and_its_gradient_that_of_the_tokens(tiny: "HF") -> None:
    frame = tiny.frame(TEA, "the water", "Sure, here is")
    controls = torch.stack([frame.control, frame.control.flip(0)])
    embeds = tiny.embedding[controls].clone().requires_grad_()
    rows = torch.stack([torch.cat([frame.before, c, frame.after, frame.affirmative]) for c in controls])
    scored, at = len(frame.affirmative), slice(len(frame.before), len(frame.before) + len(frame.control))

    with torch.enable_grad():
        losses = tiny.soft_loss(frame, embeds)
        (grad,) = torch.autograd.grad(losses.sum(), embeds)
    assert torch.allclose(losses, tiny.loss(rows, scored), atol=1e-4)
    assert torch.allclose(grad[1] @ tiny.embedding.T, tiny.gradient(rows[1], at, scored), atol=1e-4)


@pytest.mark.parametrize(
    ("chat", "control", "affirmative", "said"),
    [
        ((Message("system", "Be kind."),), "x", "Sure", "the chat has none"),
        (TEA, "x", "", "the affirmative '' has no tokens"),
        (TEA, "x " * 600, "Sure", "reads 512"),
    ],
)
def test_what_cannot_be_framed_is_an_error(tiny: "HF", chat: Chat, control: str, affirmative: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tiny.frame(chat, control, affirmative)


def test_a_prefix_stands_before_the_request(tiny: "HF") -> None:
    frame = tiny.frame(TEA, "the water", "Sure", place="prefix")
    prompt = torch.cat([frame.before, frame.control, frame.after]).tolist()
    placed = tuple(Message(m.role, f"the water {m.text}") if m.role == "user" else m for m in TEA)

    assert tiny.tokenizer.decode(prompt) == tiny.render(placed) and tiny.text(frame.control) == "the water"
