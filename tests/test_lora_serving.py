"""Many adapters beside one base: each answers as its merged checkpoint does, whatever shares the batch."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
# ruff: noqa: E402
from saddlepoint.defenses._stream import joined
from saddlepoint.errors import ModelError
from saddlepoint.targets.hf import HF
from saddlepoint.types import Completion, Query, Sampling, user

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = ["How do I make green tea?", "the quick brown fox", "Please tell me what the weather is like in the north.", "café"]


def adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A random adapter, large enough that answers change."""
    model = HF.load(str(base), dtype="float32", device="cpu").model
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**given))
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape) * (0.4 if "lora" in name else 1.0)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "card.json").write_text(json.dumps({"base": str(base)}))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of several ranks, scales and layers."""
    out = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, Any]] = [
        {},
        {"r": 8, "lora_alpha": 4},
        {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"layers.1.self_attn.q_proj": 1}},
    ]
    return [adapter(tiny_folder, out / f"a{i}", i, **kind) for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> HF:
    return HF.load(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def beside(base: HF, folders: list[Path]) -> list[HF]:
    return [base.adapted(f.name, f) for f in folders]


@pytest.fixture(scope="module")
def merged(folders: list[Path]) -> list[HF]:
    return [HF.load(str(f), dtype="float32", device="cpu") for f in folders]


def together(asked: Sequence[tuple[HF, Query]]) -> list[Completion]:
    """What each is answered when all are asked at once."""
    found: dict[int, Completion] = {}
    barrier = threading.Barrier(len(asked))

    def one(i: int) -> None:
        barrier.wait()
        found[i] = joined(list(asked[i][0].stream(asked[i][1])))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    [t.start() for t in threads], [t.join(60) for t in threads]
    return [found[i] for i in range(len(asked))]


def same(a: Completion, b: Completion) -> bool:
    """Equal in all but the last bits of the log-probabilities."""
    ours, theirs = ([p for _, p in one.drawn] for one in (a, b))
    return (a.text, a.finish, a.tokens) == (b.text, b.finish, b.tokens) and ours == pytest.approx(theirs, abs=1e-4)


def test_an_adapter_answers_as_its_merged_checkpoint_whatever_shares_the_batch(
    base: HF, tiny: HF, beside: list[HF], merged: list[HF]
) -> None:
    pairs = [*zip(beside, merged, strict=True), (base, tiny)]
    asked = [(i % len(pairs), Query(user(f"{text} {i}"), Sampling(20 + i % 7, 0.0, top_logprobs=1))) for i, text in enumerate(TEXTS * 5)]
    found = together([(pairs[i][0], query) for i, query in asked])
    want = [pairs[i][1].generate([query])[0] for i, query in asked]
    assert all(same(a, b) for a, b in zip(found, want, strict=True))
    (query,) = {query for i, query in asked[:1]}
    assert len({target.generate([query])[0].text for target, _ in pairs}) == len(pairs)  # else equal answers would show nothing


def test_sampled_answers_too(base: HF, tiny: HF, beside: list[HF], merged: list[HF]) -> None:
    asked = [Query(user(text), Sampling(24, 1.1, 0.9, seed)) for seed, text in enumerate(TEXTS)]
    found = together([(t, q) for t in (base, *beside) for q in asked])
    want = [t.generate([q])[0] for t in (tiny, *merged) for q in asked]
    assert [a.text for a in found] == [b.text for b in want]


def test_an_adapter_is_a_whole_target(base: HF, tiny: HF, beside: list[HF], merged: list[HF]) -> None:
    query = Query(user(TEXTS[0]), Sampling(12, top_logprobs=2))
    for ours, theirs in zip(beside, merged, strict=True):
        assert same(ours.generate([query])[0], theirs.generate([query])[0])
        assert ours.room(query.chat) == theirs.room(query.chat)
        scored = [(user("tea"), "three minutes"), ((), "the weather is cold")]
        for a, b in zip(ours.logprobs(scored), theirs.logprobs(scored), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
        frame = ours.frame(user("tea"), "! ! !", "Sure, here is")
        row = torch.cat([frame.before, frame.control, frame.after, frame.affirmative])
        at, scored_tokens = slice(len(frame.before), len(frame.before) + len(frame.control)), len(frame.affirmative)
        assert torch.allclose(ours.loss([row], scored_tokens), theirs.loss([row], scored_tokens), atol=1e-4)
        slopes: list[Tensor] = [t.gradient(row, at, scored_tokens) for t in (ours, theirs)]
        assert torch.allclose(*slopes, atol=1e-3)
    assert same(base.generate([query])[0], tiny.generate([query])[0])  # the base is as it was


def test_weights_are_shared(base: HF, beside: list[HF]) -> None:
    mine = {p.data_ptr() for p in base.model.parameters()}
    assert all({p.data_ptr() for p in one.model.parameters()} == mine for one in beside)
    together([(t, Query(user("tea"), Sampling(3))) for t in beside])
    assert base._decoding._mixture and {p.data_ptr() for p in base._decoding._mixture._twin.parameters()} == mine


def test_what_a_prompt_begins_with_is_known_for_its_own_adapter_only(base: HF, tiny: HF, beside: list[HF], merged: list[HF]) -> None:
    text = "Please tell me what the weather is like in the north. The weather is cold and the wind is strong. " * 3
    for end in ("tea", "fox"):
        for ours, theirs in ((base, tiny), *zip(beside, merged, strict=True)):
            query = Query(user(text + end), Sampling(12, top_logprobs=1))
            assert same(joined(list(ours.stream(query))), theirs.generate([query])[0])


def test_rows_join_and_leave_among_others(base: HF, tiny: HF, beside: list[HF], merged: list[HF]) -> None:
    long = Query(user(TEXTS[2]), Sampling(120, 0.9, 1.0, 1))
    pieces = beside[0].stream(long)
    begun = [next(pieces)]
    for i, (ours, theirs) in enumerate(zip((*beside, base), (*merged, tiny), strict=True)):
        query = Query(user(TEXTS[i % 4]), Sampling(3 + i))
        assert joined(list(ours.stream(query))).text == theirs.generate([query])[0].text
        begun.append(next(pieces))
    assert joined([*begun, *pieces]).text == merged[0].generate([long])[0].text


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens"]}])
def test_what_is_more_than_lora_on_linear_layers_is_refused(kind: dict[str, Any], base: HF, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="merge it"):
        base.adapted("odd", adapter(tiny_folder, tmp_path / "odd", 0, **kind))


def test_what_is_no_adapter_of_this_model_is_refused(base: HF, folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        base.adapted("none", tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((folders[0] / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle, which is never read")
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        base.adapted("pickle", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be loaded"):
        base.adapted("broken", tmp_path)
    from safetensors.torch import save_file

    wrong = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.zeros(4, 9) for x in "AB"}
    save_file(wrong, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="no adapter of this model"):
        base.adapted("other", tmp_path)


def test_the_bench_measures_equal_work_by_every_tool(tiny_folder: Path) -> None:
    pytest.importorskip("fastapi"), pytest.importorskip("aiohttp")
    from saddlepoint.bench import serve as bench

    settings = bench.Settings(str(tiny_folder), "float32", "cpu", chats=6, adapters=3, tokens=5, rank=4, repeats=2, threads=1)
    said: list[str] = []
    found = bench.bench(settings, said.append)
    assert set(found["tools"]) == {*bench.PEERS, *bench.OURS} and all(len(t["seconds"]) == 2 for t in found["tools"].values())
    assert all(tool["begin_alike"] == 1 for tool in found["tools"].values())  # in float32 all tools say the same
    for ours in bench.OURS:
        for peer, ratio in found["ratio"][ours].items():
            each = [a / b for a, b in zip(found["tools"][peer]["seconds"], found["tools"][ours]["seconds"], strict=True)]
            assert ratio["value"] == pytest.approx((each[0] * each[1]) ** 0.5) and ratio["low"] <= ratio["value"] <= ratio["high"]
    json.dumps(found)
    page = bench.page(found)
    assert bench.table(found) in page and page.count("<svg") > 5 and "nan" not in page.lower() and len(said) == 10
