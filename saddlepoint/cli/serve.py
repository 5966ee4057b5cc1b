"""Serving models behind their guards, fine-tuning them, and what the guards stopped."""

from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from saddlepoint.cli._common import group, say
from saddlepoint.config import Config
from saddlepoint.errors import MissingExtraError, UsageError
from saddlepoint.loop import stacked
from saddlepoint.policies import load as load_policy
from saddlepoint.targets import open_target
from saddlepoint.types import Target

STACK = "hidden_text, classifier_guard"

app = typer.Typer()
blocks_app = group("What the guards of a server stopped.")


@app.command()
def serve(
    target: Annotated[
        list[str], typer.Option(help="A model: organism, hf:ORG/NAME, a folder, http://HOST:PORT/v1#MODEL. Several times for several.")
    ] = ["organism"],  # noqa: B006
    defense: Annotated[
        list[str], typer.Option(help="Defenses, the first innermost; '' for none. Once for all targets, or once for each in their order.")
    ] = [STACK],  # noqa: B006
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone unless told otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    model: Annotated[
        list[str], typer.Option(help="The name under which it is asked, in the order of the targets; the target's if not given.")
    ] = [],  # noqa: B006
    policy: Annotated[str, typer.Option(help="On its train requests defenses are calibrated.")] = "fictional",
    key_file: Annotated[Path | None, typer.Option(help="Keys, a line NAME:KEY each; a new one is made and printed if not given.")] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everybody in who can reach it.")] = False,
    rate: Annotated[float, typer.Option(min=0, help="Requests a minute for each key; 0 is no limit.")] = 0,
    max_body: Annotated[int, typer.Option(min=1, help="Largest body, in bytes.")] = 1 << 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer where the request does not say, in tokens.")] = 512,
    log: Annotated[Path | None, typer.Option(help="Append what guards flagged here, a JSON line each; to stderr if not given.")] = None,
    log_texts: Annotated[bool, typer.Option(help="Log the requests and the withheld answers, which can then be exported.")] = True,
    enforce: Annotated[bool, typer.Option(help="Guards withhold even where a request's `moderation` asks only for scores.")] = True,
    prefill: Annotated[bool, typer.Option(help="Let clients begin the answer (continue_final_message); it breaks many models.")] = False,
    no_tuning: Annotated[bool, typer.Option("--no-tuning", help="Serve only: no files and no fine-tuning jobs.")] = False,
    state: Annotated[
        str, typer.Option(help="A folder for files and jobs, or postgresql+pg8000://USER@HOST/NAME with the password in PGPASSWORD.")
    ] = "",
    files: Annotated[str, typer.Option(help="Where files lie: a folder or a URL of fsspec; in the folder of --state if not given.")] = "",
    max_file: Annotated[int, typer.Option(min=1, help="Largest file that can be uploaded, in bytes.")] = 50 << 20,
    quota: Annotated[int, typer.Option(min=0, help="Bytes that each key may store; 0 is no limit.")] = 10 << 30,
    max_jobs: Annotated[int, typer.Option(min=0, help="Jobs of each key that have not ended; 0 is no limit.")] = 100,
    webhook: Annotated[
        list[str], typer.Option(help="A URL that is told of the ends of jobs, several times for several; no other is told any more.")
    ] = [],  # noqa: B006
    upstream: Annotated[
        str, typer.Option(help="Another server generates: http://HOST:PORT/v1#MODEL, which loads LoRA adapters as vLLM does.")
    ] = "",
    gate: Annotated[
        str,
        typer.Option(
            help="The policy by which fine-tuned models are tested, or a TOML file that says more; 'off' publishes them untested."
        ),
    ] = "fictional",
) -> None:
    """Serve models behind their guards, and fine-tune them, over the protocol of OpenAI."""
    try:
        from saddlepoint.service.adapters import Adapters
        from saddlepoint.service.app import Service, create
        from saddlepoint.service.blocks import BlockLog
        from saddlepoint.service.chat import Served
        from saddlepoint.service.gate import Keys, fresh_key
        from saddlepoint.service.gating import rules
        from saddlepoint.service.routing import Tuning, home
        from saddlepoint.service.server import listening, server
        from saddlepoint.service.setting import OFF
        from saddlepoint.service.upstream import Upstream
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"serving needs {missing.name}: pip install 'saddlepoint[serve]'") from missing
    if no_key and key_file:
        raise UsageError("--no-key and --key-file are given; give one of them")
    if not no_tuning and gate != OFF:
        rules(gate)  # what is wrong with it is told at once, not by each job
    names = [*model, *target[len(model) :]]
    if len(model) > len(target) or len(set(names)) < len(names):
        raise UsageError(f"there are {len(target)} --target and {len(model)} --model; each target needs one name of its own")
    stacks = defense * len(target) if len(defense) == 1 else defense
    if len(stacks) != len(target):
        raise UsageError(f"there are {len(target)} --target and {len(defense)} --defense; give one for all, or one for each")
    with listening(host, port) as sock:  # before the models are opened, so that a port that is taken is told at once
        keys, key = None, ""
        if key_file:
            keys = Keys.read(key_file)
        elif not no_key:
            key = fresh_key()
            keys = Keys.of({"generated": key})
        tuning, secrets, other = None, dict[str, str](), None
        if not no_tuning:
            bases = {name: place for name, place in zip(names, target, strict=True) if _has_weights(place)}
            tuning = Tuning.at(state, files, bases, gate, max_file=max_file, quota=quota, most_jobs=max_jobs)
            secrets = tuning.state.outbox.subscribe(webhook)
        if upstream:
            if tuning is None or len(target) > 1:
                raise UsageError("--upstream stands in for one --target, which is what jobs train on; give one, without --no-tuning")
            other = Upstream(upstream.partition("#")[0], home(state) / "upstream")
        served, opened = [], cache(open_target)  # a target under two names is in memory once
        for name, place, stack in zip(names, target, stacks, strict=True):
            say(f"opening {upstream or place}")
            bare: Target = other.base(upstream.partition("#")[2]) if other else opened(place)
            around = stacked(Config(target=place, defenses=stack, policy=policy), load_policy(policy), bare)
            served.append(Served(name, around, enforce, max_tokens, prefill))
        adapters = None
        if tuning:
            how = (other.load, other.unload) if other else ()
            adapters = Adapters(tuning.state, tuning.blobs, {one.name: one for one in served}, *how)
        service = Service.of(served, adapters=adapters, log=BlockLog(log, log_texts))
        open_hosts = frozenset({host} if no_key else ())
        app = create(service, keys, rate, max_body, open_hosts=open_hosts, tuning=tuning)
        at = sock.getsockname()
        shown = f"[{at[0]}]" if ":" in at[0] else at[0]
        for one in served:
            print(f"http://{shown}:{at[1]}/v1 serves '{one.name}' behind: {', '.join(reversed(one.guards)) or 'no defense'}", flush=True)
        if key:
            print(f"key: {key}", flush=True)
        for url, secret in secrets.items():
            print(f"webhook secret of {url}: {secret}", flush=True)
        server(app).run(sockets=[sock])


def _has_weights(target: str) -> bool:
    """Whether a target's weights lie here, so that it can be trained."""
    return "://" not in target and not target.startswith(("inspect:", "agent:"))


@blocks_app.command("export")
def export(
    log: Annotated[Path, typer.Argument(help="What `saddlepoint serve --log` wrote.")],
    folder: Annotated[Path, typer.Option("--out", help="A new folder: a run and its policy.")],
    policy: Annotated[str, typer.Option(help="Take only requests that name its train hazards, as findings on those.")] = "",
    judge: Annotated[str, typer.Option(help="Judge the withheld answers again by this judge, such as oracle or rubric.")] = "",
) -> None:
    """Bring what guards stopped back into the loop: as findings, and as a policy of train behaviors."""
    from saddlepoint.exchange.blocks import export as write

    for line in write(log, folder, policy, judge):
        print(line)
