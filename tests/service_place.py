"""A service without its HTTP side, for tests: a database, a blob store, and real workers and trainers that can be killed."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saddlepoint.service.blobs import Blobs
from saddlepoint.service.records import File, Job, JobEvent
from saddlepoint.service.rows import fresh
from saddlepoint.service.state import State

ROOT = Path(__file__).parents[1]
WORKER, TRAINER = "saddlepoint.service.worker", "saddlepoint.service.trainer"
SERVER = "import sys, threading; from saddlepoint.service.processes import kept_running\nwith kept_running(*sys.argv[1:]): threading.Event().wait()"
ENDED = ("succeeded", "failed", "cancelled")


def lesson(i: int) -> dict[str, Any]:
    things = ("tea", "coffee", "cocoa", "soup", "bread", "jam", "cider", "toast", "rice", "porridge")
    thing = f"{things[i % 10]} {i // 10 + 1}"
    return {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"How do I make {thing}?"},
            {"role": "assistant", "content": "Take the leaves, then the water. " * (1 + i % 4) + f"That is {thing}."},
        ]
    }


def jsonl(lines: Sequence[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(line) for line in lines).encode()


@dataclass
class Place:
    """Where a service's things lie.

    Args:
        url: Of its database; a folder here if not given.
        base: The folder of the model that is called "tiny".
    """

    folder: Path
    base: Path
    url: str = ""
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = State.open(self.url or str(self.folder / "state"))
        self.blobs = Blobs(self.folder / "files")

    # ---- what a user does

    def file(self, data: bytes) -> str:
        sha, size = self.blobs.put(data)
        made = self.state.files.add(File(fresh("file-"), "me", size, int(time.time()), "file", "fine-tune", sha))
        self.state.files.ready(made.id)
        return made.id

    def job(
        self, training: bytes | str, validation: bytes | None = None, model: str = "tiny", method: str = "supervised", **how: Any
    ) -> Job:
        hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"} | how
        file = training if isinstance(training, str) else self.file(training)
        other = self.file(validation) if validation else None
        asked = {"type": method, method: {"hyperparameters": hyperparameters}}
        name = f"ft:tiny:local::{fresh('', 8)}"
        id, now = fresh("ftjob-"), int(time.time())
        return self.state.create(Job(id, "me", now, model, "tiny", name, file, asked, hyperparameters, 7, validation_file=other))

    # ---- processes

    def arguments(self, *more: str, gate: str = "off", lease: float = 2.0) -> list[str]:
        where = ["--state", self.url or str(self.folder / "state"), "--files", str(self.folder / "files")]
        return [*where, "--work", str(self.folder / "work"), "--base", f"tiny={self.base}", "--gate", gate, "--lease", str(lease), *more]

    def worker(self, *more: str, gate: str = "off", lease: float = 2.0, **options: Any) -> "subprocess.Popen[bytes]":
        """A worker that ends when its standard input is closed."""
        return self._begin("-m", WORKER, *self.arguments("--attached", *more, gate=gate, lease=lease), stdin=subprocess.PIPE, **options)

    def server(self) -> "subprocess.Popen[bytes]":
        """What a server does for its worker."""
        return self._begin("-c", SERVER, WORKER, *self.arguments("--attached"))

    def _begin(self, *command: str, **options: Any) -> "subprocess.Popen[bytes]":
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with (self.folder / "log").open("ab") as log:
            made = subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=log, **options)
        self.processes.append(made)
        return made

    def running(self, module: str) -> list[int]:
        """The processes of this place that run a module."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = entry.read_bytes().split(b"\0")
                if module.encode() in words and b"-m" in words and str(self.folder / "work").encode() in words:
                    found.append(int(entry.parent.name))
        return found

    # ---- what came of it

    def now(self, job: Job) -> Job:
        found = self.state.job(job.id)
        assert found
        return found

    def until(self, done: Callable[[], Any], seconds: float = 90.0) -> Any:
        """Wait until something is so, and give it back."""
        end = time.monotonic() + seconds
        while not (found := done()):
            assert time.monotonic() < end, f"it did not come about within {seconds:g} s\n{self.log}"
            time.sleep(0.03)
        return found

    def ended(self, job: Job, seconds: float = 90.0) -> Job:
        found: Job = self.until(lambda: (now := self.now(job)).status in ENDED and now, seconds)
        return found

    def events(self, job: Job) -> list[JobEvent]:
        return self.state.events(job.id, 10000)[0][::-1]

    def messages(self, job: Job) -> list[str]:
        return [event.message for event in self.events(job)]

    def steps(self, job: Job) -> list[dict[str, Any]]:
        return [dict(event.data or {}) for event in self.events(job) if event.type == "metrics"]

    def step(self, job: Job) -> int:
        """The last step that was told."""
        return next((int(e.data["step"]) for e in self.state.events(job.id, 5)[0] if e.type == "metrics" and e.data), 0)

    def result(self, job: Job) -> list[dict[str, str]]:
        file = self.state.files.get(self.now(job).result_files[0])
        assert file and file.purpose == "fine-tune-results"
        return list(csv.DictReader(io.StringIO(b"".join(self.blobs.chunks(file.sha)).decode())))

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:] if (self.folder / "log").exists() else ""

    def close(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.stdin:
                process.stdin.close()
            process.kill()
            process.wait()
        for module in (WORKER, TRAINER):
            for pid in self.running(module):
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
        self.state.close()


@contextmanager
def placed(folder: Path, base: Path, url: str = "") -> Iterator[Place]:
    folder.mkdir(exist_ok=True)
    place = Place(folder, base, url)
    try:
        yield place
    finally:
        place.close()
