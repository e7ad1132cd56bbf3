"""The MC146818 real-time clock and the CMOS memory behind ports 0x70 and 0x71.

Source: Motorola MC146818 data sheet; for the bytes above 0x10, what PC firmware leaves there (memory sizes, shutdown
status, century). Time is UTC. Square wave and daylight saving are not there.
"""

from __future__ import annotations

import calendar
import math
import time
from enum import IntFlag

from vtl0_guest.cpu.devices.bus import Guard, IrqLine
from vtl0_guest.cpu.devices.clock import Clock

INDEX = 0x70
DATA = 0x71

IRQ = 8
# Address of the century byte.
CENTURY = 0x32
_A, _B, _C, _D = 0x0A, 0x0B, 0x0C, 0x0D
# Bytes of the time, and those of the alarm that each is compared with.
_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_TIME = frozenset({_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, CENTURY})
_ALARMS = ((1, _SECONDS), (3, _MINUTES), (5, _HOURS))
_UIP = 0x80
# UIP is set this long before the time changes (data sheet, "Update cycle").
_UIP_SECONDS = 244e-6
_PM = 0x80


class RegisterB(IntFlag):
    HOUR_24 = 1 << 1
    BINARY = 1 << 2
    UPDATE_INTERRUPT = 1 << 4
    ALARM_INTERRUPT = 1 << 5
    PERIODIC_INTERRUPT = 1 << 6
    SET = 1 << 7


class RegisterC(IntFlag):
    UPDATE = 1 << 4
    ALARM = 1 << 5
    PERIODIC = 1 << 6
    REQUEST = 1 << 7


class Rtc:
    """Clock and 128 bytes of memory."""

    def __init__(self, clock: Clock, line: IrqLine, guard: Guard, ram_size: int, vp_count: int) -> None:
        self._clock = clock
        self._line = line
        self._guard = guard
        self._index = 0
        self._offset = 0.0
        self._memory = bytearray(128)
        # 32.768 kHz time base, 1024 Hz rate; 24-hour BCD; time and memory valid.
        self._memory[_A], self._memory[_B], self._memory[_D] = 0x26, RegisterB.HOUR_24.value, 0x80
        self._describe_machine(ram_size, vp_count)
        self._periodic: float | None = None
        self._update: float | None = None

    def _describe_machine(self, ram_size: int, vp_count: int) -> None:
        """Memory sizes as firmware writes them, little endian."""
        high = max(0, ram_size - (1 << 32))
        low = min(ram_size, 1 << 32)
        extended = min(max(0, low - (1 << 20)) >> 10, 0xFFFF)
        for address, size, value in (
            (0x15, 2, min(low >> 10, 640)),
            (0x17, 2, extended),
            (0x30, 2, extended),
            (0x34, 2, min(max(0, low - (16 << 20)) >> 16, 0xFFFF)),
            (0x5B, 3, min(high >> 16, 0xFFFFFF)),
            (0x5F, 1, vp_count - 1 & 0xFF),
        ):
            self._memory[address : address + size] = value.to_bytes(size, "little")

    # ------------------------------------------------------------------------------------------ ports

    def read(self, port: int, _size: int) -> int:
        if port == INDEX:
            return 0xFF
        if self._index == _A:
            return self._memory[_A] | (_UIP if self._updating() else 0)
        if self._index == _C:
            flags, self._memory[_C] = self._memory[_C], 0
            self._line(False)
            return flags
        if self._index in _TIME and not self._memory[_B] & RegisterB.SET.value:
            return self._time_fields()[self._index]
        return self._memory[self._index]

    def write(self, port: int, _size: int, value: int) -> None:
        if port == INDEX:
            # Bit 7 masks NMI; there is none to mask.
            self._index = value & 0x7F
        elif self._index in (_A, _B):
            self._write_control(value & 0xFF)
        elif self._index not in (_C, _D):
            self._write_byte(value & 0xFF)

    def _write_control(self, value: int) -> None:
        setting = bool(self._memory[_B] & RegisterB.SET.value)
        if self._index == _A:
            self._memory[_A] = value & 0x7F
        elif not setting and value & RegisterB.SET.value:
            # The time stops where it is and can be edited.
            for address, field in self._time_fields().items():
                self._memory[address] = field
            self._memory[_B] = value & ~RegisterB.UPDATE_INTERRUPT.value
        else:
            if setting and not value & RegisterB.SET.value:
                self._set_time()
            self._memory[_B] = value
        self._rearm()

    def _write_byte(self, value: int) -> None:
        if self._index not in _TIME or self._memory[_B] & RegisterB.SET.value:
            self._memory[self._index] = value
            return
        for address, field in self._time_fields().items():
            self._memory[address] = field
        self._memory[self._index] = value
        self._set_time()

    # ------------------------------------------------------------------------------------------ time

    def _now(self) -> float:
        return self._clock.wall() + self._offset

    def _updating(self) -> bool:
        if self._memory[_B] & RegisterB.SET.value:
            return False
        return 1 - self._now() % 1 <= _UIP_SECONDS

    def _encode(self, value: int) -> int:
        return value if self._memory[_B] & RegisterB.BINARY.value else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._memory[_B] & RegisterB.BINARY.value else (value >> 4) * 10 + (value & 15)

    def _time_fields(self) -> dict[int, int]:
        """The time now, by address, in the format that register B asks for."""
        now = time.gmtime(self._now())
        fields = {
            _SECONDS: now.tm_sec,
            _MINUTES: now.tm_min,
            _HOURS: now.tm_hour,
            _WEEKDAY: (now.tm_wday + 1) % 7 + 1,
            _DAY: now.tm_mday,
            _MONTH: now.tm_mon,
            _YEAR: now.tm_year % 100,
            CENTURY: now.tm_year // 100,
        }
        encoded = {address: self._encode(value) for address, value in fields.items()}
        if not self._memory[_B] & RegisterB.HOUR_24.value:
            encoded[_HOURS] = self._encode((now.tm_hour - 1) % 12 + 1) | (_PM if now.tm_hour >= 12 else 0)
        return encoded

    def _hour(self, value: int) -> int:
        if self._memory[_B] & RegisterB.HOUR_24.value:
            return self._decode(value)
        return self._decode(value & ~_PM) % 12 + (12 if value & _PM else 0)

    def _set_time(self) -> None:
        """Takes the time bytes as the time; a date that does not exist runs over into the next month."""
        memory = self._memory
        year = self._decode(memory[CENTURY]) * 100 + self._decode(memory[_YEAR])
        month = min(max(self._decode(memory[_MONTH]), 1), 12)
        moment = calendar.timegm(
            (
                min(max(year, 1970), 9999),
                month,
                max(self._decode(memory[_DAY]), 1),
                self._hour(memory[_HOURS]),
                self._decode(memory[_MINUTES]),
                self._decode(memory[_SECONDS]),
            )
        )
        self._offset = moment - self._clock.wall()

    # ------------------------------------------------------------------------------------------ interrupts

    def _period(self) -> float | None:
        """Seconds between periodic interrupts; rates 1 and 2 are those of 8 and 9 (data sheet, table 5)."""
        rate = self._memory[_A] & 15
        if not rate:
            return None
        return (1 << (rate if rate > 2 else rate + 7) - 1) / 32768

    def _rearm(self) -> None:
        now, enabled, period = self._clock.now(), self._memory[_B], self._period()
        self._periodic = now + period if period and enabled & RegisterB.PERIODIC_INTERRUPT.value else None
        each_second = RegisterB.UPDATE_INTERRUPT.value | RegisterB.ALARM_INTERRUPT.value
        self._update = None
        if enabled & each_second and not enabled & RegisterB.SET.value:
            self._update = now + 1 - self._now() % 1
        self._guard.rearm()

    def next_deadline(self) -> float | None:
        return min((moment for moment in (self._periodic, self._update) if moment is not None), default=None)

    def advance(self, now: float) -> None:
        """Raises IRQ 8 for what was due and is enabled; it stays up until register C is read."""
        flags = 0
        if self._periodic is not None and now >= self._periodic:
            flags |= RegisterC.PERIODIC.value
            period = self._period() or 1.0
            self._periodic += math.floor((now - self._periodic) / period + 1) * period
        if self._update is not None and now >= self._update:
            flags |= RegisterC.UPDATE.value | (RegisterC.ALARM.value if self._alarm_matches() else 0)
            self._update = now + 1 - self._now() % 1
        if not flags:
            return
        self._guard.rearm()
        self._memory[_C] |= flags
        # The flags of register C and the enables of register B share their bits.
        if flags & self._memory[_B]:
            self._memory[_C] |= RegisterC.REQUEST.value
            self._line(True)

    def _alarm_matches(self) -> bool:
        """Alarm bytes from 0xC0 match anything."""
        fields = self._time_fields()
        return all(self._memory[alarm] in (fields[byte], *range(0xC0, 0x100)) for alarm, byte in _ALARMS)
