"""The local APIC's timer: one-shot, periodic and TSC-deadline.

Source: Intel SDM volume 3, section "APIC timer". It counts at 1 GHz divided by the divide configuration register.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from vtl0_guest.cpu.devices.bus import Guard
from vtl0_guest.cpu.devices.clock import MINIMUM_PERIOD, Clock

BUS_HZ = 1e9


class TimerMode(IntEnum):
    """Bits 18:17 of the LVT entry."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


class ApicTimer:
    """Timer of one local APIC; its owner holds the guard.

    Attributes:
        initial: initial-count register.
        divide: divide-configuration register.
        tsc_deadline: IA32_TSC_DEADLINE; 0 while not armed.
    """

    def __init__(self, clock: Clock, guard: Guard, fired: Callable[[], None]) -> None:
        """`fired` is called at each expiry."""
        self._clock = clock
        self._guard = guard
        self._fired = fired
        self.reset()

    def reset(self) -> None:
        self.initial = 0
        self.divide = 0
        self.tsc_deadline = 0
        self._mode = TimerMode.ONE_SHOT
        self._deadline: float | None = None
        self._guard.rearm()

    def _hz(self) -> float:
        """Bits 3, 1 and 0 hold the divisor: 0 to 6 mean 2 to 128, 7 means 1."""
        code = (self.divide & 3) | (self.divide >> 1 & 4)
        return BUS_HZ / (1 << ((code + 1) & 7))

    def _period(self) -> float:
        return self.initial / self._hz()

    def set_divide(self, value: int) -> None:
        """The count goes on from where it is."""
        current = self.current()
        self.divide = value & 0xB
        if self._deadline is not None and self._mode != TimerMode.TSC_DEADLINE:
            self._deadline = self._clock.now() + current / self._hz()
            self._guard.rearm()

    def set_mode(self, mode: TimerMode) -> None:
        """A change to or from TSC-deadline disarms the timer; between the others the count goes on."""
        if mode == self._mode:
            return
        if TimerMode.TSC_DEADLINE in (mode, self._mode):
            self._deadline, self.tsc_deadline, self.initial = None, 0, 0
            self._guard.rearm()
        self._mode = mode

    def start(self, initial: int) -> None:
        """A write to the initial count: starts the timer, 0 stops it. Ignored in TSC-deadline mode."""
        if self._mode == TimerMode.TSC_DEADLINE:
            return
        self.initial = initial
        self._deadline = self._clock.now() + self._period() if initial else None
        self._guard.rearm()

    def current(self) -> int:
        """Current-count register; 0 when stopped, expired or in TSC-deadline mode."""
        if self._deadline is None or self._mode == TimerMode.TSC_DEADLINE:
            return 0
        left = (self._deadline - self._clock.now()) * self._hz()
        if left > 0:
            return min(round(left), self.initial)
        # Due, but not yet delivered: a periodic timer has already wrapped.
        return round(left % self.initial) if self._mode == TimerMode.PERIODIC else 0

    def set_tsc_deadline(self, value: int) -> None:
        """A write to IA32_TSC_DEADLINE; 0 disarms. Ignored in the other modes."""
        if self._mode != TimerMode.TSC_DEADLINE:
            return
        self._deadline, self.tsc_deadline = None, value
        ahead = value - self._clock.tsc()
        if value and ahead <= 0:
            self.tsc_deadline = 0
            self._fired()  # at once, without the thread that waits for deadlines
        elif value:
            self._deadline = self._clock.now() + ahead / self._clock.tsc_hz()
        self._guard.rearm()

    def next_deadline(self) -> float | None:
        return self._deadline

    def advance(self, now: float) -> None:
        """Expires once, however many periods have passed: an interrupt that is already requested is not counted."""
        if self._deadline is None or now < self._deadline:
            return
        if self._mode == TimerMode.PERIODIC:
            period = max(self._period(), MINIMUM_PERIOD)
            missed = int((now - self._deadline) / period)
            self._deadline += (missed + 1) * period
        else:
            self._deadline, self.tsc_deadline = None, 0
        self._guard.rearm()
        self._fired()
