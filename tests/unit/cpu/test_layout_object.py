"""The processor's structure is found by its own references, not by the nearest pointer or a copy of the magic bytes.

Bug: pointers of the handle to heap memory shortly before CPUState, or to a copy of the bytes searched for, were
taken for the object; the next port access then crashed the process.
"""

from __future__ import annotations

from unicorn import UC_ARCH_X86, UC_MODE_64, Uc

from vtl0_guest.cpu import layout


def test_every_engine_has_its_structure_at_the_same_distance() -> None:
    kept, distances = [], set()
    for number in range(24):
        engine = Uc(UC_ARCH_X86, UC_MODE_64)
        found = layout.find(engine)
        distances.add(found.environment - found.processor)
        if number % 3 == 0:
            kept.append(engine)  # the others leave freed structures behind
    assert len(distances) == 1


def test_an_object_refers_aligned() -> None:
    address = 0x1122334455667788
    assert layout._refers(bytes(16) + address.to_bytes(8, "little"), address)
    assert not layout._refers(bytes(3) + address.to_bytes(8, "little") + bytes(5), address)
    assert not layout._refers(bytes(64), address)
