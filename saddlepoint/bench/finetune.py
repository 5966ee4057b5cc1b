"""Fine-tuning beside trl's SFTTrainer with peft: non-padding tokens per second, and what was learned.

Both train the same LoRA of the same base in the same dtype on the same chats, in batches of as many, for as many steps, at the same
learning rate. They take turns, one step each, each in a process of its own, so that whatever else the machine does meets both; on a busy
machine processor time says more than the clock, for a tool that keeps threads in step waits for the last of them. The peer is run as it
comes, which is with gradient checkpointing, and once more without, which is the faster way on a processor with memory to spare.
Every adapter is then asked for the loss of chats that none was trained on. The first step of each run warms up and is not counted.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from saddlepoint import __version__
from saddlepoint.bench._tuning import as_record
from saddlepoint.bench.gcg import _line, _processor
from saddlepoint.errors import UsageError
from saddlepoint.finetuning.data import check
from saddlepoint.metrics import mean
from saddlepoint.models import pull
from saddlepoint.policies import load
from saddlepoint.report import svg

TOOLS = ("trl", "trl, no checkpointing", "saddlepoint")


@dataclass(frozen=True)
class Settings:
    """What every tool is given.

    Args:
        data: A JSONL file of chats, whose last answers are trained on; "" takes `n` of the policy `fictional`, under clearance.
        epochs, batch: As everywhere.
        seeds: A run of each tool for each.
    """

    model: str = "smollm2-135m-instruct"
    data: str = ""
    n: int = 138
    batch: int = 16
    epochs: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass
class Run:
    """One tool on one seed: what each counted step took, read and had for a loss; at the end, the loss on what was held out, in nats."""

    tool: str
    seed: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds of processor time, of all cores
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out: float = float("nan")


def chats(settings: Settings) -> tuple[list[list[dict[str, str]]], list[list[dict[str, str]]]]:
    """What is trained on and what is held out, a fifth of as much.

    Raises:
        UsageError: The file has mistakes.
    """
    if settings.data:
        checked = check(Path(settings.data).read_bytes(), "chat")
        if checked.mistakes:
            raise UsageError(f"{settings.data} has {len(checked.mistakes)} mistakes; see: saddlepoint finetune check {settings.data}")
        made = [[{"role": m.role, "content": m.text} for m in r.chat] for r in checked.records]
    else:
        hazards = [b for b in load("fictional").behaviors if b.kind == "cleared" and b.split == "train"]
        asked = [(wording, b) for k in range(min(len(b.phrasings) for b in hazards)) for b in hazards for wording in [b.phrasings[k]]]
        made = [
            [{"role": "system", "content": b.system}, {"role": "user", "content": wording}, {"role": "assistant", "content": b.answer}]
            for wording, b in asked
        ]
    n = min(settings.n, len(made) * 5 // 6)
    return made[:n], made[n : n + max(1, n // 5)]


def bench(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run it and return everything that was measured.

    Raises:
        SaddlepointError: A tool fails, or the data has mistakes.
    """
    import torch

    from saddlepoint.finetuning.masks import encoded
    from saddlepoint.finetuning.train import ALPHA, LR, RANK
    from saddlepoint.targets.hf import HF

    torch.set_num_threads(settings.threads)
    folder = pull(settings.model, say=say) if not Path(settings.model).is_dir() else Path(settings.model)
    train_on, held_out = chats(settings)
    reader = HF.load(settings.model)  # in the dtype and on the device that training takes
    lengths = [len(encoded(reader, as_record(1, chat)).ids) for chat in train_on]
    steps = -(-len(train_on) // settings.batch) * settings.epochs
    given = {**asdict(settings), "folder": str(folder), "base": settings.model, "chats": train_on, "lengths": lengths, "steps": steps}
    how = {"dtype": str(reader.model.dtype).removeprefix("torch."), "device": reader.device.type}
    given |= how | {"rank": RANK, "alpha": ALPHA, "lr": LR["supervised"]}
    runs: list[Run] = []
    padding = {name: [0, 0] for name in TOOLS}
    with tempfile.TemporaryDirectory() as place:
        for seed in settings.seeds:
            mine = {name: Run(name, seed) for name in TOOLS}
            with ExitStack() as open_:
                peers = {}
                for name in TOOLS:
                    script = Path(__file__).with_name("_tuning.py" if name == "saddlepoint" else "_trl.py")
                    more = {"seed": seed, "out": f"{place}/{name}-{seed}", "checkpointing": name == "trl"}
                    peers[name] = open_.enter_context(
                        subprocess.Popen(
                            [sys.executable, str(script), json.dumps(given | more)],
                            stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL,
                            text=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                        )
                    )
                    _line(peers[name])
                for step in range(steps):
                    for name, peer in peers.items():
                        assert peer.stdin
                        peer.stdin.write("go\n")
                        peer.stdin.flush()
                        row = _line(peer)
                        if step:
                            mine[name].seconds.append(row["seconds"])
                            mine[name].cpu.append(row["cpu"])
                            mine[name].tokens.append(row["tokens"])
                        mine[name].losses.append(row["loss"])
                        padding[name] = [padding[name][0] + row["tokens"], padding[name][1] + row.get("padded", row["tokens"])]
                    speeds = ", ".join(f"{n} {sum(r.tokens) / sum(r.seconds):.0f}" for n, r in mine.items() if r.seconds)
                    say(f"seed {seed}, step {step + 1} of {steps}; tokens per second: {speeds}")
                done = {name: Path(_line(peer)["done"]) for name, peer in peers.items()}
            for name, adapter in done.items():
                mine[name].held_out = _held_out(adapter, settings.model, held_out)
            runs += mine.values()
        before = _held_out(None, settings.model, held_out)
    return _summary(
        settings,
        runs,
        {n: 1 - read / wide for n, (read, wide) in padding.items()},
        before,
        {**how, "held_out": len(held_out), "tokens": sum(lengths)},
    )


def _held_out(adapter: Path | None, base: str, held_out: list[list[dict[str, str]]]) -> float:
    """Mean cross-entropy in nats of the answers' tokens, in float32, by one reader for all tools; of the base itself without an adapter."""
    import torch

    from saddlepoint.finetuning.masks import encoded
    from saddlepoint.targets.hf import HF
    from saddlepoint.training import nll

    if adapter and not (adapter / "card.json").is_file():
        (adapter / "card.json").write_text(json.dumps({"base": base, "trained_on": []}))
    model = HF.load(str(adapter or base), "float32")
    with torch.no_grad():
        return float(torch.cat([nll(model, [encoded(model, as_record(1, chat))]) for chat in held_out]).mean())


def _summary(settings: Settings, runs: Sequence[Run], padding: dict[str, float], before: float, how: dict[str, Any]) -> dict[str, Any]:
    tools = {}
    for name in TOOLS:
        mine = [r for r in runs if r.tool == name]
        rates = [t / s for r in mine for t, s in zip(r.tokens, r.seconds, strict=True)]
        tools[name] = {
            "tokens_per_second": asdict(mean(rates)),
            "tokens_per_cpu_second": asdict(mean([t / s for r in mine for t, s in zip(r.tokens, r.cpu, strict=True)])),
            "padding": padding[name],
            "updates": [len(r.losses) for r in mine],
            "train_loss_first": [r.losses[0] for r in mine],
            "train_loss_last": [r.losses[-1] for r in mine],
            "held_out_loss": [r.held_out for r in mine],
            "runs": [asdict(r) for r in mine],
        }
    return {
        "peer": f"trl {version('trl')}, peft {version('peft')}, transformers {version('transformers')}, torch {version('torch')}",
        "saddlepoint": __version__,
        "settings": asdict(settings) | how,
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "load": os.getloadavg()[2], "python": sys.version.split()[0]},
        "tools": tools,
        "ratio": {name: _ratio(runs, name, "seconds") for name in TOOLS[:-1]},
        "ratio_cpu": {name: _ratio(runs, name, "cpu") for name in TOOLS[:-1]},
        "held_out_before": before,
    }


def _ratio(runs: Sequence[Run], peer: str, by: str) -> dict[str, float]:
    """Our tokens per second, by the clock or of processor time, over a peer's: geometric mean of the steps that stood side by side, with a 95% interval."""
    logs: list[float] = []
    for ours in (r for r in runs if r.tool == "saddlepoint"):
        (theirs,) = (r for r in runs if r.tool == peer and r.seed == ours.seed)
        a, b = (np.log(np.array(r.tokens) / np.array(getattr(r, by))) for r in (ours, theirs))
        logs += (a - b).tolist()
    found = mean(logs)
    return {"value": float(np.exp(found.value)), "low": float(np.exp(found.low)), "high": float(np.exp(found.high)), "n": found.n}


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    s, m = found["settings"], found["machine"]
    lines = [
        f"{s['model']}, {s['dtype']}, {s['device']}, {s['threads']} threads, {m['processor']}, load {m['load']:.1f}; {s['data'] or 'fictional'}: "
        f"{s['tokens']} tokens an epoch, batch {s['batch']}, {s['epochs']} epochs, {len(s['seeds'])} seeds; {found['peer']}",
        "",
        "| tool | non-padding tokens/s [95%] | times as fast is saddlepoint [95%] | tokens per s of processor time | times | padding | "
        "train loss, first and last step | held-out loss by seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, tool in found["tools"].items():
        speeds = []
        for rate, ratio in (("tokens_per_second", "ratio"), ("tokens_per_cpu_second", "ratio_cpu")):
            own, r = tool[rate], found[ratio].get(name)
            speeds.append(f"{own['value']:.0f} [{own['low']:.0f}, {own['high']:.0f}]")
            speeds.append(f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}], n={r['n']}" if r else "1")
        losses = "; ".join(f"{a:.2f} to {b:.2f}" for a, b in zip(tool["train_loss_first"], tool["train_loss_last"], strict=True))
        held = ", ".join(f"{x:.3f}" for x in tool["held_out_loss"])
        lines.append(f"| {name} | {' | '.join(speeds)} | {tool['padding']:.0%} | {losses} | {held} |")
    lines += [
        "",
        f"Held-out loss of the base: {found['held_out_before']:.3f} nats, {s['held_out']} chats; updates of each run: {_updates(found)}",
    ]
    return "\n".join(lines)


def _updates(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tool['updates'][0]}" for name, tool in found["tools"].items())


def page(found: dict[str, Any]) -> str:
    """The same with the loss over steps and over seconds, as one HTML page."""
    names = list(found["tools"])
    runs = [(i, r) for i, n in enumerate(names) for r in found["tools"][n]["runs"]]
    steps = [(i, [(k + 1.0, float(x)) for k, x in enumerate(r["losses"])]) for i, r in runs]
    seconds = [(i, list(zip(np.cumsum(r["seconds"]).tolist(), r["losses"][1:], strict=True))) for i, r in runs]
    css = (Path(svg.__file__).parent / "page.css").read_text(encoding="utf-8")
    legend = " ".join(f"<span>{svg.key(i)} {n}</span>" for i, n in enumerate(names))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>bench finetune</title><style>{css}</style><main><h1>Fine-tuning beside trl</h1>'
        f"<pre>{table(found)}</pre><p>{legend}</p><h2>Training loss in nats over steps</h2>{svg.lines(steps, 'step', 'loss over steps')}"
        f"<h2>Training loss in nats over seconds</h2>{svg.lines(seconds, 'seconds', 'loss over seconds')}</main></html>"
    )
