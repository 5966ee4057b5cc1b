"""The trainer: one job from its row to its end, in a process of its own that may be killed at any moment.

    python -m saddlepoint.service.trainer --state ... --files ... --work ... --job ID --worker NAME

Whatever it does it can do again: what it tells is keyed, so that it is told once; what takes long is saved in the job's folder; and
the end of a job is one transaction. So a new trainer goes on from what the last one saved, with the same losses and the same weights.
It ends by itself when its worker does, and its worker kills it when the job is cancelled.
"""

import logging
import os
import sys
import time
from threading import Event

from saddlepoint.errors import SaddlepointError
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.checking import validate
from saddlepoint.service.processes import GRACE, on_lifeline
from saddlepoint.service.setting import Setting, parser
from saddlepoint.service.stages import tune
from saddlepoint.service.state import State
from saddlepoint.service.task import Task

NICE = 5  # a server that answers on the same cores goes first


def main() -> None:
    """Do what a claimed job needs next. The exit status is 0 unless the process failed and is to be started again."""
    arguments = parser("Train one job; a worker starts this.")
    arguments.add_argument("--job", required=True)
    arguments.add_argument("--worker", required=True)
    given = arguments.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    os.nice(NICE)
    stop, patient = Event(), Event()

    def ended() -> None:
        stop.set()
        if patient.is_set():
            time.sleep(GRACE)
        os._exit(0)

    on_lifeline(ended)
    setting = Setting.of(given)
    try:
        blobs = Blobs(setting.files)
        state = State.open(setting.state, blobs.remove, blobs.size)
        job = state.job(given.job)
        if job is None:
            sys.exit(f"error: there is no job {given.job}")
        Task(job, given.worker, setting, state, blobs, stop, patient).run(validate if job.status == "validating_files" else tune)
    except (SaddlepointError, OSError) as wrong:
        sys.exit(f"error: {wrong}")


if __name__ == "__main__":
    main()
