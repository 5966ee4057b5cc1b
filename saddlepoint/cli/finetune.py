"""Fine-tuning: a file checked on this machine, and jobs of any server that speaks OpenAI's protocol, through its own client."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.progress import Progress

from saddlepoint.cli import _finetune_client as remote
from saddlepoint.cli._common import Json, err, group, say
from saddlepoint.errors import MissingExtraError, ModelError, UsageError
from saddlepoint.finetuning.data import LEAST, Format, check
from saddlepoint.finetuning.summary import readable

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

app = group("Fine-tune: check a file here; create and watch jobs of `saddlepoint serve`, or of any server with the same protocol.")

Url = Annotated[str, typer.Option("--url", envvar="OPENAI_BASE_URL", help="The server, up to /v1.")]
Key = Annotated[str, typer.Option("--key", envvar="OPENAI_API_KEY", help="Its key.", show_default=False)]
Job = Annotated[str, typer.Argument(help="The job's id, ftjob-...", show_default=False)]
LOCAL, BASE = "http://127.0.0.1:8000/v1", "smollm2-135m-instruct"


@app.command("check")
def finetune_check(
    file: Annotated[Path, typer.Argument(help="The training file: JSON Lines.", show_default=False)],
    validation: Annotated[Path | None, typer.Option(help="The validation file; leaks between the two are found.")] = None,
    base: Annotated[str, typer.Option(help="Count by the tokenizer of this model; '' does not count.")] = BASE,
    format: Annotated[str, typer.Option(help="chat, completion, preference or reinforcement; told from the file if not given.")] = "",
    price_file: Annotated[
        Path | None, typer.Option("--prices", help="TOML: train, input, output (per 1,000 tokens), longest, name.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of training on 1,000 tokens.")] = None,
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--no-measure", help="Time a short training now, or never; else once for each base.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a file: each mistake with line and column, tokens, epochs, cost, time, duplicates, leaks. Exit code 2 if there is a mistake."""
    from saddlepoint.cli import _finetune_report as shown
    from saddlepoint.finetuning.cost import prices
    from saddlepoint.finetuning.report import report

    if format and format not in get_args(Format):
        raise UsageError(f"no format '{format}'; allowed: {', '.join(get_args(Format))}")
    table, model = prices(price_file, train=price), _counting(base)
    with Progress(console=err, transient=True) as bars:
        bar = bars.add_task("counting tokens", total=None)
        tell = lambda done, of: bars.update(bar, total=of, completed=done)
        found = report(file, validation, format or None, model, table, measure, tell)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(shown.plain(found), indent=1))
    else:
        shown.show(found)
    if not found.right:
        raise typer.Exit(2)


def _counting(base: str) -> "HF | None":
    """The model to count by; None where none is asked for, or where the default one cannot be had."""
    if not base:
        return None
    try:
        try:
            from saddlepoint.targets import open_target
            from saddlepoint.targets.hf import HF
        except ModuleNotFoundError as missing:
            raise MissingExtraError(f"counting tokens needs {missing.name}: pip install 'saddlepoint[local]'; or --base ''") from missing
        found = open_target(base)
    except (MissingExtraError, ModelError) as wrong:
        if base != BASE:
            raise
        say(f"tokens are not counted: {wrong}")
        return None
    if not isinstance(found, HF):
        raise UsageError(f"'{base}' has no tokenizer and weights here; give an embedded model, hf:ORG/NAME or a folder, or --base ''")
    return found


@app.command("create")
def finetune_create(
    training: Annotated[str, typer.Argument(help="The training file, or the id of an uploaded one.", show_default=False)],
    model: Annotated[str, typer.Option(help="The base, or an earlier ft:... model to go on from.", show_default=False)],
    validation: Annotated[str, typer.Option(help="The validation file, or the id of an uploaded one.")] = "",
    suffix: Annotated[str, typer.Option(help="Becomes a part of the tuned model's name.")] = "",
    method: Annotated[str, typer.Option(help="supervised, dpo or reinforcement; told from the file if not given.")] = "",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the examples; the server's rule if not given.")] = None,
    batch: Annotated[int | None, typer.Option("--batch-size", min=1, help="Examples of a step; the server's rule if not given.")] = None,
    rate: Annotated[float | None, typer.Option("--learning-rate-multiplier", help="The server's rule if not given.")] = None,
    beta: Annotated[float | None, typer.Option(help="Of dpo; the server's rule if not given.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train every weight in place of a LoRA (saddlepoint serve only).")] = False,
    constraint: Annotated[
        bool, typer.Option("--constraint", help="Hold the first tokens of answers near those of the model (saddlepoint serve only).")
    ] = False,
    safety: Annotated[
        float | None, typer.Option(help="Mix in so many safety examples for each of the file's own (saddlepoint serve only).")
    ] = None,
    grader: Annotated[Path | None, typer.Option(help="Of reinforcement: a JSON file with the grader.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The server draws one if not given.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be given several times.")] = None,
    checked: Annotated[bool, typer.Option("--check/--no-check", help="Check the files here before they are uploaded.")] = True,
    follow: Annotated[bool, typer.Option(help="Print the events until the job ends.")] = True,
    url: Url = LOCAL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Upload the files and create a job. Exit code 1 if the job that is followed does not succeed."""
    formats = [_checked(name, least) for name, least in ((training, LEAST), (validation, 1)) if checked and name and Path(name).is_file()]
    given = {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": rate, "beta": beta}
    given |= {"full": full or None, "constraint": constraint or None, "safety": safety}
    about: dict[str, Any] = {"hyperparameters": {name: value for name, value in given.items() if value is not None}}
    kind = method or {"preference": "dpo", "reinforcement": "reinforcement"}.get(formats[0] if formats else "", "supervised")
    if grader:
        about["grader"] = _json_of(grader)
    with remote.asking(url, key) as client:
        request: dict[str, Any] = {
            "model": model,
            "method": {"type": kind, kind: about},
            "training_file": remote.uploaded(client, training),
        }
        if validation:
            request["validation_file"] = remote.uploaded(client, validation)
        more: dict[str, Any] = {"suffix": suffix or None, "seed": seed, "metadata": _pairs(metadata or [])}
        job = client.fine_tuning.jobs.create(**request, **{name: value for name, value in more.items() if value not in (None, {})})
        if not follow:
            remote.show(job, as_json)
            return
        say(f"created {job.id}")
        _followed(client, job.id, as_json)


@app.command("list")
def finetune_list(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs.")] = 20, url: Url = LOCAL, key: Key = "", as_json: Json = False
) -> None:
    """List jobs, the newest first."""
    with remote.asking(url, key) as client:
        jobs = client.fine_tuning.jobs.list(limit=min(limit, 100))
        some = [job for _, job in zip(range(limit), jobs, strict=False)]
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in some], indent=1))
        return
    rows = [(job.id, job.status, remote.clock(job.created_at), job.model, job.fine_tuned_model or "") for job in some]
    remote.table(("id", "status", "created", "model", "tuned model"), rows)


@app.command("retrieve")
def finetune_retrieve(id: Job, url: Url = LOCAL, key: Key = "", as_json: Json = False) -> None:
    """Show a job."""
    with remote.asking(url, key) as client:
        remote.show(client.fine_tuning.jobs.retrieve(id), as_json)


@app.command("events")
def finetune_events(
    id: Job,
    follow: Annotated[bool, typer.Option(help="Go on until the job ends.")] = False,
    url: Url = LOCAL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Print what happened to a job, the oldest first. With --follow, exit code 1 if it does not succeed."""
    with remote.asking(url, key) as client:
        if follow:
            _followed(client, id, as_json)
            return
        for event in remote.news(client, id, set()):
            remote.tell(event, as_json)


@app.command("checkpoints")
def finetune_checkpoints(id: Job, url: Url = LOCAL, key: Key = "", as_json: Json = False) -> None:
    """List the checkpoints of a job, the last first."""
    with remote.asking(url, key) as client:
        found = list(client.fine_tuning.jobs.checkpoints.list(id))
    if as_json:
        print(json.dumps([checkpoint.model_dump(mode="json") for checkpoint in found], indent=1))
        return
    rows = []
    for checkpoint in found:
        losses = (checkpoint.metrics.train_loss, checkpoint.metrics.full_valid_loss)
        shown = ("" if loss is None else f"{loss:.4f}" for loss in losses)
        rows.append((str(checkpoint.step_number), *shown, checkpoint.fine_tuned_model_checkpoint))
    remote.table(("step", "training loss", "validation loss", "model"), rows)


@app.command("cancel")
def finetune_cancel(id: Job, url: Url = LOCAL, key: Key = "", as_json: Json = False) -> None:
    """End a job."""
    _act("cancel", id, url, key, as_json)


@app.command("pause")
def finetune_pause(id: Job, url: Url = LOCAL, key: Key = "", as_json: Json = False) -> None:
    """Halt a job; it can go on as if it had not been halted."""
    _act("pause", id, url, key, as_json)


@app.command("resume")
def finetune_resume(id: Job, url: Url = LOCAL, key: Key = "", as_json: Json = False) -> None:
    """Let a paused job go on."""
    _act("resume", id, url, key, as_json)


def _act(what: Literal["cancel", "pause", "resume"], id: str, url: str, key: str, as_json: bool) -> None:
    with remote.asking(url, key) as client:
        remote.show(getattr(client.fine_tuning.jobs, what)(id), as_json)


@app.command("release")
def finetune_release(
    id: Job,
    reason: Annotated[str, typer.Option(help="Why it may be published; it goes on the record.", show_default=False)],
    url: Url = LOCAL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Publish a model that the safety gate of `saddlepoint serve` holds; needs an administrator's key."""
    with remote.asking(url, key) as client:
        from openai.types.fine_tuning import FineTuningJob

        remote.show(client.post(f"/saddlepoint/jobs/{id}/release", body={"reason": reason}, cast_to=FineTuningJob), as_json)


def _followed(client: Any, id: str, as_json: bool) -> None:
    job = remote.follow(client, id, as_json)
    if as_json:
        print(job.model_dump_json())  # a line, as the events are
    else:
        remote.show(job, as_json)
    if str(job.status) == "paused":  # which the client's own list of statuses lacks
        say(f"the job is paused; let it go on: saddlepoint finetune resume {id}")
    elif job.status != "succeeded":
        raise typer.Exit(1)


def _checked(file: str, least: int) -> Format:
    """The format of a local file without mistakes.

    Raises:
        UsageError: It has some.
    """
    found = check(Path(file).read_bytes(), least=least)
    if found.mistakes:
        for line in readable(found.mistakes):
            say(line)
        raise UsageError(f"{file} has {len(found.mistakes):,} mistake(s); look at all: saddlepoint finetune check {file}; or: --no-check")
    return found.format


def _json_of(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as wrong:
        raise UsageError(f"{file}: {wrong}; give a JSON file with a grader") from None


def _pairs(given: list[str]) -> dict[str, str]:
    if odd := [pair for pair in given if "=" not in pair]:
        raise UsageError(f"metadata is KEY=VALUE; got '{odd[0]}'")
    return dict(pair.split("=", 1) for pair in given)
