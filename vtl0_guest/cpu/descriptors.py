"""Loading descriptors from the guest's GDT and LDT. Source: Intel SDM volume 3, chapters 3 and 5."""

from __future__ import annotations

from vtl0_guest.cpu.environment import Environment, Seg, SegmentState
from vtl0_guest.cpu.faults import GuestFault, general_protection
from vtl0_guest.cpu.guest_memory import GuestMemory
from vtlab.x86.registers import Vector

ATTRIBUTES = 0xF0FF
PRESENT, SYSTEM_S, ACCESSED = 0x80, 0x10, 0x01

# Types of system descriptors (S = 0).
TSS16_AVAILABLE, LDT, TSS16_BUSY, TSS_AVAILABLE, TSS_BUSY = 0x1, 0x2, 0x3, 0x9, 0xB


def decode(selector: int, low: int, high: int = 0) -> SegmentState:
    """Hidden part that a descriptor gives; `high` is the second quadword of a 16-byte one."""
    attributes = low >> 40 & ATTRIBUTES
    limit = (low & 0xFFFF) | (low >> 32 & 0xF0000)
    if attributes & 0x8000:
        limit = limit << 12 | 0xFFF
    base = (low >> 16 & 0xFFFFFF) | (low >> 32 & 0xFF000000) | (high & 0xFFFF_FFFF) << 32
    return SegmentState(selector, attributes, limit, base)


def dpl(segment: SegmentState) -> int:
    return segment.attributes >> 5 & 3


def is_code(segment: SegmentState) -> bool:
    return segment.attributes & 0x18 == 0x18


def is_conforming(segment: SegmentState) -> bool:
    return segment.attributes & 0x1C == 0x1C


def is_writable_data(segment: SegmentState) -> bool:
    return segment.attributes & 0x1A == 0x12


def address(environment: Environment, selector: int, size: int, vector: int) -> int:
    """Linear address of a descriptor. Raises GuestFault(vector, selector) outside its table."""
    if selector & 4:
        ldtr = environment.segment(Seg.LDTR)
        base, limit = ldtr.base, ldtr.limit if ldtr.attributes & PRESENT and ldtr.selector & ~3 else -1
    else:
        base, limit = environment.table(Seg.GDTR)
    if (selector & ~7) + size - 1 > limit:
        raise GuestFault(vector, selector & 0xFFFC)
    return base + (selector & ~7)


def load(environment: Environment, memory: GuestMemory, selector: int, vector: int = Vector.GP) -> SegmentState:
    """Reads the 8-byte descriptor of a selector that is not null, without judging it."""
    at = address(environment, selector, 8, vector)
    return decode(selector, memory.read_int(at, 8, implicit=True))


def load_system(environment: Environment, memory: GuestMemory, selector: int) -> tuple[SegmentState, int]:
    """Reads an LDT or TSS descriptor of the GDT, 16 bytes in long mode; returns it and its linear address."""
    if selector & 4:
        raise general_protection(selector & 0xFFFC)
    size = 16 if environment.long_mode else 8
    at = address(environment, selector, size, Vector.GP)
    raw = memory.read_int(at, size, implicit=True)
    return decode(selector, raw & (1 << 64) - 1, raw >> 64), at


def mark_accessed(environment: Environment, memory: GuestMemory, segment: SegmentState) -> SegmentState:
    """Sets the accessed bit of a code or data descriptor in memory, if it is clear."""
    if segment.attributes & ACCESSED:
        return segment
    at = address(environment, segment.selector, 8, Vector.GP) + 5
    memory.write(at, bytes([(segment.attributes | ACCESSED) & 0xFF]), implicit=True)
    return segment._replace(attributes=segment.attributes | ACCESSED)
