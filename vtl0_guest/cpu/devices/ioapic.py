"""The I/O APIC: 24 inputs, each with an entry that says which interrupt message a signal on it becomes.

Source: Intel 82093AA data sheet (290566); for the end-of-interrupt broadcast, Intel SDM volume 3, "Signaling interrupt
servicing completion". Polarity is kept and means nothing: True on a line is asserted. As the data sheet has it, an edge
on a masked input is lost. ExtINT entries go nowhere: the 8259 pair reaches LINT0 instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtl0_guest.cpu.devices.apic_registers import Delivery
from vtl0_guest.cpu.devices.bus import Guard
from vtl0_guest.cpu.devices.local_apic import LocalApic, send

BASE = 0xFEC0_0000
ID = 0
INPUTS = 24
# The PIT's output: ISA IRQ 0 is wired here, since input 0 belongs to the 8259 pair on a PC.
TIMER_INPUT = 2
VERSION = 0x11

_SELECT, _WINDOW = 0x00, 0x10
_REGISTER_ID, _REGISTER_VERSION, _REGISTER_ARBITRATION, _FIRST_ENTRY = 0x00, 0x01, 0x02, 0x10

# Entry: vector 7:0, delivery 10:8, logical destination 11, delivery status 12, polarity 13, remote IRR 14, level 15,
# mask 16, destination 63:56.
_LOGICAL, _REMOTE_IRR, _LEVEL, _MASKED = 1 << 11, 1 << 14, 1 << 15, 1 << 16
_LOW_WRITABLE, _HIGH_WRITABLE = 0x0001_AFFF, 0xFF00_0000


class IoApic:
    """MMIO at BASE. Its owner holds the guard when it sets a line or ends an interrupt."""

    def __init__(self, guard: Guard, bus: Sequence[LocalApic]) -> None:
        """`bus` is the list of all local APICs of the machine."""
        self._guard = guard
        self._bus = bus
        self._entries = [_MASKED] * INPUTS
        self._lines = 0
        self._selected = 0
        self._id = ID

    # ------------------------------------------------------------------------------------------ signals

    def set_line(self, number: int, level: bool) -> None:
        """Sets input 0 to 23."""
        bit = 1 << number
        rising = level and not self._lines & bit
        self._lines = self._lines | bit if level else self._lines & ~bit
        if rising or (level and self._entries[number] & _LEVEL):
            self._signal(number)

    def end_of_interrupt(self, vector: int) -> None:
        """A processor ended a level-triggered interrupt: inputs that are still asserted signal again."""
        for number, entry in enumerate(self._entries):
            if entry & _REMOTE_IRR and entry & 0xFF == vector:
                self._entries[number] = entry & ~_REMOTE_IRR
                if self._lines >> number & 1:
                    self._signal(number)

    def _signal(self, number: int) -> None:
        entry = self._entries[number]
        level = bool(entry & _LEVEL)
        if entry & _MASKED or (level and entry & _REMOTE_IRR):
            return
        delivery = Delivery(entry >> 8 & 7) if entry >> 8 & 7 in Delivery.__members__.values() else None
        if delivery in (None, Delivery.EXTINT):
            return
        if level and delivery in (Delivery.FIXED, Delivery.LOWEST):
            self._entries[number] |= _REMOTE_IRR
        send(self._bus, delivery, entry & 0xFF, entry >> 56, logical=bool(entry & _LOGICAL), level=level)

    # ------------------------------------------------------------------------------------------ registers

    def mmio_read(self, offset: int, size: int) -> int:
        """IOREGSEL and IOWIN; the rest of the page reads as zero."""
        with self._guard:
            value = {_SELECT: self._selected, _WINDOW: self._read()}.get(offset & ~3, 0)
            return value >> 8 * (offset & 3) & ((1 << 8 * size) - 1)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Aligned writes; the data register is 32 bits wide."""
        with self._guard:
            if offset == _SELECT:
                self._selected = value & 0xFF
            elif offset == _WINDOW and size == 4:
                self._write(value & 0xFFFF_FFFF)

    def _read(self) -> int:
        number, high = divmod(self._selected - _FIRST_ENTRY, 2)
        if 0 <= number < INPUTS:
            return self._entries[number] >> 32 * high & 0xFFFF_FFFF
        return {
            _REGISTER_ID: self._id << 24,
            _REGISTER_VERSION: (INPUTS - 1) << 16 | VERSION,
            _REGISTER_ARBITRATION: self._id << 24,
        }.get(self._selected, 0)

    def _write(self, value: int) -> None:
        number, high = divmod(self._selected - _FIRST_ENTRY, 2)
        if self._selected == _REGISTER_ID:
            self._id = value >> 24 & 0xF
        elif 0 <= number < INPUTS and high:
            self._entries[number] = self._entries[number] & 0xFFFF_FFFF | (value & _HIGH_WRITABLE) << 32
        elif 0 <= number < INPUTS:
            # Remote IRR is read-only, and means nothing for an edge.
            kept = _REMOTE_IRR if value & _LEVEL else 0
            self._entries[number] = self._entries[number] & (~0xFFFF_FFFF | kept) | value & _LOW_WRITABLE
            if value & _LEVEL and self._lines >> number & 1:
                self._signal(number)
