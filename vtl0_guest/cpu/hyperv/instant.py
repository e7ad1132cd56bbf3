"""Two clocks read as one instant, though the host may take the processor away between the two reads.

A guest that checks the reference TSC page against TIME_REF_COUNT reads its time-stamp counter, then the MSR, and takes
the difference for drift. On real hardware a few hundred cycles lie between; here, the host's scheduler may put
milliseconds there. So after a read of TIME_REF_COUNT the next RDTSC exits, and a read of TIME_REF_COUNT that follows it
within a little processor time, is of that RDTSC's instant. That holds only if no other processor of the machine has run
meanwhile: nobody has seen a later time, so the clock goes backwards for nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from vtl0_guest.cpu.devices.clock import Clock
from vtl0_guest.cpu.hyperv.reference_time import ReferenceTime, ReferenceTscPage

# Seconds of CPU time that may lie between the reads; what the host takes away is not in it.
CPU_TIME = 0.005
# Exits for which a turn goes on that ends between the reads: being asked to end is an exit too, and may repeat.
_PATIENCE = 8


class Round:
    """Which processor of a level runs, and how often that changed."""

    def __init__(self) -> None:
        self._runs: Instant | None = None
        self.changes = 0

    def turn_of(self, processor: Instant) -> None:
        if processor is not self._runs:
            self._runs = processor
            self.changes += 1


class _Seen(NamedTuple):
    counter: int
    changes: int
    thread: int
    thread_time: float
    process_time: float

    def cpu_time(self) -> float:
        """Seconds since: of the thread that runs the processor, of the whole process if that changed."""
        if self.thread == threading.get_ident():
            return time.thread_time() - self.thread_time
        return time.process_time() - self.process_time


class Instant:
    """Of one processor.

    Attributes:
        watch: makes RDTSC and RDTSCP exit, or not; set by the core.
    """

    def __init__(self, clock: Clock, reference: ReferenceTime, page: ReferenceTscPage, turns: Round) -> None:
        self.watch: Callable[[bool], None] = lambda _on: None
        self._turns = turns
        self._clock = clock
        self._reference = reference
        self._page = page
        self._seen: _Seen | None = None
        self._patience = 0

    def reference_time(self) -> int:
        """The guest reads TIME_REF_COUNT."""
        seen, self._seen = self._seen, None
        if self._page.enabled:
            self.watch(True)
        if seen is None or seen.changes != self._turns.changes or seen.cpu_time() > CPU_TIME:
            return self._reference.now()
        return self._reference.at(seen.counter)

    def counter(self) -> int:
        """The guest reads its time-stamp counter, and exits: the host's value. A second one in a row is the last."""
        counter = self._clock.tsc()
        if not self._clock.tsc_is_host:
            return counter  # no time passes but by what the guest does
        if self._seen is None:
            self._seen = _Seen(
                counter, self._turns.changes, threading.get_ident(), time.thread_time(), time.process_time()
            )
            self._patience = _PATIENCE
        else:
            self._seen = None
            self.watch(False)
        return counter

    def begin_turn(self) -> None:
        """The processor runs now."""
        self._turns.turn_of(self)

    @property
    def open(self) -> bool:
        """The counter was read, the MSR not yet."""
        return self._seen is not None

    def forget(self) -> None:
        """Others may have run, and seen a later time."""
        self._seen = None

    def keeps_turn(self) -> bool:
        """A turn that is over should last until the second read."""
        if self._seen is None or not self._patience:
            return False
        self._patience -= 1
        return True

    def reset(self) -> None:
        self._seen = None
        self.watch(False)
