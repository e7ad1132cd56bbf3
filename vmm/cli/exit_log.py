"""`vtlab run --exit-log FILE`: one line for each exit of VTL0, so that two runs can be compared with diff.

    NUMBER vpN KIND rip=ADDRESS DIGEST

KIND is the reason, or "serial" for output on a serial port (without an address). DIGEST is the beginning of the
SHA-256 of the whole message, registers included, but without the number of the enter that it answers: being told to
come out and go on, which has no line, counts there too.
"""

from __future__ import annotations

import hashlib
import threading
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from vtlab.client import Machine
    from vtlab.v1 import vmm_pb2

_DIGITS = 16


class ExitLog:
    """Follows a machine on a thread of its own, from before it starts until it has ended."""

    def __init__(self, machine: Machine, file: IO[str]) -> None:
        self._machine = machine
        self._file = file
        self._lines = 0
        self._error: Exception | None = None
        self.lost = 0
        self._thread = threading.Thread(target=self._follow, name="exit-log", daemon=True)
        self._thread.start()

    def finish(self) -> int:
        """Waits for the last line; returns how many events were lost, 0 where the log is whole. Raises VtlabError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.lost

    def _follow(self) -> None:
        from vtlab.client.serial import ENDED

        try:
            for event in self._machine.events(["exit", "serial", "state", "lost"]):
                kind = event.WhichOneof("detail")
                if kind == "state" and event.state.state in ENDED:
                    return
                if kind == "lost":
                    self.lost += event.lost.count
                    self._file.write(f"{event.lost.count} events are missing here\n")
                elif kind != "state":
                    self._lines += 1
                    self._file.write(line(self._lines, event) + "\n")
        except Exception as error:  # noqa: BLE001 - belongs to the thread that waits
            self._error = error


def line(number: int, event: vmm_pb2.Event) -> str:
    """The line of an exit or of serial output."""
    if event.WhichOneof("detail") == "serial":
        return f"{number} vp{event.vp_index} serial {_digest(event.serial.SerializeToString(deterministic=True))}"
    exit_ = event.exit
    exit_.ClearField("sequence")
    kind, rip = exit_.WhichOneof("reason"), exit_.registers.rip
    return f"{number} vp{event.vp_index} {kind} rip={rip:#x} {_digest(exit_.SerializeToString(deterministic=True))}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
