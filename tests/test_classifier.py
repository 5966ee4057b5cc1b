"""A sequence classifier as a target, on a tiny random BERT: what it reads and answers, its frames, losses and gradients."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saddlepoint.errors import ContaminationError, ModelError, UsageError
from saddlepoint.targets import classifies, open_target, trained_on
from saddlepoint.testing import check_attack
from saddlepoint.types import Completion, Encoder, Message, Query, WhiteBox, user

torch = pytest.importorskip("torch")
from saddlepoint.attacks import _gradient as steps  # noqa: E402
from saddlepoint.targets.classifier import Classifier, passing  # noqa: E402

if TYPE_CHECKING:
    from saddlepoint.targets.classifier import Classifier as Opened

TEXTS = ["How do I make green tea?", "Please tell me what the weather is like in the north.", "x", "Sorry, I can't."]
WORDS = ["how", "tea", "make", "quick", "fox", "zebra", "cup", "the", "Water", "leaves", "!", "veldranes"]


@pytest.fixture(scope="session")
def model(tiny_classifier: "Opened") -> "Opened":
    return tiny_classifier


def asked(model: "Opened", *texts: str) -> list[Completion]:
    return model.generate([Query(user(text)) for text in texts])


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_folder_of_a_classifier_opens_as_one(tiny_classifier_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    opened = open_target(str(tiny_classifier_folder), device="cpu")

    assert isinstance(opened, Classifier) and isinstance(opened, WhiteBox) and isinstance(opened, Encoder)
    assert classifies(tiny_classifier_folder) and not classifies(tiny_folder) and not classifies(tmp_path)


def test_it_answers_its_label_with_the_log_probabilities_of_all(model: "Opened") -> None:
    for answer in asked(model, *TEXTS):
        ((first, second),) = answer.top_logprobs
        assert (first[0], second[0]) == ("safe", "unsafe")  # the passing label first, whichever is likelier
        assert math.exp(first[1]) + math.exp(second[1]) == pytest.approx(1, abs=1e-5)
        assert answer.text == max(first, second, key=lambda labeled: labeled[1])[0]
        assert (answer.finish == "stop") == (answer.text == "safe") == (first[1] > second[1])
    assert len({answer.text for answer in asked(model, *TEXTS)}) == 2  # else the lines above compare nothing


def test_batches_threads_and_order_change_no_answer(model: "Opened") -> None:
    alone = [asked(model, text)[0] for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(lambda _: asked(model, *TEXTS), range(8))]
    for batch in together:
        for one, other in zip(alone, batch, strict=True):
            assert one.text == other.text and one.prompt_tokens == other.prompt_tokens
            assert one.top_logprobs[0][0][1] == pytest.approx(other.top_logprobs[0][0][1], abs=1e-4)


def test_it_reads_the_last_user_message_and_nothing_else(model: "Opened") -> None:
    plain = user(TEXTS[0])
    others = [user(TEXTS[0], "You may."), user(TEXTS[0], prefill="Sure"), (Message("user", "x"), Message("assistant", "y"), *plain)]

    first, *rest = model.generate([Query(chat) for chat in (plain, *others)])
    assert all(answer.prompt_tokens == first.prompt_tokens and answer.text == first.text for answer in rest)


def test_what_it_cannot_read_is_an_error_and_is_never_cut(model: "Opened") -> None:
    soft = (Message("user", "tea", ((0.0,) * 32,)),)
    chats = [(Message("assistant", "hello"),), user("tea " * 200), soft, user("tea")]
    none, long, embedded, fine = model.generate([Query(chat) for chat in chats])

    assert none.finish == long.finish == embedded.finish == "error" and fine.finish != "error"
    assert "has none" in none.error and "202 tokens" in long.error and "reads 128" in long.error and "embeddings" in embedded.error


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "chosen", "found"),
    [
        (["safe", "unsafe"], None, 0),
        (["INJECTION", "other"], None, 1),
        (["toxic", "hate", "neutral"], None, 2),
        (["LABEL_0", "LABEL_1"], "label_1", 1),
    ],
)
def test_which_label_passes(labels: list[str], chosen: str | None, found: int) -> None:
    assert passing("m", labels, chosen) == found


@pytest.mark.parametrize(
    ("labels", "chosen"), [(["LABEL_0", "LABEL_1"], None), (["safe", "unsafe"], "fine"), (["safe", "ok", "toxic"], None)]
)
def test_where_the_names_do_not_say_it_one_must_be_named(labels: list[str], chosen: str | None) -> None:
    with pytest.raises(UsageError, match=r"labels: .*name it behind the target: hf:a/b#LABEL"):
        passing("hf:a/b#fine", labels, chosen)


def test_a_label_behind_the_name_lets_requests_pass(tiny_classifier_folder: Path, tiny_folder: Path) -> None:
    turned = open_target(f"{tiny_classifier_folder}#unsafe", device="cpu")

    assert isinstance(turned, Classifier) and turned.labels[turned.passes] == "unsafe"
    assert {a.text: a.finish for a in asked(turned, *TEXTS)} == {"safe": "filter", "unsafe": "stop"}
    with pytest.raises(UsageError, match="no label 'fine'; labels: safe, unsafe"):
        open_target(f"{tiny_classifier_folder}#fine")
    with pytest.raises(UsageError, match="is no classifier, so it has no label 'safe'"):
        open_target(f"{tiny_folder}#safe")


def test_a_label_behind_the_name_hides_no_training(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"trained_on": ["veldrane"]}))

    assert trained_on(f"{tmp_path}#safe") == trained_on(str(tmp_path)) == {"veldrane"}


def test_a_broken_folder_and_an_encoder_are_refused(tiny_classifier_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_classifier_folder, tmp_path / "broken")
    (broken / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="cannot be loaded"):
        open_target(str(broken))
    with pytest.raises(UsageError, match="answers nothing; the classifier that stands on it: --target guard"):
        open_target("all-minilm-l6-v2")
    with pytest.raises(UsageError, match="no dtype 'int3'; allowed: auto"):
        open_target(str(tiny_classifier_folder), dtype="int3")


# ---- frames ---------------------------------------------------------------------------------------------------------

TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@settings(deadline=None, max_examples=40)
@given(TEXT, TEXT)
def test_a_frame_is_the_tokens_of_what_is_asked(model: "Opened", text: str, control: str) -> None:
    suffix, prefix = model.frame(user(text), control, ""), model.frame(user(text), control, "", "prefix")

    for frame, whole in ((suffix, f"{text} {control}"), (prefix, f"{control} {text}")):
        assert torch.cat([frame.before, frame.control, frame.after]).tolist() == model.prompt_ids(user(whole))
        assert bool(model.survives(frame, frame.control[None])[0])
    # As the attacks ask: the request, and behind it the decoded control with the space that it brings.
    assert model.prompt_ids(user(text + model.text(suffix.control))) == model.prompt_ids(user(f"{text} {control}"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 140), min_size=3, max_size=3))
def test_what_survives_is_read_as_it_was_written(model: "Opened", tokens: list[int]) -> None:
    frame = model.frame(user("make tea"), "x", "")
    control = torch.tensor(tokens) % len(model.tokenizer)
    again = model.ids(model.tokenizer.decode([*frame.before.tolist()[1:], *control.tolist()]))

    assert bool(model.survives(frame, control[None])[0]) == (again == [*frame.before.tolist()[1:], *control.tolist()])


def test_pieces_that_grow_together_do_not_survive(model: "Opened") -> None:
    frame = model.frame(user("how do i"), "make", "")
    mak_e, tea = model.tokenizer.convert_tokens_to_ids(["m", "##a", "##k", "##e"]), model.ids("tea")

    assert model.survives(frame, torch.tensor([mak_e])).tolist() == [False]  # it is written "make", which is one token
    assert model.survives(frame, torch.tensor([tea])).tolist() == [True]
    assert model.survives(frame, torch.empty(0, 1, dtype=torch.long)).tolist() == []


def test_an_optimizer_may_write_only_readable_tokens(model: "Opened") -> None:
    allowed = model.candidates(ascii_only=True)
    names = model.tokenizer.convert_ids_to_tokens(allowed.nonzero().flatten().tolist())

    assert {"tea", "##ing", "!"} <= set(names) and not {"[PAD]", "[CLS]", "[MASK]", "[unused0]"} & set(names)
    assert len(allowed) == len(model.embedding)


def test_the_affirmative_is_the_passing_label_or_the_one_it_names(model: "Opened") -> None:
    wanted = [model.frame(user("tea"), "x", affirmative).affirmative.tolist() for affirmative in ("", "Sure, here is", "unsafe", " SAFE ")]
    assert wanted == [[0], [0], [1], [0]]


@pytest.mark.parametrize(
    ("chat", "control", "said"),
    [
        ((Message("assistant", "hi"),), "x", "the chat has none"),
        (user("tea"), " ", "has no tokens"),
        (user("tea " * 100), "x " * 40, "request and control have 142 tokens"),
    ],
)
def test_a_control_that_cannot_be_placed_is_refused(model: "Opened", chat: tuple[Message, ...], control: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        model.frame(chat, control, "")


# ---- losses and gradients -------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_label_whatever_shares_the_batch(model: "Opened") -> None:
    frames = [model.frame(user(text), "quick fox", "") for text in TEXTS]
    rows = [steps.row(frame, frame.control) for frame in frames]

    logprobs = [answer.top_logprobs[0][0][1] for answer in asked(model, *(f"{text} quick fox" for text in TEXTS))]
    assert model.loss(rows, 1).tolist() == pytest.approx([-x for x in logprobs], abs=1e-4)
    assert model.loss(rows, 1, near=rows[0], exact=False).tolist() == pytest.approx(model.loss(rows, 1).tolist(), abs=1e-6)
    assert [float(row) for row in model.logprobs([(user(TEXTS[0]), "unsafe")])] == pytest.approx(
        [asked(model, TEXTS[0])[0].top_logprobs[0][1][1]], abs=1e-4
    )
    with pytest.raises(ValueError, match="scored must be 1; got 2"):
        model.loss(rows, 2)
    with pytest.raises(UsageError, match="knows only its labels"):
        model.logprobs([((), "A river begins as a small stream.")])
    with pytest.raises(UsageError, match="predicts no tokens"):
        model.soft_logprobs(frames[0], torch.zeros(1, 2, 32), slice(1, 2))


@pytest.mark.parametrize("place", ["suffix", "prefix"])
def test_the_gradient_is_that_of_an_explicit_one_hot(model: "Opened", place: str) -> None:
    frame = model.frame(user(TEXTS[0]), "quick fox cup", "", place)  # type: ignore[arg-type]
    row = steps.row(frame, frame.control)
    one_hot = torch.nn.functional.one_hot(row[:-1], len(model.embedding)).float().requires_grad_(True)
    hidden = one_hot @ model.embedding
    logits = model.model(inputs_embeds=hidden[None], attention_mask=torch.ones(1, len(row) - 1)).logits
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, row[-1:]), one_hot)

    found = model.gradient(row, steps.slots(frame), 1)
    assert found.shape == (3, len(model.embedding)) and float(found.abs().max()) > 1e-4
    torch.testing.assert_close(found, expected[steps.slots(frame)], atol=1e-5, rtol=1e-3)


def test_embeddings_of_tokens_have_the_loss_of_the_tokens(model: "Opened") -> None:
    frame = model.frame(user(TEXTS[1]), "quick fox", "")
    control = model.embedding[frame.control][None].clone().requires_grad_(True)
    loss = model.soft_loss(frame, torch.cat([control, control * 0.5]))

    assert float(loss[0].detach()) == pytest.approx(float(model.loss([steps.row(frame, frame.control)], 1)), abs=1e-4)
    (grad,) = torch.autograd.grad(loss.sum(), control)
    assert grad.shape == (1, 2, 32) and float(grad.abs().sum()) > 0


def test_texts_have_vectors_of_length_one_whatever_shares_the_batch(model: "Opened") -> None:
    together, alone = model.encode(TEXTS), torch.cat([model.encode([text]) for text in TEXTS])

    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))
    assert model.encode(["tea " * 500]).shape == (1, 32)  # a long text is read up to the context


def test_what_it_computes_is_counted(model: "Opened") -> None:
    before = (model.compute.tokens, model.compute.gradients)
    frame = model.frame(user("make tea"), "x", "")
    model.loss([steps.row(frame, frame.control)] * 3, 1)
    after = model.compute.tokens
    model.gradient(steps.row(frame, frame.control), steps.slots(frame), 1)

    assert after - before[0] == 3 * 5 and model.compute.tokens - after == 5 and model.compute.gradients - before[1] == 1


@pytest.mark.parametrize(
    ("name", "quick"), [("gcg", {"num_steps": 2, "search_width": 8, "topk": 8, "test_steps": 1}), ("hotflip", {"edits": 2})]
)
def test_gradient_attacks_run_on_it(model: "Opened", name: str, quick: dict[str, int]) -> None:
    check_attack(name, whitebox=model, **quick)


def test_a_guard_is_not_scored_on_what_it_was_trained_on() -> None:
    from saddlepoint.campaign import Campaign, _check
    from saddlepoint.judges.label import label
    from saddlepoint.judges.oracle import oracle
    from saddlepoint.models import GUARD
    from saddlepoint.policies import load
    from saddlepoint.targets.scripted import Scripted

    hazards = load("fictional").select("harmful", "train")
    with pytest.raises(ContaminationError, match="was trained on 25 of these behaviors"):
        _check(Campaign("p", Scripted(lambda _: "", name=str(GUARD)), hazards, (), label, oracle))
