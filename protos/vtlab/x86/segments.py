"""Segment registers as loaders set them, hidden part included.

Sources: Intel SDM volume 3, section 3.4.5; TLFS HV_X64_SEGMENT_REGISTER (the attributes of vtlab.v1.Segment).
"""

from __future__ import annotations

from vtlab.v1 import registers_pb2


def flat(selector: int, attributes: int) -> registers_pb2.Segment:
    """A segment from 0 to 4 GiB."""
    return registers_pb2.Segment(selector=selector, attributes=attributes, limit=0xFFFFFFFF, base=0)


def real_mode(selector: int, *, code: bool = False) -> registers_pb2.Segment:
    """As real mode loads it: base is the selector times 16, limit 64 KiB."""
    return registers_pb2.Segment(selector=selector, attributes=0x9B if code else 0x93, limit=0xFFFF, base=selector << 4)
