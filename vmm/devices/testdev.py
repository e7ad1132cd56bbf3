"""Ports of QEMU's pc-testdev that kvm-unit-tests use (QEMU: hw/misc/pc-testdev.c).

0xE0-0xE3 echo what was written; 0x2000-0x2017 are the lines of the interrupt controllers.
"""

from __future__ import annotations

from vtlab.v1.vcpu_pb2 import IrqLine, PendingEvent, Update

ECHO_PORTS = range(0xE0, 0xE4)
LINE_PORTS = range(0x2000, 0x2018)
_ISA_LINES = 16  # nothing is wired to the others


class TestDevice:
    """One device of one machine."""

    ports = (*ECHO_PORTS, *LINE_PORTS)

    def __init__(self) -> None:
        self._echo = bytearray(4)

    def read(self, port: int, size: int) -> int:
        if port in LINE_PORTS:
            return (1 << 8 * size) - 1
        start = port - ECHO_PORTS.start
        return int.from_bytes(self._echo[start : start + size], "little")

    def write(self, port: int, size: int, value: int) -> tuple[Update, ...]:
        if port in LINE_PORTS:
            line = IrqLine(irq=port - LINE_PORTS.start, asserted=bool(value))
            return (Update(event=PendingEvent(irq_line=line)),) if line.irq < _ISA_LINES else ()
        start = port - ECHO_PORTS.start
        raw = value.to_bytes(size, "little")[: len(self._echo) - start]
        self._echo[start : start + len(raw)] = raw
        return ()

    def save(self) -> bytes:
        return bytes(self._echo)

    def restore(self, state: bytes) -> None:
        if len(state) != len(self._echo):
            raise ValueError(f"{len(state)} bytes")
        self._echo = bytearray(state)
