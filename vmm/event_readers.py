"""Readers of an event log, woken at a bounded rate by a thread of their own.

Who records an event says so by one flag, however many read. The readers share the interpreter with the threads of the
vCPUs: a thousand of them that were all woken by each exit would leave the machine no time. So they are woken one by
one, none before the one before it has had time to take what is new; who is woken less often takes more at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

# Seconds between two readers that are woken, so that most of the interpreter's time is left to the vCPUs: where a few
# people wait for what their machine says, and where many watch.
FEW = 4
PACE_OF_FEW = 0.001
PACE = 0.005


class Reader:
    """Attributes:
    kinds: of events that it wants.
    wake: is set when one of them may have come.
    """

    def __init__(self, kinds: Collection[int]) -> None:
        self.kinds = frozenset(kinds)
        self.wake = threading.Event()


class Readers:
    """Of one log. Thread-safe."""

    def __init__(self, name: str, lock: threading.Lock) -> None:
        """Args: `lock` is the log's."""
        self._name = name
        self._lock = lock
        self._readers: list[Reader] = []
        self._wanted: frozenset[int] = frozenset()
        self._fresh: set[int] = set()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def news(self, kind: int) -> None:
        """An event of that kind can be read; the log's lock is held. Takes the same time however many read."""
        if kind in self._wanted and kind not in self._fresh:
            self._fresh.add(kind)
            self._wake.set()

    @contextmanager
    def added(self, reader: Reader) -> Iterator[None]:
        """Within the block it is woken."""
        with self._lock:
            self._readers.append(reader)
            self._look()
            if self._closed:
                reader.wake.set()
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._readers.remove(reader)
                self._look()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._readers)

    def _look(self) -> None:
        self._wanted = frozenset[int]().union(*(one.kinds for one in self._readers))

    def close(self) -> None:
        """Wakes all, now and for good."""
        self._closed = True
        self._wake.set()
        with self._lock:
            for reader in self._readers:
                reader.wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                fresh, self._fresh = self._fresh, set()
                readers = [one for one in self._readers if one.kinds & fresh]
            pace = PACE if len(readers) > FEW else PACE_OF_FEW
            for reader in readers:
                if not reader.wake.is_set():
                    reader.wake.set()
                    time.sleep(pace)
