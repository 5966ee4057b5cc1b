"""The worker: it takes jobs from the database and runs each in a trainer, a process of its own. No torch.

    python -m saddlepoint.service.worker --state DIR-or-URL --files URL --work DIR --base NAME=TARGET ...

Two lanes run beside one another, so that a bad file is told of at once although another job trains: one checks the files of new
jobs, one trains, a job after the other. Several workers, on several machines, may share one database and one blob store; each takes
other jobs. Nothing here has to end in order: a lease that is no longer renewed runs out, and whoever claims the job then goes on
from what its trainer last saved in the folder of `--work`; without that folder it begins anew, and tells nothing twice.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import TypeVar

from saddlepoint.errors import SaddlepointError, StoreError
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.processes import AGAIN, GRACE, ask_to_end, how, kill, on_lifeline, start
from saddlepoint.service.records import ACTIVE, Job, Status
from saddlepoint.service.setting import OFF, Setting, parser
from saddlepoint.service.state import Lost, State, Wish

TRAINER = "saddlepoint.service.trainer"
LANES: tuple[tuple[Status, ...], ...] = (("validating_files",), ("queued", "running"))
BEAT = 0.5  # seconds between two looks at the database; within them and a bit a cancelled job ends
TRIES = 3  # deaths of a trainer without a step forward between them; then its job fails

T = TypeVar("T")
log = logging.getLogger("saddlepoint")


def work(setting: Setting, state: State, lease: float, stopping: threading.Event) -> None:
    """Work in all lanes until `stopping` is set; jobs that are under way are then saved and given back."""
    setting.work.mkdir(mode=0o700, parents=True, exist_ok=True)  # what users sent is for the operator's eyes only
    with ThreadPoolExecutor(len(LANES)) as pool:
        lanes = [pool.submit(Lane(setting, state, statuses, lease, stopping).run) for statuses in LANES]
        wait(lanes, return_when=FIRST_EXCEPTION)
        stopping.set()
    for lane in lanes:
        lane.result()


@dataclass(eq=False)
class Lane:
    """Claims jobs, one after the other, and watches over their trainers.

    Args:
        statuses: Of the jobs that it takes.
        lease: Seconds after which another worker may take a job that this one no longer renews.
        stopping: Set where it is to end.
        name: Which no other lane has, of any worker, now or later.
    """

    setting: Setting
    state: State
    statuses: Collection[Status]
    lease: float
    stopping: threading.Event
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")

    def run(self) -> None:
        """Work until it is time to end."""
        self._patiently(self._sweep)
        while not self.stopping.is_set():
            job = self._patiently(lambda: self.state.claim(self.name, self.lease, self.statuses, list(self.setting.bases)))
            if job is None:
                self.stopping.wait(BEAT)
            else:
                self._see_to(job)

    def _see_to(self, job: Job) -> None:
        """Have a job trained until it has ended or is to be left."""
        while not self.stopping.is_set() and self._beat(job.id) == "go":
            child = start(TRAINER, *self.setting.flags, "--job", job.id, "--worker", self.name)
            try:
                wish = self._watch(child, job.id)
            finally:
                kill(child)
            if wish == "go" and child.returncode and not self.stopping.is_set():
                self._patiently(partial(self._died, job.id, how(child.returncode)))
            else:
                break
        self._patiently(lambda: self.state.leave(job.id, self.name))
        self._patiently(self._sweep)

    def _watch(self, child: "subprocess.Popen[bytes]", id: str) -> Wish:
        """Wait for a trainer's end, and see to it where the job is to halt: what was wished for at last."""
        asked: float | None = None
        while child.poll() is None:
            wish = self._beat(id)
            if wish == "cancel":
                return wish
            if asked is None and (wish == "pause" or self.stopping.is_set()):
                asked = time.monotonic()
                ask_to_end(child)
            if asked is not None and time.monotonic() - asked > GRACE + 2:
                return "pause"  # what it saved before is enough
            with suppress(subprocess.TimeoutExpired):
                child.wait(BEAT)
        return "pause" if asked is not None else "go"

    def _beat(self, id: str) -> Wish:
        """Renew the lease. A job that is another worker's by now is to be stopped like one that was cancelled."""
        try:
            return self._patiently(lambda: self.state.beat(id, self.name, self.lease)) or "pause"
        except Lost:
            return "cancel"

    def _died(self, id: str, ended: str) -> None:
        """Tell of a trainer's death; where it comes no further, its job fails."""
        last, _ = self.state.events(id, limit=TRIES)
        deaths = len(list(takewhile(lambda e: e.data is not None and "ended" in e.data, last))) + 1
        log.warning("the trainer of %s: %s", id, ended)
        try:
            if deaths < TRIES:
                said = f"The training process ended unexpectedly ({ended}); it goes on from what was saved"
                self.state.event(id, said, level="warn", data={"ended": ended}, worker=self.name)
            else:
                said = f"The training process ended {deaths} times without getting further, the last time: {ended}"
                error = {"code": "server_error", "message": f"{said}. The log of the worker says more", "param": None}
                self.state.finish(id, "failed", worker=self.name, error=error)
        except Lost:
            return  # it was cancelled or paused meanwhile, which the next beat tells

    def _sweep(self) -> None:
        """Remove the folders of jobs that have ended. What the gate asked a held model stays for an administrator, as long as it is held.

        Folders of jobs that this database does not know are left alone, for they are of another service with the same `--work`.
        """
        for folder in self.setting.work.glob("ftjob-*"):
            job = self.state.job(folder.name)
            if job is None or job.status in ACTIVE:
                continue
            with suppress(OSError):  # another worker was faster, or something is held in it still
                for part in folder.iterdir():
                    if job.held is None or not part.name.startswith("gate-"):
                        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
                folder.rmdir()

    def _patiently(self, act: Callable[[], T]) -> T | None:
        """Do something with the database, and while that cannot be had, again and again; None where it is time to end."""
        told = False
        while True:
            try:
                return act()
            except StoreError as wrong:
                if not told:
                    log.error("%s; trying again until it is back", wrong)
                told = True
                if self.stopping.wait(AGAIN):
                    return None


def main() -> None:
    """Work until told to stop: by SIGTERM or SIGINT, or with `--attached` when whoever started this process ends."""
    arguments = parser("Train the jobs of a fine-tuning service.")
    arguments.add_argument("--lease", type=float, default=15.0, help="seconds after which a job whose worker is silent is another's")
    arguments.add_argument("--attached", action="store_true", help="end when standard input closes")
    given = arguments.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    stopping = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stopping.set())
    if given.attached:
        on_lifeline(stopping.set)
    try:
        if given.gate != OFF:
            from saddlepoint.service.gating import rules  # what attacks and judges are made of

            rules(given.gate)
        state = State.open(given.state, Blobs(given.files).remove)
    except SaddlepointError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(wrong.exit_code)
    work(Setting.of(given), state, given.lease, stopping)


if __name__ == "__main__":
    main()
