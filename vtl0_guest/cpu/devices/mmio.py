"""Accesses of any size to device registers in memory."""

from __future__ import annotations

from collections.abc import Iterator

from vtl0_guest.cpu.devices.bus import MmioDevice


def load(device: MmioDevice, offset: int, size: int) -> bytes:
    """Bytes from the page of a device: naturally aligned accesses of up to 8 bytes."""
    return b"".join(device.mmio_read(at, part).to_bytes(part, "little") for at, part in _parts(offset, size))


def store(device: MmioDevice, offset: int, data: bytes) -> None:
    """The other direction."""
    for at, part in _parts(offset, len(data)):
        device.mmio_write(at, part, int.from_bytes(data[at - offset : at - offset + part], "little"))


def _parts(offset: int, size: int) -> Iterator[tuple[int, int]]:
    end = offset + size
    while offset < end:
        part = min(offset & -offset or 8, 8)
        while part > end - offset:
            part //= 2
        yield offset, part
        offset += part
