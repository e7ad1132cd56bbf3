"""Synthetic timers: STIMER0 to STIMER3 of one processor (TLFS, "Timers").

A timer that expires hands a message to its SINT, or raises its vector (direct mode). It has at most one message on its
way: a periodic timer whose message still waits skips, lazy or not. Units of 100 ns of the partition reference time.
"""

from __future__ import annotations

from collections.abc import Callable

from vtl0_guest.cpu.devices.bus import Guard
from vtl0_guest.cpu.devices.clock import MINIMUM_PERIOD
from vtl0_guest.cpu.hyperv.message_page import Message
from vtl0_guest.cpu.hyperv.reference_time import HZ, ReferenceTime
from vtlab.hyperv.synic import MessageType, TimerConfig, TimerPayload, timer_sint, timer_vector

_MINIMUM_PERIOD = round(MINIMUM_PERIOD * HZ)
_ENABLE, _PERIODIC = int(TimerConfig.ENABLE), int(TimerConfig.PERIODIC)
_AUTO_ENABLE, _DIRECT = int(TimerConfig.AUTO_ENABLE), int(TimerConfig.DIRECT)


class SyntheticTimer:
    """One timer; its owner holds the guard.

    Attributes:
        config: CONFIG MSR.
        count: COUNT MSR: the period, or the time of a one-shot's expiry.
    """

    def __init__(
        self,
        index: int,
        reference: ReferenceTime,
        guard: Guard,
        *,
        raise_vector: Callable[[int], None],
        queue: Callable[[int, Message], None],
        cancel: Callable[[int, Message], None],
    ) -> None:
        """The callbacks take a vector, and a SINT with a message."""
        self._index = index
        self._reference = reference
        self._guard = guard
        self._raise_vector = raise_vector
        self._queue = queue
        self._cancel = cancel
        self._message: Message | None = None
        self.reset()

    def reset(self) -> None:
        """State after a reset of the processor; what is queued is its owner's to forget."""
        self.config = 0
        self.count = 0
        self._expiry: int | None = None
        self._deadline: float | None = None
        self._message = None
        self._guard.rearm()

    def set_config(self, value: int) -> None:
        """A write to CONFIG stops the timer, takes back a message not yet delivered, and starts anew if enabled."""
        self._withdraw()
        if not value & _DIRECT and not timer_sint(value):
            value &= ~_ENABLE
        self.config = value
        self._start()

    def set_count(self, value: int) -> None:
        """A write to COUNT: 0 disables; any other value enables a timer with auto-enable."""
        self._withdraw()
        self.count = value
        if not value:
            self.config &= ~_ENABLE
        elif self.config & _AUTO_ENABLE and (self.config & _DIRECT or timer_sint(self.config)):
            self.config |= _ENABLE
        self._start()

    def _withdraw(self) -> None:
        if self._message is not None:
            self._cancel(timer_sint(self.config), self._message)
            self._message = None

    def _start(self) -> None:
        self._expiry = None
        if self.config & _ENABLE and self.count:
            periodic = self.config & _PERIODIC
            self._expiry = self._reference.now() + max(self.count, _MINIMUM_PERIOD) if periodic else self.count
        self._plan()

    def _plan(self) -> None:
        self._deadline = None if self._expiry is None else self._reference.deadline(self._expiry)
        self._guard.rearm()

    def next_deadline(self) -> float | None:
        """Clock.now() of the next expiry."""
        return self._deadline

    def advance(self, now: float) -> None:
        """Expires if it is time, once, however many periods have passed."""
        if self._expiry is None or self._deadline is None or now < self._deadline:
            return
        expired, reference = self._expiry, self._reference.now()
        if reference < expired:
            self._plan()  # the clock and the counter differ by a hair
            return
        if self.config & _PERIODIC:
            period = max(self.count, _MINIMUM_PERIOD)
            self._expiry += ((reference - expired) // period + 1) * period
        else:
            self._expiry = None
            self.config &= ~_ENABLE
        self._plan()
        self._expire(expired)

    def _expire(self, expired: int) -> None:
        if self.config & _DIRECT:
            self._raise_vector(timer_vector(self.config))
            return
        if self._message is not None:
            return

        def payload() -> bytes:
            return TimerPayload(self._index, expired, self._reference.now()).encode()

        def left() -> None:
            self._message = None

        self._message = Message(MessageType.TIMER_EXPIRED, 0, payload, left)
        self._queue(timer_sint(self.config), self._message)
