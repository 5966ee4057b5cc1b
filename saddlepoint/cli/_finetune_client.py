"""A server of the fine-tuning protocol, asked through OpenAI's own client; and what it says, in the terminal."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saddlepoint.cli._common import err, out, say
from saddlepoint.errors import MissingExtraError, SaddlepointError, TargetError, UsageError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

ENDS = ("succeeded", "failed", "cancelled", "paused")
EVERY = 2.0  # seconds between two questions for news
SHOWN = (
    "id status model fine_tuned_model trained_tokens training_file validation_file result_files hyperparameters method seed created_at "
    "finished_at metadata"
).split()


@contextmanager
def asking(url: str, key: str) -> Iterator["OpenAI"]:
    """The client of a server; what it refuses becomes one line.

    Raises:
        UsageError: The server, or its client, says that the request is wrong.
        TargetError: It does not answer, or fails.
        MissingExtraError: The client is not installed.
    """
    try:
        import openai
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"this command needs {missing.name}: pip install 'saddlepoint[serve]'") from missing
    try:
        with openai.OpenAI(base_url=url, api_key=key or "none") as client:
            yield client
    except openai.APIConnectionError as wrong:
        raise TargetError(
            f"{url} does not answer ({wrong.__cause__ or wrong}); start it: saddlepoint serve; or name another: --url"
        ) from wrong
    except openai.APIStatusError as wrong:
        body = wrong.body if isinstance(wrong.body, dict) else {}
        said = f"{url} says {wrong.status_code}: {body.get('message') or wrong.message}"
        if wrong.status_code == 401:
            said += "; give its key: --key or OPENAI_API_KEY"
        raise (UsageError if wrong.status_code < 500 else TargetError)(said) from wrong
    except openai.OpenAIError as wrong:
        raise TargetError(f"{url}: {wrong}") from wrong
    except SaddlepointError:
        raise
    except ValueError as wrong:  # what the client finds wrong before it asks, such as an empty id
        raise UsageError(f"{url} was not asked: {wrong}") from wrong


def uploaded(client: "OpenAI", file: str) -> str:
    """The id of a file on the server: that of an id as it is, else a local file is uploaded.

    Raises:
        UsageError: There is no such file here.
        TargetError: The server could not take it in.
    """
    if file.startswith("file-") and not Path(file).exists():
        return file
    try:
        with Path(file).open("rb") as data:
            made = client.files.create(file=(Path(file).name, data), purpose="fine-tune")
    except OSError as wrong:
        raise UsageError(f"{file}: cannot be read: {wrong.strerror}; give a JSON Lines file or the id of an uploaded one") from None
    say(f"uploaded {file}: {made.id}")
    try:
        ready = client.files.wait_for_processing(made.id, poll_interval=1.0)
    except RuntimeError as wrong:
        raise TargetError(str(wrong)) from wrong
    if ready.status == "error":
        raise UsageError(f"the server does not take {file}: {ready.status_details or 'it does not say why'}")
    return made.id


def follow(client: "OpenAI", id: str, as_json: bool) -> "FineTuningJob":
    """Print the events of a job as they come, until it ends or is paused; it goes on if this is broken off."""
    seen: set[str] = set()
    try:
        while True:
            job = client.fine_tuning.jobs.retrieve(id)  # before the events, so that none of an ended job is missed
            for event in news(client, id, seen):
                tell(event, as_json)
            if job.status in ENDS:
                return job
            time.sleep(EVERY)
    except KeyboardInterrupt:
        say(f"the job goes on; watch it: saddlepoint finetune events {id} --follow; end it: saddlepoint finetune cancel {id}")
        raise


def news(client: "OpenAI", id: str, seen: set[str]) -> list["FineTuningJobEvent"]:
    """The events that are not in `seen`, the oldest first; they are put into it."""
    found = []
    for event in client.fine_tuning.jobs.list_events(id, limit=100):  # the newest first, page after page
        if event.id in seen:
            break
        found.append(event)
    seen.update(event.id for event in found)
    return found[::-1]


def tell(event: "FineTuningJobEvent", as_json: bool) -> None:
    """Print one event."""
    if as_json:
        print(event.model_dump_json(), flush=True)
        return
    style = {"error": "red", "warn": "yellow"}.get(event.level)
    out.print(f"{clock(event.created_at)}  {event.message}", style=style, markup=False, highlight=False, soft_wrap=True)


def show(job: "FineTuningJob", as_json: bool) -> None:
    """Print a job."""
    if as_json:
        print(job.model_dump_json(indent=1))
        return
    fields = job.model_dump(mode="json", exclude_none=True)
    for name in SHOWN:
        if name in fields and fields[name] not in ([], {}):
            value = clock(fields[name]) if name.endswith("_at") else fields[name]
            out.print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}", markup=False, highlight=False, soft_wrap=True)
    if said := (fields.get("error") or {}).get("message"):
        err.print(f"error: {said}", style="red", markup=False, highlight=False, soft_wrap=True)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under the names of their columns, each cell whole however narrow the terminal is: ids are there to be copied."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        out.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def clock(seconds: Any) -> str:
    """A moment of the protocol, in local time."""
    return datetime.fromtimestamp(int(seconds), UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
