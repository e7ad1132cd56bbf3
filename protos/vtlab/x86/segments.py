"""Segment descriptors of 8 bytes and the hidden part of a segment register, as pure conversions.

Sources: Intel SDM volume 3, section 3.4.5 and figure 7-4 (16-byte system descriptors); TLFS HV_X64_SEGMENT_REGISTER.
Attributes are bits 55:40 of the descriptor without the limit's bits 19:16: type[3:0] s[4] dpl[6:5] p[7] avl[12] l[13]
db[14] g[15].
"""

from __future__ import annotations

from enum import IntFlag

from vtlab.v1 import registers_pb2

ATTRIBUTES_MASK = 0xF0FF


class Attribute(IntFlag):
    """Bits of Segment.attributes; the type field is in bits 3:0, DPL in bits 6:5."""

    ACCESSED = 1 << 0
    READABLE_OR_WRITABLE = 1 << 1
    EXPAND_DOWN_OR_CONFORMING = 1 << 2
    CODE = 1 << 3
    S = 1 << 4
    P = 1 << 7
    AVL = 1 << 12
    L = 1 << 13
    DB = 1 << 14
    G = 1 << 15


def descriptor_dpl(attributes: int) -> int:
    """DPL, 0 to 3."""
    return attributes >> 5 & 3


def from_descriptor(selector: int, descriptor: int, high: int = 0) -> registers_pb2.Segment:
    """Hidden part that loading `descriptor` gives; `high` is the second quadword of a 16-byte system descriptor."""
    attributes = descriptor >> 40 & ATTRIBUTES_MASK
    limit = (descriptor & 0xFFFF) | (descriptor >> 32 & 0xF0000)
    if attributes & 0x8000:
        limit = limit << 12 | 0xFFF
    base = (descriptor >> 16 & 0xFFFFFF) | (descriptor >> 32 & 0xFF000000) | (high & 0xFFFFFFFF) << 32
    return registers_pb2.Segment(selector=selector, attributes=attributes, limit=limit, base=base)


def to_descriptor(segment: registers_pb2.Segment) -> int:
    """First quadword of a descriptor for `segment`; only base bits 31:0 fit in it.

    Raises:
        ValueError: the limit cannot be expressed with the granularity that the attributes say.
    """
    limit = segment.limit
    if segment.attributes & 0x8000:
        if limit & 0xFFF != 0xFFF:
            raise ValueError(f"limit {limit:#x} is not a whole number of pages")
        limit >>= 12
    elif limit > 0xFFFFF:
        raise ValueError(f"limit {limit:#x} needs page granularity")
    base = segment.base & 0xFFFFFFFF
    return (
        (limit & 0xFFFF)
        | (base & 0xFFFFFF) << 16
        | (segment.attributes & ATTRIBUTES_MASK) << 40
        | (limit & 0xF0000) << 32
        | (base & 0xFF000000) << 32
    )


def flat(selector: int, attributes: int) -> registers_pb2.Segment:
    """A segment from 0 to 4 GiB."""
    return registers_pb2.Segment(selector=selector, attributes=attributes, limit=0xFFFFFFFF, base=0)


def real_mode(selector: int, *, code: bool = False) -> registers_pb2.Segment:
    """As real mode loads it: base is the selector times 16, limit 64 KiB."""
    return registers_pb2.Segment(selector=selector, attributes=0x9B if code else 0x93, limit=0xFFFF, base=selector << 4)
