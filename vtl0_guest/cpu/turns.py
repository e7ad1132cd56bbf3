"""The one run token of a machine. Its engines never run at once: `lock` is atomic for its own engine only.

Waiters take turns in order of arrival; whoever holds the token is asked to give it back after a slice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Turns:
    """A fair lock whose holder can be asked for it."""

    # Seconds that a waiter leaves the holder before it asks.
    SLICE = 0.005

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._holder: Callable[[], None] | None = None

    def take(self, ask: Callable[[], None]) -> None:
        """Blocks until it is the caller's turn. `ask` is called from other threads when somebody waits too long."""
        me = object()
        with self._changed:
            if self._holder is None and not self._waiting:
                self._holder = ask
                return
            self._waiting.append(me)
            while self._holder is not None or self._waiting[0] is not me:
                if not self._changed.wait(self.SLICE) and self._holder is not None:
                    self._holder()
            self._waiting.popleft()
            self._holder = ask

    def give(self) -> None:
        with self._changed:
            self._holder = None
            if self._waiting:
                self._changed.notify_all()

    @property
    def wanted(self) -> bool:
        """Somebody waits."""
        return bool(self._waiting)
