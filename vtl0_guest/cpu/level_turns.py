"""Whose turn it is between the two levels of a machine where both run guest code, each in a process of its own.

The engines of a machine never run at once, since `lock` is atomic for its own engine only; within a process that is
vtl0_guest.cpu.turns. Between the two it is a lock on a file that both open, and one byte a level in it, set while that
level waits. A level gives way within a slice; a process that does not can only keep the other from running.

The file also says when the higher level has to come in: what is due for it comes before what is due later for the lower
one, however late the host lets their processes run.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Seconds after which a level that runs looks whether the other one waits, and for which it stands back then.
_SLICE = 0.001
_STAND_BACK = 0.005
# Place of the moment at which VTL1 has to come in: nanoseconds of time.monotonic(), in 64-bit words of the file.
_DUE = 8
_NEVER = (1 << 64) - 1


class LevelTurns:
    """The turns of one level. `acquire` and `release` by one thread at a time."""

    def __init__(self, path: Path, vtl: int, preempt: Callable[[], None]) -> None:
        """`preempt` makes the present turn end soon; called from a thread of its own. Raises OSError."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._waiting = mmap.mmap(self._descriptor, mmap.PAGESIZE)
        self._words = memoryview(self._waiting).cast("Q")
        self._own, self._other = vtl, 1 - vtl
        if vtl:
            self.announce_due(None)
        self._preempt = preempt
        self._held = threading.Event()
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name=f"level-turns-vtl{vtl}", daemon=True)
        self._watcher.start()

    @property
    def wanted(self) -> bool:
        """The other level waits."""
        return bool(self._waiting[self._other])

    def acquire(self) -> None:
        """Blocks until the other level has no turn."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._waiting[self._own] = 1
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self._waiting[self._own] = 0
        self._held.set()

    def release(self) -> None:
        """Ends the turn; if the other level waits, it gets its turn before this one can come again."""
        self._held.clear()
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        until = time.monotonic() + _STAND_BACK
        while self.wanted and time.monotonic() < until:
            time.sleep(_SLICE / 20)

    def announce_due(self, moment: float | None) -> None:
        """VTL1 has to come in at a moment of time.monotonic(); 0: it should be in already; None: not that it knows."""
        self._words[_DUE] = _NEVER if moment is None else round(moment * 1e9)

    def due_before(self, moment: float) -> bool:
        """VTL1 has to come in before that moment, or at it."""
        return bool(self._words[_DUE] <= moment * 1e9)

    def close(self) -> None:
        self._closed = True
        self._held.set()
        self._watcher.join()
        self._words.release()
        self._waiting.close()
        os.close(self._descriptor)

    def _watch(self) -> None:
        while True:
            self._held.wait()
            if self._closed:
                return
            time.sleep(_SLICE)
            if self.wanted:
                self._preempt()
