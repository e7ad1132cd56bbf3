"""The sixteen ISA interrupt lines, each wired to an 8259 and to the I/O APIC: the guest listens to one of them."""

from __future__ import annotations

from collections.abc import Callable

from vtl0_guest.cpu.devices.ioapic import TIMER_INPUT, IoApic
from vtl0_guest.cpu.devices.pic import PicPair

_TIMER_IRQ, _CASCADE_IRQ = 0, 2


class IsaLines:
    """Its owner holds the guard."""

    def __init__(self, pic: PicPair, ioapic: IoApic) -> None:
        self._pic = pic
        self._ioapic = ioapic

    def set(self, irq: int, level: bool) -> None:
        """Sets a line, 0 to 15. Line 2 joins the two 8259 and goes nowhere."""
        if irq == _CASCADE_IRQ:
            return
        self._pic.set_irq(irq, level)
        self._ioapic.set_line(TIMER_INPUT if irq == _TIMER_IRQ else irq, level)

    def line(self, irq: int) -> Callable[[bool], None]:
        """A device's end of the line."""
        return lambda level: self.set(irq, level)
