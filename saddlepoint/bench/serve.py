"""Serving many adapters beside transformers' generate with peft: tokens per second of concurrent chats, all in one run.

All answer the same chats, each with its own adapter of one base, greedily, with as many tokens each (the token that ends an answer is ruled
out for all). The peer does it in three ways: a chat at a time with the adapter switched, which is what its users write; the chats of each
adapter in a batch; and all in one batch with `adapter_names`, its own way to mix them, which only an offline job can take, for the batch must
be there at once. Ours streams each chat by itself, as it comes; once within the process, and once over HTTP through the whole service, whose
clients run in the same process and so at its cost. The tools take turns, in an order that changes, and ours knows nothing of the turns
before. Beside the time by the clock stands the processor time of all threads, which tells more where other work shares the cores.
"""

import asyncio
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saddlepoint import __version__
from saddlepoint.bench.gcg import _processor
from saddlepoint.metrics import mean
from saddlepoint.policies import ordinary
from saddlepoint.report import svg
from saddlepoint.types import Query, Sampling, Shaping, user

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

PEERS = ("peft, a chat at a time", "peft, a batch per adapter", "peft, one mixed batch")
OURS = ("saddlepoint", "saddlepoint, over HTTP")
Answers = list[list[int]] | list[str]


@dataclass(frozen=True)
class Settings:
    """What all tools are given.

    Args:
        chats: Answered at once; chat i goes to adapter i modulo `adapters`.
        tokens: Of each answer.
        rank: Of the adapters, on every linear layer; their weights are random, which costs what learned ones cost.
        repeats: Turns of all tools.
    """

    model: str = "smollm2-135m-instruct"
    dtype: str = "bfloat16"
    device: str = "cpu"
    chats: int = 16
    adapters: int = 8
    tokens: int = 48
    rank: int = 16
    repeats: int = 5
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


def bench(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run it and return everything that was measured."""
    import torch

    from saddlepoint.targets.hf import HF

    torch.set_num_threads(settings.threads)
    texts = [*ordinary()["held_out"], *ordinary()["requests"]][: settings.chats]
    base = HF.load(settings.model, settings.dtype, settings.device)
    with tempfile.TemporaryDirectory() as place:
        folders = _adapters(settings, Path(place))
        beside = [base.adapted(folder.name, folder) for folder in folders]
        peer = _Peer(settings, folders)
        prompts = [base.prompt_ids(user(text)) for text in texts]
        own = [beside[i % len(beside)] for i in range(len(texts))]
        with _served(beside, base, texts) as over_http:
            tools: dict[str, Callable[[int], Answers]] = {way: partial(peer.answered, way, prompts) for way in PEERS}
            tools |= {OURS[0]: lambda tokens: _streamed(own, [_query(base, text, tokens) for text in texts]), OURS[1]: over_http}
            seconds: dict[str, list[float]] = {name: [] for name in tools}
            work: dict[str, list[float]] = {name: [] for name in tools}
            answers: dict[str, Answers] = {}
            for answer in tools.values():  # which warms up
                answer(2)
            for turn in range(settings.repeats):
                names = list(tools)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    base.forget()  # what the chats of an earlier turn began with
                    began, worked = time.perf_counter(), time.process_time()
                    answers[name] = tools[name](settings.tokens)
                    seconds[name].append(time.perf_counter() - began)
                    work[name].append(time.process_time() - worked)
                    rate = settings.chats * settings.tokens / seconds[name][-1]
                    say(f"turn {turn + 1} of {settings.repeats}: {name} {rate:.1f} tokens/s")
        texts_of = {name: [a if isinstance(a, str) else base._decoded(a) for a in found] for name, found in answers.items()}
        same = {name: _agreement(texts_of[PEERS[0]], found) for name, found in texts_of.items()}
    return _summary(settings, seconds, work, same)


def _query(base: "HF", text: str, tokens: int) -> Query:
    return Query(user(text), Sampling(tokens), shaping=Shaping(bias=tuple((end, -1e9) for end in sorted(base.ends))))


def _adapters(settings: Settings, place: Path) -> list[Path]:
    """LoRAs with random weights, small enough that text stays text."""
    import torch
    from peft import LoraConfig, get_peft_model

    from saddlepoint.targets.hf import HF

    model = HF.load(settings.model, settings.dtype, settings.device).model
    wrapped = get_peft_model(model, LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear"))
    folders = [place / f"a{i}" for i in range(settings.adapters)]
    for seed, folder in enumerate(folders):
        draws = torch.Generator().manual_seed(seed)
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.data = (torch.randn(p.shape, generator=draws) * (0.05 if "lora_A" in name else 0.02)).to(p)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folders


class _Peer:
    """transformers and peft, with every adapter loaded."""

    def __init__(self, settings: Settings, folders: Sequence[Path]):
        from peft import PeftModel

        from saddlepoint.targets.hf import HF

        self._base = HF.load(settings.model, settings.dtype, settings.device)
        self._names = [folder.name for folder in folders]
        # Not cast to float32, which is the faster way.
        how = {"autocast_adapter_dtype": False}
        self._model = PeftModel.from_pretrained(self._base.model, str(folders[0]), adapter_name=self._names[0], **how)
        for folder in folders[1:]:
            self._model.load_adapter(str(folder), adapter_name=folder.name, **how)
        self._model.eval()

    def answered(self, way: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        names = [self._names[i % len(self._names)] for i in range(len(prompts))]
        if way == PEERS[2]:
            return self._generate(prompts, tokens, adapter_names=names)
        found: dict[int, list[int]] = {}
        groups = [[i] for i in range(len(prompts))]
        if way == PEERS[1]:
            groups = [[i for i, own in enumerate(names) if own == name] for name in dict.fromkeys(names)]
        for group in groups:
            self._model.set_adapter(names[group[0]])
            found |= zip(group, self._generate([prompts[i] for i in group], tokens), strict=True)
        return [found[i] for i in range(len(prompts))]

    def _generate(self, prompts: list[list[int]], tokens: int, **more: Any) -> list[list[int]]:
        import torch

        width, pad = max(map(len, prompts)), self._base.pad
        rows = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self._base.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._base.device)
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": pad}
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            made = self._model.generate(input_ids=rows, attention_mask=mask, **plain, **length, **more)
        answers: list[list[int]] = made[:, width:].tolist()
        return answers


def _streamed(targets: "Sequence[HF]", queries: Sequence[Query]) -> list[str]:
    """Each chat in a thread of its own, as the service does it."""
    found = [""] * len(queries)

    def one(i: int) -> None:
        found[i] = "".join(piece.text for piece in targets[i].stream(queries[i]))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@contextmanager
def _served(beside: "Sequence[HF]", base: "HF", texts: Sequence[str]) -> Iterator[Callable[[int], list[str]]]:
    """The service on loopback; what is yielded asks it for every chat at once, each as a stream."""
    import aiohttp

    from saddlepoint.service.app import Service, create
    from saddlepoint.service.chat import Served
    from saddlepoint.service.server import listening, server

    service = Service.of([Served(target.name, target) for target in beside])
    sock = listening("127.0.0.1", 0)
    runs = server(create(service))
    thread = threading.Thread(target=runs.run, kwargs={"sockets": [sock]})
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1/chat/completions"
    bias = {str(end): -100 for end in base.ends}

    async def one(client: aiohttp.ClientSession, i: int, tokens: int) -> str:
        body = {"model": beside[i % len(beside)].name, "messages": [{"role": "user", "content": texts[i]}], "temperature": 0}
        body |= {"max_tokens": tokens, "stream": True, "logit_bias": bias}
        said = []
        async with client.post(url, json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    said += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
        return "".join(said)

    async def all_of(tokens: int) -> list[str]:
        async with aiohttp.ClientSession() as client:
            return await asyncio.gather(*(one(client, i, tokens) for i in range(len(texts))))

    try:
        yield lambda tokens: asyncio.run(all_of(tokens))
    finally:
        runs.should_exit = True
        thread.join(20)
        service.pool.shutdown()


def _agreement(first: Sequence[str], other: Sequence[str], characters: int = 24) -> float:
    """The share of answers that begin alike: in bfloat16 the last bits depend on what shares a batch, and greedy answers part later."""
    return sum(a[:characters] == b[:characters] for a, b in zip(first, other, strict=True)) / len(first)


def _summary(settings: Settings, seconds: dict[str, list[float]], work: dict[str, list[float]], same: dict[str, float]) -> dict[str, Any]:
    made = settings.chats * settings.tokens
    tools = {
        name: {
            "tokens_per_second": asdict(mean([made / s for s in seconds[name]])),
            "tokens_per_processor_second": asdict(mean([made / s for s in work[name]])),
            "seconds": seconds[name],
            "processor_seconds": work[name],
            "begin_alike": same[name],
        }
        for name in seconds
    }
    by_clock, by_work = ({name: {peer: _ratio(took[peer], took[name]) for peer in PEERS} for name in OURS} for took in (seconds, work))
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "processor": _processor(), "load": os.getloadavg()[0]}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    about = {"saddlepoint": __version__, "versions": versions, "settings": asdict(settings)}
    ratios = {"ratio": by_clock, "ratio_of_processor_time": by_work}
    return {**about, "machine": {**machine, "python": sys.version.split()[0]}, "tools": tools, **ratios}


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times faster, the geometric mean over turns side by side with its 95% bootstrap interval."""
    logs = mean([float(np.log(a / b)) for a, b in zip(theirs, ours, strict=True)])
    return {"value": float(np.exp(logs.value)), "low": float(np.exp(logs.low)), "high": float(np.exp(logs.high)), "n": logs.n}


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    s, m, v = found["settings"], found["machine"], found["versions"]
    lines = [
        f"{s['chats']} chats at once over {s['adapters']} adapters of rank {s['rank']} on {s['model']}, {s['tokens']} tokens each, {s['dtype']}; "
        f"{m['cores']} cores ({m['processor']}), load {m['load']:.1f} at the end; torch {v['torch']}, transformers {v['transformers']}, "
        f"peft {v['peft']}. Means over {s['repeats']} turns with 95% intervals.",
        "",
        "| tool | tokens/s | begin alike | "
        + " | ".join(f"{name} is" for name in OURS)
        + " | tokens per processor second | by processor time |",
        "| --- | --- | --- |" + " --- |" * (len(OURS) + 2),
    ]
    for name, tool in found["tools"].items():
        by_clock = [_times(found["ratio"][ours].get(name)) for ours in OURS]
        by_work = _times(found["ratio_of_processor_time"][OURS[0]].get(name))
        cells = [
            _rate(tool["tokens_per_second"]),
            f"{tool['begin_alike']:.0%}",
            *by_clock,
            _rate(tool["tokens_per_processor_second"]),
            by_work,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(found: dict[str, float]) -> str:
    return f"{found['value']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


def _times(ratio: dict[str, float] | None) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] times this" if ratio else ""


def page(found: dict[str, Any]) -> str:
    """The same with each turn's rate drawn, as one HTML page."""
    made = found["settings"]["chats"] * found["settings"]["tokens"]
    runs = [(i, [(k + 1.0, made / s) for k, s in enumerate(tool["seconds"])]) for i, tool in enumerate(found["tools"].values())]
    css = (Path(svg.__file__).parent / "page.css").read_text(encoding="utf-8")
    legend = " ".join(f"<span>{svg.key(i)} {name}</span>" for i, name in enumerate(found["tools"]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>bench serve</title><style>{css}</style><main>'
        f"<h1>Many adapters beside transformers and peft</h1><pre>{table(found)}</pre><p>{legend}</p>"
        f"<h2>Tokens per second in each turn</h2>{svg.lines(runs, 'turn', 'tokens per second')}</main></html>"
    )
