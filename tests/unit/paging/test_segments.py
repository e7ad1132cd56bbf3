"""Segment registers as loaders set them."""

from __future__ import annotations

from vtlab.v1 import registers_pb2
from vtlab.x86 import segments


def test_real_mode_segments() -> None:
    assert segments.real_mode(0xF000, code=True) == registers_pb2.Segment(
        selector=0xF000, base=0xF0000, limit=0xFFFF, attributes=0x9B
    )
