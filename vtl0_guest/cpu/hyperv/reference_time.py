"""The partition reference time: 100 ns since the partition's creation, from the time-stamp counter by one formula.

The TIME_REF_COUNT MSR and the reference TSC page compute the same: ((TSC * scale) >> 64) + offset (TLFS, "Partition
Reference Time"). A guest that compares the two never sees them disagree.
"""

from __future__ import annotations

import math
import struct
import time

from vtl0_guest.cpu.devices.clock import Clock, HostClock
from vtl0_guest.cpu.hyperv.pages import GuestMemory, MsrPage

HZ = 10_000_000
_ALL = (1 << 64) - 1
# Sequence, padding, scale, offset.
_TSC_PAGE = struct.Struct("<IIQq")
# Seconds over which the host's counter is measured at least: the reading is good to about a microsecond.
_BASE_LINE = 0.05


def _sample(clock: Clock) -> tuple[float, int]:
    """(time, counter) read together: the best of several tries, as a thread can be interrupted between the two."""
    best: tuple[float, float, int] | None = None
    for _ in range(8):
        before = clock.now()
        counter = clock.tsc()
        width = clock.now() - before
        if best is None or width < best[0]:
            best = (width, before + width / 2, counter)
    assert best is not None
    return best[1], best[2]


class ReferenceTime:
    """The counter of one partition. Its frequency is fixed at the first use, for the partition's life.

    Attributes:
        created: Clock.now() at which the counter was 0.
    """

    def __init__(self, clock: Clock, created: float | None = None) -> None:
        """`created`: now, unless another level of the partition was there before."""
        self._clock = clock
        self._first = _sample(clock)
        self.created = self._first[0] if created is None else created
        self._formula: tuple[int, int] | None = None
        self._frequency = 0

    def _fix(self) -> tuple[int, int]:
        clock = self._clock
        if isinstance(clock, HostClock) and clock.tsc_is_host:
            missing = self._first[0] + _BASE_LINE - clock.now()
            if missing > 0:
                time.sleep(missing)
            now, counter = _sample(clock)
            hz = (counter - self._first[1]) / (now - self._first[0])
        else:
            hz = clock.tsc_hz()
        self._frequency = round(hz)
        scale = (HZ << 64) // self._frequency
        # At `created` the counter shall be 0.
        at, counter = self._first
        offset = math.floor((at - self.created) * HZ) - (counter * scale >> 64)
        self._formula = scale, offset
        return self._formula

    def adopt(self, scale: int, offset: int, tsc_hz: int) -> None:
        """Takes the formula of another level of the partition."""
        self._formula, self._frequency = (scale, offset), tsc_hz

    @property
    def scale(self) -> int:
        return (self._formula or self._fix())[0]

    @property
    def offset(self) -> int:
        return (self._formula or self._fix())[1]

    @property
    def tsc_hz(self) -> int:
        """TSC_FREQUENCY MSR."""
        if self._formula is None:
            self._fix()
        return self._frequency

    def now(self) -> int:
        """In units of 100 ns."""
        return self.at(self._clock.tsc())

    def at(self, counter: int) -> int:
        """The time at which the host's time-stamp counter has that value."""
        scale, offset = self._formula or self._fix()
        return (counter * scale >> 64) + offset

    def deadline(self, reference: int) -> float:
        """Clock.now() at which the counter will be `reference`; not before now."""
        return self._clock.now() + max(0, reference - self.now()) / HZ

    def tsc_page(self, sequence: int, tsc_offset: int) -> bytes:
        """Content of the page for processors whose counter is the host's plus `tsc_offset` (modulo 2**64)."""
        # Rounded so that the page is never ahead of the MSR.
        wraps = self._clock.tsc() + tsc_offset >> 64
        signed = tsc_offset - (1 << 64) if wraps else tsc_offset
        return _TSC_PAGE.pack(sequence, 0, self.scale, self.offset + -(signed * self.scale >> 64) - (signed != 0))


class ReferenceTscPage(MsrPage):
    """REFERENCE_TSC of one level: one page for all its processors."""

    def __init__(self, memory: GuestMemory, reference: ReferenceTime, vp_count: int) -> None:
        super().__init__(memory)
        self._reference = reference
        self._sequence = 0
        self._offsets = [0] * vp_count

    def set(self, value: int) -> None:
        super().set(value)
        self._publish()

    def set_tsc_offset(self, vp_index: int, tsc_offset: int) -> None:
        """The guest wrote a processor's time-stamp counter."""
        self._offsets[vp_index] = tsc_offset
        self._publish()

    def _publish(self) -> None:
        """Sequence 0 says that the page does not hold: where the processors' counters differ."""
        if not self.enabled:
            return
        offsets = set(self._offsets)
        if len(offsets) > 1:
            self.write(0, bytes(4))
            return
        self._sequence = self._sequence % 0xFFFF_FFFE + 1
        self.write(0, self._reference.tsc_page(self._sequence, offsets.pop()))
