"""The record of what guards flagged: a JSON line for each request or answer and guard, which `saddlepoint blocks export` reads."""

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saddlepoint.defenses._stream import Said
from saddlepoint.types import Chat


@dataclass(eq=False)
class BlockLog:
    """Writes a line at once, so that a kill loses none that was written.

    Args:
        file: None writes to the log of the process, on stderr.
        texts: Whether the request and the withheld answer are written too; without them nothing can be exported.
    """

    file: Path | None = None
    texts: bool = True
    _lock: Any = field(default_factory=threading.Lock)

    def write(self, request_id: str, key: str, model: str, chat: Chat, said: Sequence[Said]) -> None:
        """Record what guards flagged of one choice and its request; of several verdicts of one guard in one direction the last."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for one in {(s.defense, s.direction): s for s in said if s.check.reason}.values():
            line: dict[str, Any] = {"time": when, "request_id": request_id, "key": key, "model": model, "defense": one.defense}
            line |= {"direction": one.direction, "withheld": one.withheld, "reason": one.check.reason}
            if self.texts:
                line |= {"chat": [{"role": m.role, "text": m.text} for m in chat], "answer": one.answer}
            self._put(json.dumps(line))

    def _put(self, line: str) -> None:
        if self.file is None:
            logging.getLogger("saddlepoint").info(line)
            return
        with self._lock:
            # What users wrote is for the operator's eyes only.
            there = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(there, "ab") as file:
                file.write(line.encode() + b"\n")
