"""A claimed job and all that its trainer works with, and how what goes wrong with it ends."""

import errno
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from saddlepoint.errors import SaddlepointError, StoreError, TrainingError, UsageError
from saddlepoint.service.blobs import Blobs
from saddlepoint.service.records import Job
from saddlepoint.service.rows import Refused
from saddlepoint.service.setting import Setting
from saddlepoint.service.state import Lost, State
from saddlepoint.store import alone

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger("saddlepoint")


class Failed(SaddlepointError):
    """The job cannot succeed.

    Args:
        code: The protocol's word for why.
        param: The field of the request that is wrong.
    """

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.error = {"code": code, "message": message, "param": param}


@dataclass(frozen=True)
class Task:
    """A claimed job and all that its trainer works with.

    Args:
        stop: Set where its state is to be saved and the process to end.
        patient: Set while what is under way looks at `stop`; otherwise the process just ends, and what it did is done again.
    """

    job: Job
    worker: str
    setting: Setting
    state: State
    blobs: Blobs
    stop: Event
    patient: Event

    @property
    def folder(self) -> Path:
        """The job's own, for what is under way."""
        return self.setting.work / self.job.id

    def tell(self, message: str, level: str = "info", type: str = "message", data: Mapping[str, Any] | None = None, key: str = "") -> None:
        """Record an event of the job; see `State.event`.

        Raises:
            Lost: It is another worker's by now.
        """
        self.state.event(self.job.id, message, level, type, data, key, worker=self.worker)

    def run(self, work: Callable[["Task"], None]) -> None:
        """Do something for the job, and tell what went wrong with it where nothing but another job can help.

        Raises:
            StoreError, OSError: Of something that may be right the next time.
        """
        try:
            with alone(self.folder / "lock"):  # the job's last trainer may still be about to end
                work(self)
        except Lost as wrong:
            log.info("%s", wrong)
        except Failed as wrong:
            self._fail(wrong)
        except Exception as wrong:
            if full(wrong) and not isinstance(wrong, StoreError):
                self._halt(wrong)
            elif isinstance(wrong, StoreError | OSError):
                raise
            elif isinstance(wrong, UsageError | TrainingError):
                self._fail(Failed("invalid_training", str(wrong)))
            else:
                traceback.print_exc()
                self._fail(Failed("server_error", f"The training failed: {type(wrong).__name__}: {wrong}"))

    def _fail(self, why: Failed) -> None:
        try:
            self.state.finish(self.job.id, "failed", worker=self.worker, error=why.error)
        except Lost as wrong:
            log.info("%s", wrong)

    def _halt(self, why: Exception) -> None:
        """Pause the job until somebody has made room and resumes it; what was saved before is kept."""
        said = f"The disk is full, so the job is paused, and nothing of it is lost: {why}; make room, then resume it"
        try:
            self.tell(said, "error", data={"error": str(why)})
            self.state.pause(self.job.id, self.worker)
        except (Lost, Refused) as wrong:  # it was ended or paused meanwhile
            log.info("%s", wrong)


def full(wrong: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, comes of a full disk; libraries in other languages give only the words."""
    return wrong is not None and (any(os.strerror(code) in str(wrong) for code in FULL) or full(wrong.__cause__ or wrong.__context__))
