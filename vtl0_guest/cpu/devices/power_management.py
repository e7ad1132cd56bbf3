"""ACPI's fixed hardware: power-management timer, PM1 events and control, and the switch that turns the machine off.

Source: ACPI 6.5, 4.8.3 ("Fixed hardware registers"). There are no buttons; the events are the timer's
carry and, in S3, the clock's alarm. The machine is always in ACPI mode, so SCI_EN reads as one.
"""

from __future__ import annotations

from vtl0_guest.cpu.devices.bus import Guard, IrqLine
from vtl0_guest.cpu.devices.clock import Clock
from vtlab.v1 import vcpu_pb2

# First port and bytes of each block: PM1a_EVT (status, then enable), PM1a_CNT, PM_TMR.
EVENT_BLOCK, EVENT_SIZE = 0x600, 4
CONTROL_BLOCK, CONTROL_SIZE = 0x604, 2
TIMER_BLOCK, TIMER_SIZE = 0x608, 4
PORTS = (*range(EVENT_BLOCK, CONTROL_BLOCK + CONTROL_SIZE), *range(TIMER_BLOCK, TIMER_BLOCK + TIMER_SIZE))
SCI_IRQ = 9
TIMER_HZ = 3579545
# SLP_TYP of S5, as the DSDT's _S5 says.
SLEEP_TYPE_OFF = 5
# Of S3 and S4, as _S3 and _S4 say. S4 is S5 to this hardware: what is kept, the kernel has kept itself.
SLEEP_TYPE_RAM = 1
SLEEP_TYPE_DISK = 2
# Where firmware (vtl0_guest.loaders.acpi) has the FACS, and the waking vector in it.
FACS_ADDRESS, WAKING_VECTOR = 0xF0040, 12

_TIMER_BITS = 24
# The carry is a change of the highest bit.
_CARRY = 1 << _TIMER_BITS - 1
_TIMER_STATUS, _CLOCK_STATUS, _WAKE_STATUS = 1, 1 << 10, 1 << 15
# Enable bits that can be written: timer, global lock, power button, sleep button, clock. Kernels check that they stick.
_ENABLE_WRITABLE = 1 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10
_SCI_ENABLED, _SLEEP_ENABLE = 1, 1 << 13
_CONTROL_WRITABLE = 0x1C02
_POWER_OFF = {SLEEP_TYPE_OFF: "ACPI S5", SLEEP_TYPE_DISK: "ACPI S4"}


class PowerManagement:
    """The three blocks. Attributes: `asleep`: in S3."""

    asleep = False

    def __init__(self, clock: Clock, line: IrqLine, guard: Guard) -> None:
        self._clock = clock
        self._line = line
        self._guard = guard
        self._started = clock.now()
        self._carries = 0
        self._status = 0
        self._enable = 0
        self._control = 0

    def _ticks(self) -> int:
        return int((self._clock.now() - self._started) * TIMER_HZ)

    def _update(self) -> None:
        carries = self._ticks() // _CARRY
        if carries != self._carries:
            self._carries, self._status = carries, self._status | _TIMER_STATUS
        self._line(bool(self._status & self._enable))

    # ------------------------------------------------------------------------------------------ time

    def next_deadline(self) -> float | None:
        """Of the next carry, if it interrupts and none waits."""
        if not self._enable & _TIMER_STATUS or self._status & _TIMER_STATUS:
            return None
        return self._started + ((self._carries + 1) * _CARRY + 1) / TIMER_HZ

    def advance(self, now: float) -> None:
        due = self.next_deadline()
        if due is not None and now >= due:
            self._update()

    # ------------------------------------------------------------------------------------------ ports

    def read(self, port: int, size: int) -> int:
        if port >= TIMER_BLOCK:
            value, first = self._ticks() & (1 << _TIMER_BITS) - 1, TIMER_BLOCK
        elif port >= CONTROL_BLOCK:
            value, first = self._control | _SCI_ENABLED, CONTROL_BLOCK
        else:
            self._update()
            value, first = self._status | self._enable << 16, EVENT_BLOCK
        return value >> 8 * (port - first) & (1 << 8 * size) - 1

    def write(self, port: int, size: int, value: int) -> None:
        """Byte by byte of the registers that the access covers."""
        mask = (1 << 8 * size) - 1
        value &= mask
        if EVENT_BLOCK <= port < CONTROL_BLOCK:
            shift = 8 * (port - EVENT_BLOCK)
            self._write_event(value << shift, mask << shift)
        elif CONTROL_BLOCK <= port < CONTROL_BLOCK + CONTROL_SIZE:
            shift = 8 * (port - CONTROL_BLOCK)
            self._write_control(value << shift, mask << shift)

    def _write_event(self, value: int, mask: int) -> None:
        """Status bits end when ones are written."""
        self._update()
        self._status &= ~(value & 0xFFFF)
        enable = mask >> 16 & 0xFFFF
        self._enable = (self._enable & ~enable | value >> 16 & enable) & _ENABLE_WRITABLE
        self._update()
        self._guard.rearm()

    def _write_control(self, value: int, mask: int) -> None:
        mask &= _CONTROL_WRITABLE
        self._control = self._control & ~mask | value & mask
        kind = self._control >> 10 & 7
        if value & _SLEEP_ENABLE and kind in _POWER_OFF:
            self._guard.post_exit(vcpu_pb2.PowerOff(source=_POWER_OFF[kind]))
        elif value & _SLEEP_ENABLE and kind == SLEEP_TYPE_RAM:
            self._guard.post_exit(vcpu_pb2.Sleep(source="ACPI S3"))

    # ------------------------------------------------------------------------------------------ S3

    def fall_asleep(self) -> None:
        with self._guard:
            self.asleep = True

    def clock_event(self) -> None:
        """The clock's alarm wakes the boot processor."""
        if self.asleep:
            self.asleep = False
            self._status |= _CLOCK_STATUS | _WAKE_STATUS
            self._guard.wake(0)
