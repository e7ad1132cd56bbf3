"""ACPI tables in the firmware range below 1 MiB, where kernels look for the root pointer."""

from __future__ import annotations

from vtl0_guest.cpu.devices.power_management import FACS_ADDRESS
from vtl0_guest.loaders.acpi import tables
from vtl0_guest.loaders.target import FIRMWARE_START, Target

# Tables start on such a boundary; the FACS needs it.
_ALIGNMENT = 64


def place_tables(target: Target, vp_count: int) -> int:
    """Writes the tables from FIRMWARE_START on, which memory_map() reports as reserved; returns the RSDP's address.

    Raises:
        BadImage: RAM ends below, or the image lies there.
    """
    root = FIRMWARE_START
    placed: list[bytes] = []

    def place(data: bytes) -> int:
        """The address that the next table gets."""
        at = root + _ALIGNMENT + sum(map(len, placed))
        placed.append(data.ljust(-(-len(data) // _ALIGNMENT) * _ALIGNMENT, b"\0"))
        return at

    facs, dsdt = place(tables.facs()), place(tables.dsdt(vp_count))
    assert facs == FACS_ADDRESS, "what wakes the machine looks there"
    described = [place(tables.fadt(facs, dsdt)), place(tables.madt(vp_count))]
    pointer = tables.rsdp(place(tables.rsdt(described)), place(tables.xsdt(described)))
    target.put_free(root, pointer.ljust(_ALIGNMENT, b"\0") + b"".join(placed), "ACPI tables")
    return root
