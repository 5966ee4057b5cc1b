"""Measurements beside other tools and of the whole matrix of defenses."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saddlepoint.cli._common import Json, group, say
from saddlepoint.errors import MissingExtraError, UsageError

app = group("Speed beside other tools, in one run.")


@app.command("gcg")
def bench_gcg(
    model: Annotated[str, typer.Option(help="An embedded model or a folder with a Llama model.")] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "",
    width: Annotated[int, typer.Option(min=1, help="Candidates in a step.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each tool on each seed.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the JSON and the page.")] = Path("runs/bench-gcg"),
    as_json: Json = False,
) -> None:
    """Measure gcg beside nanoGCG 0.3.0 in one run: candidates per second, and the loss over steps and seconds."""
    try:
        import torch

        from saddlepoint.bench import gcg as bench
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"bench needs {missing.name}: pip install 'saddlepoint[local]'") from missing
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = bench.Settings(model, dtype, device, width, steps=steps, seeds=tuple(range(seeds)))
    found = bench.bench(settings, say)
    _write_bench(found, bench, out_folder, as_json)


@app.command("engine")
def bench_engine(
    prompts: Annotated[int, typer.Option(min=64, help="Requests of each tool in each turn.")] = 2000,
    flight: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="Turns; the peers take part in every third.")] = 5,
    peers: Annotated[str, typer.Option(help="Which peers: pyrit, garak, both, or '' for the bare loop alone.")] = "pyrit, garak",
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the JSON and the page.")] = Path("runs/bench-engine"),
    as_json: Json = False,
) -> None:
    """Measure the driver's requests per second beside a bare aiohttp loop, PyRIT and garak, in one run."""
    from saddlepoint.bench import engine as bench

    chosen = tuple(name.strip() for name in peers.split(",") if name.strip())
    if unknown_peers := [name for name in chosen if name not in bench.PEERS]:
        raise UsageError(f"no peer '{unknown_peers[0]}'; allowed: {', '.join(bench.PEERS)}")
    settings = bench.Settings(prompts, flight, turns=turns, peers=chosen)
    _write_bench(bench.bench(settings, say), bench, out_folder, as_json)


def _write_bench(found: dict[str, Any], bench: Any, folder: Path, as_json: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (folder / "bench.html").write_text(bench.page(found), encoding="utf-8")
    print(json.dumps(found, indent=1) if as_json else bench.table(found))
    say(f"page: {(folder / 'bench.html').resolve()}")


@app.command("first-token")
def bench_first_token(
    target: Annotated[str, typer.Option(help="A model that streams.")] = "organism",
    defense: Annotated[str, typer.Option(help="The guards around it, the first innermost.")] = "hidden_text, classifier_guard",
    policy: Annotated[str, typer.Option(help="On its train requests defenses are calibrated.")] = "fictional",
    n: Annotated[int, typer.Option("-n", min=20, help="Requests.")] = 100,
    as_json: Json = False,
) -> None:
    """Measure what guards add to a model's time to first token: with and without them in turns."""
    from saddlepoint.bench import first_token as bench

    found = bench.bench(target, defense, policy, n, say)
    print(json.dumps(found, indent=1) if as_json else bench.table(found))


@app.command("defenses")
def bench_defenses(
    defenses: Annotated[
        list[str] | None, typer.Argument(help="Stacks, each as --defenses takes it; every registered defense by itself if none is given.")
    ] = None,
    target: Annotated[str, typer.Option(help="The system that is defended.")] = "organism",
    policy: Annotated[str, typer.Option(help="Its test hazards are attacked.")] = "fictional",
    attacks: Annotated[str, typer.Option(help="The attacks that every stack meets.")] = "",
    weights: Annotated[bool, typer.Option(help="Attack with weights too what can be searched through.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many hazards.")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the runs, the JSON and the page; go on with it by the same.")] = Path(
        "runs/bench-defenses"
    ),
    as_json: Json = False,
) -> None:
    """Measure the whole matrix of defenses and attacks: ASR static and adaptive, over-refusal, utility, added time and tokens."""
    try:
        from saddlepoint.bench import defenses as bench
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"bench needs {missing.name}: pip install 'saddlepoint[local]'") from missing
    settings = bench.Settings(
        tuple(defenses or bench.everything()),
        target,
        policy,
        attacks or bench.ATTACKS,
        bench.WEIGHTS if weights else "",
        limit,
    )
    _write_bench(bench.bench(settings, out_folder, say), bench, out_folder, as_json)


@app.command("finetune")
def bench_finetune(
    model: Annotated[str, typer.Option(help="An embedded model or a folder with a model.")] = "smollm2-135m-instruct",
    data: Annotated[str, typer.Option(help="A JSONL file of chats; the last answer of each is trained on.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Chats in a step.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the chats.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each tool.")] = 3,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the JSON and the page.")] = Path("runs/bench-finetune"),
    as_json: Json = False,
) -> None:
    """Measure fine-tuning beside trl's SFTTrainer with peft in one run: non-padding tokens per second, and the losses of both."""
    try:
        import trl  # noqa: F401

        from saddlepoint.bench import finetune as bench
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"bench needs {missing.name}: pip install 'saddlepoint[train]'") from missing
    settings = bench.Settings(model, data, batch=batch, epochs=epochs, seeds=tuple(range(seeds)))
    _write_bench(bench.bench(settings, say), bench, out_folder, as_json)


@app.command("serve")
def bench_serve(
    model: Annotated[str, typer.Option(help="An embedded model or a folder with a model.")] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "",
    chats: Annotated[int, typer.Option(min=1, max=64, help="Chats that are answered at once.")] = 16,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters that they are spread over.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each tool that count.")] = 5,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the JSON and the page.")] = Path("runs/bench-serve"),
    as_json: Json = False,
) -> None:
    """Measure serving many adapters beside transformers' generate with peft in one run: tokens per second of concurrent chats."""
    try:
        import fastapi  # noqa: F401
        import torch

        from saddlepoint.bench import serve as bench
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"bench needs {missing.name}: pip install 'saddlepoint[local,serve]'") from missing
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = bench.Settings(model, dtype, device, chats, adapters, tokens, repeats=repeats)
    _write_bench(bench.bench(settings, say), bench, out_folder, as_json)
