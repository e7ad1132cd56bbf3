"""State of a machine, read through the SDK: what evidence is made of."""

from __future__ import annotations

from vtlab.client.machine import Machine
from vtlab.errors import NotFound, Refused
from vtlab.v1.vcpu_pb2 import PageAccess

DIRECT_MAP = 0xFFFF888000000000
KERNEL_VMA = 0xFFFFFFFF80000000
SPARE_WINDOW = KERNEL_VMA + 0x10000
DRIVER_WINDOW = KERNEL_VMA + 0x20000
PAGE = 4096

PRESENT, WRITABLE, ACCESSED, DIRTY, GLOBAL, NX = 1, 2, 1 << 5, 1 << 6, 1 << 8, 1 << 63
ENTRY_ADDRESS = 0x000FFFFFFFFFF000


def direct(gpa: int) -> int:
    """Where the kernel's direct map has a guest-physical address."""
    return DIRECT_MAP + gpa


def register(machine: Machine, name: str) -> int:
    """CR0 to CR4, EFER, general registers."""
    return int(getattr(machine.registers().registers, name))


def msr(machine: Machine, index: int) -> int:
    """A modelled MSR. Raises NotFound."""
    for entry in machine.registers().msrs:
        if entry.index == index:
            return entry.value
    raise NotFound(f"MSR {index:#x}", "is not among the modelled ones")


def memory(machine: Machine, gpa: int, size: int = 8) -> bytes | None:
    """Bytes as VTL0 may read them; None where it may not."""
    try:
        return machine.read_memory(gpa, size)
    except Refused:
        return None


def show_bytes(data: bytes | None) -> str:
    """Text if it is text, else hexadecimal."""
    if data is None:
        return "closed to VTL0"
    if not any(data) and len(data) > 8:
        return f"{len(data)} zero bytes"
    text = data.rstrip(b"\0")
    if len(text) >= 4 and all(32 <= byte < 127 for byte in text):
        return repr(text.decode())
    return data.hex(" ")


def show_rights(access: PageAccess) -> str:
    """VTL0's rights on a page by the nested table: "r-x"; kernel and user execution are one letter."""
    execute = access.kernel_execute or access.user_execute
    return ("r" if access.read else "-") + ("w" if access.write else "-") + ("x" if execute else "-")


def entry_gpa(machine: Machine, address: int) -> int:
    """Guest-physical address of the page-table entry that maps, or would map, a page of a mapped 2 MiB."""
    return machine.translate(address).entries[-1]
