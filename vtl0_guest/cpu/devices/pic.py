"""The two 8259A interrupt controllers of a PC.

Source: Intel 8259A data sheet (231468). Ports 0x20-0x21 and 0xA0-0xA1, edge/level registers at 0x4D0-0x4D1. Buffered
and MCS-80 modes are not there, as in a PC.
"""

from __future__ import annotations

from collections.abc import Callable

# IRQ 0, 1, 2, 8 and 13 are always edge triggered.
_ELCR_MASK = (0xF8, 0xDE)
_CASCADE = 2


class Pic:
    """One 8259A. `irr`, `imr` and `isr` have bit n for input n."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self.elcr = 0
        self._lines = 0
        self.cascade_mask = 0
        self.vector_base = 0
        self._reset()

    def _reset(self) -> None:
        self.irr = self._lines & self.elcr
        self.imr = 0
        self.isr = 0
        self._highest = 0
        self._read_isr = False
        self._poll = False
        self._special_mask = False
        self._auto_eoi = False
        self._rotate_on_auto_eoi = False
        self._fully_nested = False
        # Initialization words that are still to come.
        self._expected: list[int] = []

    def set_line(self, number: int, level: bool) -> None:
        bit = 1 << number
        was = self._lines & bit
        self._lines = self._lines | bit if level else self._lines & ~bit
        by_level = (self.elcr | self.cascade_mask) & bit
        if level and (by_level or not was):
            self.irr |= bit
        elif by_level and not level:
            self.irr &= ~bit
        self._changed()

    def _order(self, bits: int) -> int | None:
        """The input of highest priority among `bits`."""
        for step in range(8):
            number = (self._highest + step) & 7
            if bits >> number & 1:
                return number
        return None

    def request(self) -> int | None:
        """The input that drives INT: the highest one requested, unmasked and above what is in service."""
        asking = self._order(self.irr & ~self.imr)
        if asking is None:
            return None
        serving = self.isr
        if self._special_mask:
            serving &= ~self.imr
        if self._fully_nested:
            serving &= ~self.cascade_mask
        busy = self._order(serving)
        if busy is None or (asking - self._highest) & 7 < (busy - self._highest) & 7:
            return asking
        return None

    def acknowledge(self) -> int:
        """INTA cycle: the input taken; 7, with nothing in service, if the request has gone (spurious)."""
        number = self.request()
        if number is None:
            return 7
        bit = 1 << number
        if not self.elcr & bit:
            self.irr &= ~bit
        if not self._auto_eoi:
            self.isr |= bit
        elif self._rotate_on_auto_eoi:
            self._highest = (number + 1) & 7
        self._changed()
        return number

    def read(self, port: int, _size: int) -> int:
        if self._poll:
            self._poll = False
            number = self.request()
            return 0 if number is None else 0x80 | self.acknowledge()
        if port & 1:
            return self.imr
        return self.isr if self._read_isr else self.irr

    def write(self, port: int, _size: int, value: int) -> None:
        value &= 0xFF
        if port & 1:
            self._write_data(value)
        elif value & 0x10:
            self._write_icw1(value)
        elif value & 0x08:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value)
        self._changed()

    def _write_icw1(self, value: int) -> None:
        self._reset()
        single, has_icw4 = value & 0x02, value & 0x01
        self._expected = [2] + ([] if single else [3]) + ([4] if has_icw4 else [])

    def _write_data(self, value: int) -> None:
        word = self._expected.pop(0) if self._expected else 0
        if word == 0:
            self.imr = value
        elif word == 2:
            self.vector_base = value & 0xF8
        elif word == 4:
            self._fully_nested = bool(value & 0x10)
            self._auto_eoi = bool(value & 0x02)

    def _write_ocw3(self, value: int) -> None:
        if value & 0x04:
            self._poll = True
        if value & 0x02:
            self._read_isr = bool(value & 0x01)
        if value & 0x40:
            self._special_mask = bool(value & 0x20)

    def _write_ocw2(self, value: int) -> None:
        """Bits 7:5 rotate, specific, EOI; bits 2:0 the input of a specific command."""
        rotate, specific, end = value & 0x80, value & 0x40, value & 0x20
        number: int | None = value & 7
        if end:
            if not specific:
                serving = self.isr & ~self.imr if self._special_mask else self.isr
                number = self._order(serving)
            if number is not None:
                self.isr &= ~(1 << number)
                if rotate:
                    self._highest = (number + 1) & 7
        elif specific and rotate:
            self._highest = ((value & 7) + 1) & 7
        elif not specific:
            self._rotate_on_auto_eoi = bool(rotate)


class PicPair:
    """Master and slave, the slave on the master's input 2.

    Attributes:
        output: the master's INT pin.
    """

    PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)

    def __init__(self, on_output: Callable[[bool], None]) -> None:
        """`on_output` is told each change of the INT pin."""
        self._on_output = on_output
        self.output = False
        self.master = Pic(self._master_changed)
        self.slave = Pic(self._slave_changed)
        self.master.cascade_mask = 1 << _CASCADE

    def _slave_changed(self) -> None:
        self.master.set_line(_CASCADE, self.slave.request() is not None)

    def _master_changed(self) -> None:
        output = self.master.request() is not None
        if output != self.output:
            self.output = output
            self._on_output(output)

    def set_irq(self, irq: int, level: bool) -> None:
        """Sets an ISA line, 0 to 15; line 2 is the cascade and goes nowhere."""
        if irq >= 8:
            self.slave.set_line(irq - 8, level)
        elif irq != _CASCADE:
            self.master.set_line(irq, level)

    def irq_line(self, irq: int) -> Callable[[bool], None]:
        """A device's end of the line."""
        return lambda level: self.set_irq(irq, level)

    def peek(self) -> int:
        """The vector that acknowledge() would return."""
        number = self.master.request()
        if number is None:
            return self.master.vector_base + 7
        if number != _CASCADE:
            return self.master.vector_base + number
        behind = self.slave.request()
        return self.slave.vector_base + (7 if behind is None else behind)

    def acknowledge(self) -> int:
        """Both INTA cycles; returns the vector."""
        number = self.master.acknowledge()
        if number != _CASCADE:
            return self.master.vector_base + number
        return self.slave.vector_base + self.slave.acknowledge()

    def read(self, port: int, size: int) -> int:
        if port in (0x4D0, 0x4D1):
            return (self.master, self.slave)[port & 1].elcr
        return (self.master if port < 0xA0 else self.slave).read(port, size)

    def write(self, port: int, size: int, value: int) -> None:
        if port in (0x4D0, 0x4D1):
            (self.master, self.slave)[port & 1].elcr = value & _ELCR_MASK[port & 1]
        else:
            (self.master if port < 0xA0 else self.slave).write(port, size, value)
