"""The log of verdicts: a ring with any number of watchers; who is too slow is told how many it missed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from vtlab.v1 import monitor_pb2, vcpu_pb2

CAPACITY = 4096


class _Row(NamedTuple):
    """A verdict as it is kept; its message is made only for who reads it."""

    time_ns: int
    exit: vcpu_pb2.Exit
    resolution: vcpu_pb2.Resolution
    rule: str

    def message(self, missed: int) -> monitor_pb2.WatchVerdictsResponse:
        result = monitor_pb2.WatchVerdictsResponse(
            exit=self.exit, resolution=self.resolution, rule=self.rule, missed=missed
        )
        result.time.FromNanoseconds(self.time_ns)
        return result


class VerdictLog:
    """Verdicts of one machine, the newest CAPACITY of them. Thread-safe; `record` never waits for a watcher."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._ring: deque[_Row] = deque(maxlen=capacity)
        self._count = 0
        self._closed = False
        self._counts: dict[tuple[str, int], int] = {}
        self._changed = threading.Condition()

    def record(self, exit_: vcpu_pb2.Exit, resolution: vcpu_pb2.Resolution, rule: str) -> None:
        """Adds a verdict; the messages must not be changed afterwards."""
        row = _Row(time.time_ns(), exit_, resolution, rule)
        with self._changed:
            self._ring.append(row)
            self._count += 1
            kind = rule, resolution.action
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all watchers, now and to come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def counts(self) -> dict[tuple[str, int], int]:
        """How many verdicts there were, by rule and action."""
        with self._changed:
            return dict(self._counts)

    def kept(self) -> list[monitor_pb2.WatchVerdictsResponse]:
        """What the ring holds, oldest first."""
        with self._changed:
            rows = list(self._ring)
        return [row.message(0) for row in rows]

    def watch(self, stop: threading.Event, poll: float = 0.5) -> Iterator[monitor_pb2.WatchVerdictsResponse]:
        """From the oldest verdict kept, for ever; `missed` counts those lost before each row.

        Args:
            stop: ends the iteration; looked at whenever a verdict comes, at least every `poll` seconds.
        """
        position = self._count - len(self._ring)
        while not stop.is_set():
            with self._changed:
                if position >= self._count:
                    if self._closed:
                        return
                    self._changed.wait(poll)
                oldest = self._count - len(self._ring)
                missed = max(0, oldest - position)
                position = max(position, oldest)
                rows = [self._ring[index] for index in range(position - oldest, len(self._ring))]
                position += len(rows)
            for row in rows:
                yield row.message(missed)
                missed = 0
