"""Memory of QEMU's pc-testdev, at which kvm-unit-tests aim every kind of access: a device that keeps what is written.

QEMU: hw/misc/pc-testdev.c.
"""

from __future__ import annotations

from vtl0_guest.cpu.devices.bus import Guard, MmioDevice

BASE, SIZE = 0xFF00_0000, 0x1_0000
_PAGE = 4096


class _Page:
    """One page of it."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._bytes = bytearray(_PAGE)

    def mmio_read(self, offset: int, size: int) -> int:
        with self._guard:
            return int.from_bytes(self._bytes[offset : offset + size], "little")

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        with self._guard:
            self._bytes[offset : offset + size] = value.to_bytes(size, "little")


def pages(guard: Guard) -> dict[int, MmioDevice]:
    """What answers at each page, by guest-physical address."""
    return {address: _Page(guard) for address in range(BASE, BASE + SIZE, _PAGE)}
