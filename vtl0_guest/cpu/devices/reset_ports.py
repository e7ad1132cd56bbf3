"""Ports that reset a PC: 0x92 (system control port A) and 0xCF9 (reset control register of the south bridge).

Source: Intel ICH9 data sheet, sections "PORT92" and "RST_CNT". The third way, the keyboard controller, is in
keyboard_controller.py. Here too: port 0x80, whose writes are a delay on PCs.
"""

from __future__ import annotations

from vtl0_guest.cpu.devices.bus import Guard
from vtlab.v1 import vcpu_pb2

SYSTEM_CONTROL_A = 0x92
RESET_CONTROL = 0xCF9
# What a write there must be for a cold reset that switches the power off and on (RST_CNT bits 3:1).
FULL_RESET = 0x0E
DELAY_PORTS = (0x80, 0xED)


class SystemControlA:
    """Bit 0 resets on its rising edge, bit 1 is the A20 gate: kept, but A20 is never masked."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._value = 0x02

    def read(self, _port: int, _size: int) -> int:
        return self._value

    def write(self, _port: int, _size: int, value: int) -> None:
        if value & ~self._value & 1:
            self._guard.post_exit(vcpu_pb2.ResetRequest(source="0x92"))
        self._value = value & 3


class ResetControl:
    """A write with bit 2 set resets; otherwise bits 3 and 1, the kind of the reset to come, are kept."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._value = 0

    def read(self, _port: int, _size: int) -> int:
        return self._value

    def write(self, _port: int, _size: int, value: int) -> None:
        if value & 4:
            self._guard.post_exit(vcpu_pb2.ResetRequest(source="0xcf9"))
        else:
            self._value = value & 0xA


class DelayPort:
    """A latch without meaning, here so that delay writes do not leave the core."""

    def __init__(self) -> None:
        self._value = 0

    def read(self, _port: int, _size: int) -> int:
        return self._value

    def write(self, _port: int, _size: int, value: int) -> None:
        self._value = value & 0xFF
