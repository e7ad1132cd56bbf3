"""Time as the devices of a machine see it: one object, so that virtual time can replace the host's."""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from typing import Protocol

# Seconds. A guest that programs a shorter period gets this one: its own timer thread could do nothing else.
MINIMUM_PERIOD = 100e-6


class Clock(Protocol):
    """Time of one machine."""

    @property
    def tsc_is_host(self) -> bool:
        """The engine's RDTSC reads what tsc() does. If not, the core intercepts RDTSC."""
        ...

    def now(self) -> float:
        """Seconds since some fixed moment, never backwards."""
        ...

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...

    def tsc(self) -> int:
        """What RDTSC of the guest would return now, before any offset that the core adds."""
        ...

    def tsc_hz(self) -> float:
        """Frequency of that counter."""
        ...


# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f3148c1e2204809d0c3")


def _native_tsc() -> Callable[[], int] | None:
    """A function that reads the host's TSC, as the engine's RDTSC does; None where the host has no such counter."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    function = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    # The page lives as long as the function that runs on it.
    function.page = page  # type: ignore[attr-defined]
    return function


class HostClock:
    """The host's monotonic clock and time-stamp counter.

    Attributes:
        tsc_is_host: the counter is the one that the engine's RDTSC reads. If not, the core must intercept RDTSC and
            answer with tsc().
    """

    # On a host without a TSC.
    FALLBACK_HZ = 1e9
    # The longer the base line, the better the frequency: 1 ms of it gives about 0.1 %.
    _BASE_LINE = 0.001

    def __init__(self) -> None:
        self._read = _native_tsc()
        self.tsc_is_host = self._read is not None
        self._start = (self.now(), self.tsc())

    now = staticmethod(time.monotonic)  # no function of ours between: every exit asks twice

    def wall(self) -> float:
        return time.time()

    def tsc(self) -> int:
        if self._read is not None:
            return self._read()
        return int(time.monotonic() * self.FALLBACK_HZ)

    def tsc_hz(self) -> float:
        """Measured from the creation of this object until now; waits a millisecond if it is younger than that."""
        elapsed = 0.0
        while elapsed < self._BASE_LINE:
            elapsed = self.now() - self._start[0]
        return (self.tsc() - self._start[1]) / elapsed


class ManualClock:
    """Time that moves only when told to: for tests and for deterministic runs."""

    tsc_is_host = False

    def __init__(self, now: float = 0.0, wall: float = 946684800.0, tsc_hz: float = 1e9) -> None:
        self._now = now
        self._wall = wall - now
        self._tsc_hz = tsc_hz

    def advance(self, seconds: float) -> float:
        """Returns the new time."""
        self._now += seconds
        return self._now

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._wall + self._now

    def tsc(self) -> int:
        return round(self._now * self._tsc_hz)

    def tsc_hz(self) -> float:
        return self._tsc_hz
