"""Reference time, its page, the assist page, and the table of MSRs."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.hyperv.pages import ASSIST, SIEFP, SIMP, TSC_PAGE, Bench
from vtl0_guest.cpu.devices.bus import GeneralProtection
from vtl0_guest.cpu.devices.clock import HostClock, ManualClock
from vtl0_guest.cpu.hyperv import msrs
from vtl0_guest.cpu.hyperv.reference_time import ReferenceTime
from vtlab.hyperv.msrs import HvMsr


@pytest.fixture
def bench() -> Bench:
    return Bench()


def from_page(page: bytes, tsc: int) -> int:
    """What a guest computes (TLFS, "Reference TSC")."""
    scale, offset = int.from_bytes(page[8:16], "little"), int.from_bytes(page[16:24], "little", signed=True)
    return ((tsc & (1 << 64) - 1) * scale >> 64) + offset


def test_it_counts_from_the_creation_in_units_of_100_ns(bench: Bench) -> None:
    assert bench.rdmsr(HvMsr.TIME_REF_COUNT) <= 1
    bench.clock.advance(2.5)
    assert abs(bench.rdmsr(HvMsr.TIME_REF_COUNT) - 25_000_000) <= 1


def test_another_level_has_the_same_zero() -> None:
    clock = ManualClock(now=10.0)
    first = ReferenceTime(clock)
    clock.advance(3)
    second = ReferenceTime(clock, first.created)
    assert abs(first.now() - second.now()) <= 1


def test_the_host_clock_agrees_with_the_counter() -> None:
    clock = HostClock()
    reference = ReferenceTime(clock)
    reference.now()  # measures the frequency
    before, counted, after = clock.now(), reference.now(), clock.now()
    while clock.now() < after + 0.05:
        pass
    least = clock.now() - after
    counted = reference.now() - counted
    most = clock.now() - before
    # The process may lose its processor between any two readings: the count lies between what encloses it.
    assert 0.95 * least <= counted / 10e6 <= 1.05 * most


@given(st.integers(0, 1 << 62), st.integers(0, (1 << 64) - 1))
def test_the_page_is_never_ahead_of_the_msr(tsc: int, offset: int) -> None:
    """For any write to the time-stamp counter, and never behind by more than two units."""
    clock = ManualClock(now=tsc / 1e9, tsc_hz=2.4e9)
    reference = ReferenceTime(clock)
    guest_tsc = clock.tsc() + offset & (1 << 64) - 1
    assert 0 <= reference.now() - from_page(reference.tsc_page(1, offset), guest_tsc) <= 2


def test_the_page_is_written_when_it_is_enabled(bench: Bench) -> None:
    bench.wrmsr(HvMsr.REFERENCE_TSC, TSC_PAGE | 1)
    assert bench.rdmsr(HvMsr.REFERENCE_TSC) == TSC_PAGE | 1
    page = bench.memory.read(TSC_PAGE, 4096)
    assert page[:4] == b"\1\0\0\0"
    assert page[24:] == bytes(4096 - 24)
    assert from_page(page, bench.clock.tsc()) == bench.rdmsr(HvMsr.TIME_REF_COUNT)


def test_counters_that_differ_invalidate_the_page() -> None:
    bench = Bench(vp_count=2)
    bench.wrmsr(HvMsr.REFERENCE_TSC, TSC_PAGE | 1)
    page = bench.partition.tsc_page
    page.set_tsc_offset(0, 1000)
    assert bench.memory.read(TSC_PAGE, 4) == bytes(4)
    page.set_tsc_offset(1, 1000)
    assert bench.memory.read(TSC_PAGE, 4) == b"\2\0\0\0"
    raw = bench.memory.read(TSC_PAGE, 24)
    assert 0 <= bench.rdmsr(HvMsr.TIME_REF_COUNT) - from_page(raw, bench.clock.tsc() + 1000) <= 2


@pytest.mark.parametrize("index", [HvMsr.SIMP, HvMsr.SIEFP, HvMsr.VP_ASSIST_PAGE, HvMsr.REFERENCE_TSC])
def test_pages_are_zeroed_once_and_need_the_right_to_write(bench: Bench, index: HvMsr) -> None:
    bench.wrmsr(index, 0)
    bench.wrmsr(index, 0x8001)
    assert bench.memory.read(0x8000 + 32, 4064) == bytes(4064)
    bench.memory.write(0x8100, b"mine")
    bench.wrmsr(index, 0x8001)
    assert bench.memory.read(0x8100, 4) == b"mine"
    bench.memory.read_only.add(0x9)
    for refused in (0x9001, 0x1_0000_0000_0001, (1 << 64) - 1):
        with pytest.raises(GeneralProtection):
            bench.wrmsr(index, refused)
        assert bench.rdmsr(index) == 0x8001
    bench.wrmsr(index, 0x9000)  # off: no page is touched
    assert bench.memory.read(0x9000, 4) == b"\xee" * 4


def test_assist_page_fields(bench: Bench) -> None:
    assist = bench.vp.assist
    assist.note_entry(1, 3, 4)
    assert assist.return_registers() == (0, 0)
    bench.wrmsr(HvMsr.VP_ASSIST_PAGE, ASSIST | 1)
    assist.note_entry(2, 11, 22)
    assert struct.unpack_from("<I4xQQ", bench.memory.data, ASSIST + 8) == (2, 11, 22)
    assert assist.return_registers() == (11, 22)
    bench.memory.read_only.add(ASSIST >> 12)
    assist.note_entry(1, 3, 4)
    assert struct.unpack_from("<I4xQQ", bench.memory.data, ASSIST + 8) == (2, 11, 22)


def test_directions(bench: Bench) -> None:
    for index, row in msrs.TABLE.items():
        assert row.rule
        if row.write is None:
            with pytest.raises(GeneralProtection):
                bench.wrmsr(index, 0)
        if row.read is None:
            with pytest.raises(GeneralProtection):
                bench.rdmsr(index)
    assert bench.rdmsr(HvMsr.SVERSION) == 1
    assert bench.rdmsr(HvMsr.EOM) == 0
    assert bench.rdmsr(HvMsr.SIMP) == SIMP | 1
    assert bench.rdmsr(HvMsr.SIEFP) == SIEFP | 1
    assert bench.rdmsr(HvMsr.TSC_FREQUENCY) == 1_000_000_000
    assert bench.rdmsr(HvMsr.APIC_FREQUENCY) == 1_000_000_000


def test_apic_shortcuts(bench: Bench) -> None:
    bench.wrmsr(HvMsr.ICR, 0 << 56 | 0x41)  # to APIC 0 in xAPIC mode
    bench.wrmsr(HvMsr.TPR, 0x50)
    assert bench.rdmsr(HvMsr.TPR) == 0x50
    assert bench.take() is None
    bench.wrmsr(HvMsr.TPR, 0)
    assert bench.take() == 0x41
    assert bench.in_service(0x41)
    bench.wrmsr(HvMsr.EOI, 0)
    assert not bench.in_service(0x41)
    assert bench.rdmsr(HvMsr.ICR) & 0xFF == 0x41


def test_apic_shortcuts_need_an_apic(bench: Bench) -> None:
    bench.vp.apic.msr_write(0x1B, 0xFEE00100)
    for index in (HvMsr.ICR, HvMsr.TPR):
        with pytest.raises(GeneralProtection):
            bench.rdmsr(index)
    with pytest.raises(GeneralProtection):
        bench.wrmsr(HvMsr.EOI, 0)


@given(st.sampled_from(sorted(msrs.TABLE)), st.integers(0, (1 << 64) - 1))
def test_no_value_does_more_than_fault(index: int, value: int) -> None:
    made = Bench()
    try:
        made.wrmsr(index, value)
    except GeneralProtection:
        return
    made.serve()
    if msrs.TABLE[index].read is not None:
        assert 0 <= made.rdmsr(index) < 1 << 64
