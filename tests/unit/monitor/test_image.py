"""Images that VTL1 measures and that are no kernels."""

from __future__ import annotations

import struct

import pytest

from tests.unit.loaders.images import Segment, elf_image
from vtl1_monitor.policy.image import BootImage
from vtlab.errors import BadImage


@pytest.mark.parametrize("offset", [56, 60], ids=["e_phnum", "e_shnum"])
def test_headers_without_end_are_refused(offset: int) -> None:
    """Bug: found by fuzzing; 62,708 program headers took VTL1 0.6 s of processor time."""
    data = bytearray(elf_image([Segment(0x100000, 0x100000, b"\x90" * 64, 64)], 0x100000, bits=64) + bytes(4 << 20))
    struct.pack_into("<Q", data, 40, 64)  # e_shoff
    struct.pack_into("<HH", data, 58, 64, 0)  # e_shentsize
    struct.pack_into("<H", data, offset, 62_708)
    with pytest.raises(BadImage, match="62708"):
        BootImage(bytes(data))
