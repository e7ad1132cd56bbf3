"""Descriptors and hidden parts convert both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtlab.v1 import registers_pb2
from vtlab.x86 import segments


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 0xFFFF))
def test_a_descriptor_survives_the_round_trip(descriptor: int, selector: int) -> None:
    # Bits 43:40.. of the attributes and limit bits are all kept; nothing else exists in a descriptor.
    segment = segments.from_descriptor(selector, descriptor)
    assert segment.selector == selector
    assert segments.to_descriptor(segment) == descriptor


@pytest.mark.parametrize(
    ("descriptor", "base", "limit", "attributes"),
    [
        (0x00AF9B000000FFFF, 0, 0xFFFFFFFF, 0xA09B),  # 64-bit code
        (0x00CF93000000FFFF, 0, 0xFFFFFFFF, 0xC093),  # flat data
        (0x12008B345678ABCD, 0x12345678, 0xABCD, 0x008B),  # busy TSS
    ],
)
def test_known_descriptors(descriptor: int, base: int, limit: int, attributes: int) -> None:
    assert segments.from_descriptor(8, descriptor) == registers_pb2.Segment(
        selector=8, base=base, limit=limit, attributes=attributes
    )


def test_system_descriptors_have_64_bit_bases() -> None:
    assert segments.from_descriptor(0x28, 0x12008B345678ABCD, 0xFFFF8000).base == 0xFFFF800012345678


@pytest.mark.parametrize(("limit", "attributes"), [(0x100000, 0x93), (0x1000, 0x8093)])
def test_limits_that_do_not_fit_are_refused(limit: int, attributes: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        segments.to_descriptor(registers_pb2.Segment(limit=limit, attributes=attributes))


def test_real_mode_segments() -> None:
    assert segments.real_mode(0xF000, code=True) == registers_pb2.Segment(
        selector=0xF000, base=0xF0000, limit=0xFFFF, attributes=0x9B
    )
