"""Logs of a process: a line for people, or a JSON object a line, with the machine that each is about.

What is known of a line beside its text is given as `extra`: vm, vp (index of the vCPU), vtl, sequence (number of the
enter). A message that comes again and again is cut off, and the number of those that were left out is told: a guest
that makes the VMM complain must not fill the disk.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import threading
import time
from enum import StrEnum

FIELDS = ("vm", "vp", "vtl", "sequence")
# Of one message (its text before arguments are put in): so many at once, then so many a second.
BURST = 20
RATE = 1.0


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class _Json(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        told = [f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name)]
        return super().formatMessage(record) + (f" [{' '.join(told)}]" if told else "")


class RateLimit(logging.Filter):
    """Lets BURST of one message pass, then RATE a second. Thread-safe."""

    def __init__(self, burst: float = BURST, rate: float = RATE) -> None:
        super().__init__()
        self._burst, self._rate = burst, rate
        self._lock = threading.Lock()
        # (logger, message) -> what may still pass, when that was so, how many were left out
        self._known: dict[tuple[str, str], tuple[float, float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = (record.name, str(record.msg)), time.monotonic()
        with self._lock:
            left, then, cut = self._known.get(key, (self._burst, now, 0))
            left = min(self._burst, left + (now - then) * self._rate)
            if left < 1:
                self._known[key] = left, now, cut + 1
                return False
            self._known[key] = left - 1, now, 0
        if cut:
            record.msg, record.args = f"{record.getMessage()} (and {cut} times more, left out)", None
        return True


def configure(role: str, form: LogFormat | str = LogFormat.TEXT) -> None:
    """Sends the logs of this process to stderr from now on, INFO and above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(role) if LogFormat(form) is LogFormat.JSON else _Text())
    handler.addFilter(RateLimit())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
