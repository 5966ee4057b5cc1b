"""nanoGCG as a peer in its own environment: one step for each line on standard input, one JSON line about it on standard output.

Run by `saddlepoint bench gcg` with the interpreter of that environment; imports nothing of ours.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import nanogcg
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

say = sys.stdout
sys.stdout = sys.stderr  # what the library prints must not mix with our lines


def tell(**values: Any) -> None:
    say.write(json.dumps(values) + "\n")
    say.flush()


def load(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """Open a model that a newer transformers wrote: an older one finds the rotary base and the tokenizer elsewhere."""
    written = json.loads((folder / "config.json").read_text())
    written.update({k: v for k, v in written.pop("rope_parameters", {}).items() if k == "rope_theta"})
    if written["model_type"] != "llama":
        raise SystemExit(f"nanoGCG's transformers is only given Llama models here, got {written['model_type']}")
    model = AutoModelForCausalLM.from_pretrained(folder, config=LlamaConfig.from_dict(written), torch_dtype=getattr(torch, dtype))
    known = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    # It is given no first token: nanoGCG would take it out of the whole template, where ChatML models begin every turn with it.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=template.read_text() if template.is_file() else known["chat_template"],
        **{k: known[k] for k in ("eos_token", "pad_token", "unk_token") if isinstance(known.get(k), str)},
    )
    return model.to(device).eval(), tokenizer


class Stepped(nanogcg.gcg.GCG):  # type: ignore[misc]
    """The library's search, which waits before each step and reports what it did in it."""

    began = 0.0
    seen: dict[str, Any] = {}
    passed: list[list[int]] = []

    def compute_token_gradient(self, ids: Any) -> Any:
        self.report()
        if not sys.stdin.readline().strip():
            raise SystemExit
        Stepped.began = time.perf_counter()
        return super().compute_token_gradient(ids)

    def report(self) -> None:
        if Stepped.began:
            tell(seconds=time.perf_counter() - Stepped.began, **Stepped.seen)

    def _compute_candidates_loss_original(self, batch: int, embeds: Any) -> Any:
        losses = super()._compute_candidates_loss_original(batch, embeds)
        Stepped.seen = {"candidates": len(losses), "loss": float(losses.min()), "losses": losses.float().tolist(), "ids": Stepped.passed}
        return losses


def noted(*args: Any, **more: Any) -> Any:
    """The library's filter; what it passes on is what will be evaluated."""
    kept = _filter(*args, **more)
    Stepped.passed = kept.tolist()
    return kept


_filter = nanogcg.gcg.filter_ids


def main(given: dict[str, Any]) -> None:
    torch.set_num_threads(given["threads"])
    model, tokenizer = load(Path(given["folder"]), given["dtype"], given["device"])
    nanogcg.gcg.filter_ids = noted
    tell(ready=True, torch=torch.__version__)
    for seed, steps in ((0, 1), *((seed, given["steps"]) for seed in given["seeds"])):  # the first one warms up
        Stepped.began = 0.0
        config = nanogcg.GCGConfig(
            num_steps=steps,
            optim_str_init=given["init"],
            search_width=given["width"],
            topk=given["topk"],
            seed=seed,
            verbosity="ERROR",
        )
        chat = [{"role": "user", "content": given["prompt"] + "{optim_str}"}]
        search = Stepped(model, tokenizer, config)
        search.run(chat, given["affirmative"])
        search.report()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
