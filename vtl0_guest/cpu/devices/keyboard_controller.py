"""A subset of the 8042 keyboard controller: what kernels probe, the reset pulse, and a keyboard that only answers.

Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and auxiliary device controller"; what QEMU's
hw/input/pckbd.c answers. There is no auxiliary device (mouse) and no key is ever pressed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntFlag

from vtl0_guest.cpu.devices.bus import Guard, IrqLine
from vtlab.v1 import vcpu_pb2

DATA = 0x60
COMMAND = 0x64
IRQ = 1


class Status(IntFlag):
    OUTPUT_FULL = 1 << 0
    SYSTEM = 1 << 2
    COMMAND_LAST = 1 << 3
    UNLOCKED = 1 << 4


# Output port: bit 0 low is reset, bit 1 A20, bit 4 output buffer full.
_OUTPUT_PORT = 0x03
# Keyboard disabled is bit 4, its interrupt enabled bit 0, translation bit 6, self-test passed bit 2.
_COMMAND_BYTE = 0x05

# Controller command -> reply.
_REPLIES = {
    0xA9: 0x01,  # test of the auxiliary port: clock line stuck, so no device
    0xAA: 0x55,  # self-test passed
    0xAB: 0x00,  # test of the keyboard port passed
    0xC0: 0x80,  # input port: keyboard not locked
    0xD0: _OUTPUT_PORT,
}
# Commands that take a byte through the data port.
_WITH_DATA = frozenset({0x60, 0xD1, 0xD2, 0xD3, 0xD4})
_ACK = 0xFA
# Keyboard command -> bytes it answers with; every other one is acknowledged.
_KEYBOARD = {0xEE: b"\xee", 0xF2: b"\xfa\xab\x83", 0xFF: b"\xfa\xaa"}


class KeyboardController:
    """Ports 0x60 and 0x64."""

    def __init__(self, line: IrqLine, guard: Guard) -> None:
        self._line = line
        self._guard = guard
        self._replies: deque[int] = deque()
        self._command_byte = _COMMAND_BYTE
        self._command = 0
        self._last_was_command = False
        self._last = 0
        self._data_handlers: dict[int, Callable[[int], None]] = {
            0x60: self._set_command_byte,
            0xD1: self._set_output_port,
            0xD2: self._replies.append,
            # Echo of the auxiliary loop, without the mark of an auxiliary byte: nothing is there.
            0xD3: self._replies.append,
        }

    def _update(self) -> None:
        self._line(bool(self._replies) and bool(self._command_byte & 1))

    def read(self, port: int, _size: int) -> int:
        if port == COMMAND:
            status = Status.SYSTEM.value | Status.UNLOCKED.value
            status |= Status.OUTPUT_FULL.value if self._replies else 0
            return status | (Status.COMMAND_LAST.value if self._last_was_command else 0)
        if self._replies:
            self._last = self._replies.popleft()
            # Each byte is an edge of its own.
            self._line(False)
            self._update()
        return self._last

    def write(self, port: int, _size: int, value: int) -> None:
        value &= 0xFF
        self._last_was_command = port == COMMAND
        if port == COMMAND:
            self._write_command(value)
        else:
            command, self._command = self._command, 0
            if command == 0:
                self._replies.extend(_KEYBOARD.get(value, bytes([_ACK])))
            elif handler := self._data_handlers.get(command):
                handler(value)
        self._update()

    def _write_command(self, value: int) -> None:
        self._command = 0
        if value in _WITH_DATA:
            self._command = value
        elif value == 0x20:
            self._replies.append(self._command_byte)
        elif value in _REPLIES:
            self._replies.append(_REPLIES[value])
        elif value in (0xAD, 0xAE):
            self._command_byte = self._command_byte & ~0x10 | (0x10 if value == 0xAD else 0)
        elif value >= 0xF0 and not value & 1:
            # A pulse of the outputs whose bits are clear; bit 0 is the processor's reset.
            self._reset()

    def _set_command_byte(self, value: int) -> None:
        self._command_byte = value

    def _set_output_port(self, value: int) -> None:
        if not value & 1:
            self._reset()

    def _reset(self) -> None:
        self._guard.post_exit(vcpu_pb2.ResetRequest(source="0x64"))
