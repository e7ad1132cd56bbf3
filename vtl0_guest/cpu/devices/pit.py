"""The 8254 interval timer and port 0x61 (system control port B).

Source: Intel 8254 data sheet (231164). Counter 0 drives IRQ 0, counter 2 the speaker; both appear through port 0x61.
Every mode is a function of the ticks since it was started, so nothing runs while nobody looks. BCD counting is taken as
binary, as emulators do.
"""

from __future__ import annotations

import math

from vtl0_guest.cpu.devices.bus import Guard, IrqLine
from vtl0_guest.cpu.devices.clock import MINIMUM_PERIOD, Clock

HZ = 1193182
PORTS = (0x40, 0x41, 0x42, 0x43)
SYSTEM_CONTROL_B = 0x61

_CONTROL = 0x43
# Times are floats: a moment computed for tick n must not read as tick n - 1.
_EPSILON = 1e-3


class Counter:
    """One of the three counters. Modes 1 and 5 start on a rising edge of the gate, the others when a count is written.

    Attributes:
        mode: 0 to 5.
        count: the initial count, 1 to 65536.
        gate: the GATE pin.
    """

    def __init__(self, clock: Clock, gate: bool) -> None:
        self._clock = clock
        self.gate = gate
        self.mode = 3
        self.count = 0x10000
        # When it was started; None while it waits for a count or for its gate.
        self._start: float | None = None
        # Ticks that had passed when the gate went low.
        self._held: float | None = None
        self._access = 3
        self._low_written: int | None = None
        self._low_read = False
        self._latched: list[int] = []

    # ------------------------------------------------------------------------------------------ what it shows

    def _ticks(self) -> int:
        """Whole ticks since the start."""
        if self._held is not None:
            return int(self._held)
        if self._start is None:
            return 0
        return int((self._clock.now() - self._start) * HZ + _EPSILON)

    def value(self) -> int:
        """The counting element, 16 bits."""
        ticks = self._ticks()
        if self.mode == 2:
            return (self.count - ticks % self.count) & 0xFFFF
        if self.mode == 3:
            # Counts by two, twice a period; an odd count is made even.
            even = self.count & ~1 or 2
            return (even - 2 * ticks % even) & 0xFFFF
        return (self.count - ticks) & 0xFFFF

    def output(self) -> bool:
        """The OUT pin."""
        if self._start is None:
            return self.mode != 0
        ticks = self._ticks()
        if self.mode in (0, 1):
            return ticks >= self.count
        if self.mode == 2:
            return ticks % self.count != self.count - 1
        if self.mode == 3:
            return ticks % self.count < (self.count + 1) // 2
        return ticks != self.count

    def next_rise(self) -> float | None:
        """When OUT next goes from low to high; None if it never does as things are."""
        if self._start is None or self._held is not None:
            return None
        ticks = self._ticks()
        if self.mode in (2, 3):
            rise = (ticks // self.count + 1) * self.count
        else:
            rise = self.count if self.mode in (0, 1) else self.count + 1
            if ticks >= rise:
                return None
        return self._start + rise / HZ

    # ------------------------------------------------------------------------------------------ programming

    def control(self, access: int, mode: int) -> None:
        """A control word other than a latch: the counter waits for its count."""
        self._access = access
        self.mode = mode - 4 if mode > 5 else mode
        self._start = self._held = None
        self._low_written = None
        self._low_read = False
        self._latched.clear()

    def latch_count(self) -> None:
        """Keeps the count until it is read; a second latch before that is ignored."""
        if not self._latched:
            self._latched = self._bytes(self.value())

    def latch_status(self) -> None:
        """OUT in bit 7, null count in bit 6, access in 5:4, mode in 3:1; read before a latched count."""
        null = self._start is None
        self._latched.insert(0, self.output() << 7 | null << 6 | self._access << 4 | self.mode << 1)

    def _bytes(self, value: int) -> list[int]:
        pair = [value & 0xFF, value >> 8]
        return [pair[self._access - 1]] if self._access in (1, 2) else pair

    def read(self) -> int:
        if self._latched:
            return self._latched.pop(0)
        value = self._bytes(self.value())
        if len(value) == 1:
            return value[0]
        self._low_read = not self._low_read
        return value[0] if self._low_read else value[1]

    def write(self, value: int) -> None:
        """One byte of the count, low byte first if there are two."""
        if self._access == 3 and self._low_written is None:
            self._low_written = value
            if self.mode == 0:
                # The first byte stops it (data sheet, "Mode 0").
                self._start = None
            return
        if self._access == 3:
            count = value << 8 | (self._low_written or 0)
            self._low_written = None
        else:
            count = value if self._access == 1 else value << 8
        self.count = count or 0x10000
        if self.mode == 2 and self.count == 1:
            # Illegal (data sheet, "Mode 2").
            self.count = 2
        if self.mode not in (1, 5):
            self._start = self._clock.now()
            self._held = None if self.gate else 0.0

    def set_gate(self, level: bool) -> None:
        """Low stops modes 0, 2, 3 and 4; a rising edge restarts all but 0 and 4, which go on."""
        rising, falling = level and not self.gate, self.gate and not level
        self.gate = level
        now = self._clock.now()
        if self.mode in (1, 5):
            if rising:
                self._start = now
        elif self._start is not None and falling:
            self._held = 0.0 if self.mode in (2, 3) else (now - self._start) * HZ
        elif self._held is not None and rising:
            self._start, self._held = now - self._held / HZ, None


class Pit:
    """Ports 0x40 to 0x43 and 0x61."""

    def __init__(self, clock: Clock, line: IrqLine, guard: Guard) -> None:
        self._clock = clock
        self._line = line
        self._guard = guard
        self.counters = [Counter(clock, True), Counter(clock, True), Counter(clock, False)]
        self._speaker = False
        self._deadline: float | None = None

    def read(self, port: int, _size: int) -> int:
        if port == SYSTEM_CONTROL_B:
            return self._read_control_b()
        return 0 if port == _CONTROL else self.counters[port & 3].read()

    def write(self, port: int, _size: int, value: int) -> None:
        value &= 0xFF
        if port == SYSTEM_CONTROL_B:
            self._speaker = bool(value & 2)
            self.counters[2].set_gate(bool(value & 1))
            return
        if port == _CONTROL:
            self._write_control(value)
        else:
            self.counters[port & 3].write(value)
        self._rearm()

    def _write_control(self, value: int) -> None:
        """Bits 7:6 counter or 3 for read-back, 5:4 access or 0 for latch, 3:1 mode."""
        select, access, mode = value >> 6, value >> 4 & 3, value >> 1 & 7
        if select == 3:
            for number, counter in enumerate(self.counters):
                if value >> 1 + number & 1:
                    # Both bits are active low.
                    if not value & 0x20:
                        counter.latch_count()
                    if not value & 0x10:
                        counter.latch_status()
        elif access == 0:
            self.counters[select].latch_count()
        else:
            self.counters[select].control(access, mode)

    def _read_control_b(self) -> int:
        """Gate 2 in bit 0, speaker 1, refresh toggle 4 (15 us), OUT 2 in bit 5."""
        counter = self.counters[2]
        refresh = math.floor(self._clock.now() / 15.085e-6) & 1
        return int(counter.gate) | self._speaker << 1 | refresh << 4 | counter.output() << 5

    def _rearm(self) -> None:
        """After programming: the line shows OUT, and the next rise is the next deadline."""
        self._line(self.counters[0].output())
        deadline = self.counters[0].next_rise()
        if deadline != self._deadline:
            self._deadline = deadline
            self._guard.rearm()

    def next_deadline(self) -> float | None:
        return self._deadline

    def advance(self, now: float) -> None:
        """One edge on IRQ 0, however many were due: the interrupt controller could not count them either."""
        if self._deadline is None or now < self._deadline:
            return
        self._line(False)
        self._line(True)
        rise = self.counters[0].next_rise()
        self._deadline = None if rise is None else max(rise, now + MINIMUM_PERIOD)
        self._guard.rearm()
