"""Decisions without an engine: filter, descriptors, nested entries, control-register rules, double faults, packing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtl0_guest.cpu import control, delivery, descriptors, hypercall_page, native_hooks, nested
from vtl0_guest.cpu.cpuid import cpuid
from vtl0_guest.cpu.faults import GuestFault, Shutdown
from vtl0_guest.cpu.intercepts import Intercepts
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer

R = registers_pb2
# Without a deadline: the machine may be busy.
quick = settings(deadline=None, max_examples=60)
U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)


# ------------------------------------------------------------------------------------------------------- filter


@quick
@given(U64, U64, U64)
def test_a_write_exits_only_if_a_watched_bit_changes(mask: int, old: int, new: int) -> None:
    intercepts = Intercepts(vcpu_pb2.InterceptFilter(cr0_mask=mask))
    assert intercepts.register_write(R.REGISTER_NAME_CR0, old, new) == bool((old ^ new) & mask)
    assert not intercepts.register_write(R.REGISTER_NAME_CR4, old, new)
    assert not intercepts.register_write(R.REGISTER_NAME_CR0, old, old)


@quick
@given(st.lists(U64, max_size=5), U64)
def test_targets_are_compared_without_flags(targets: list[int], value: int) -> None:
    intercepts = Intercepts(vcpu_pb2.InterceptFilter(cr3_writes=True, cr3_targets=targets))
    base = 0x000F_FFFF_FFFF_F000
    assert intercepts.cr3_write(value) == (value & base not in {target & base for target in targets})
    assert not Intercepts().cr3_write(value)


@quick
@given(U32, U64, U64, U64)
def test_masks_of_one_register_add_up(index: int, first: int, second: int, change: int) -> None:
    filters = [vcpu_pb2.MsrFilter(index=index, mask=mask) for mask in (first, second)]
    intercepts = Intercepts(vcpu_pb2.InterceptFilter(msr_writes=filters))
    assert intercepts.msr_write(index, 0, change) == bool(change & (first | second))
    assert not intercepts.msr_write(index ^ 1, 0, change)


@quick
@given(st.integers(0, 0xFFFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF), st.integers(0, 16))
def test_a_port_range_catches_every_byte(port: int, size: int, first: int, count: int) -> None:
    ranges = [vcpu_pb2.IndexRange(first=first, count=count)]
    expected = any(first <= port + offset < first + count for offset in range(size))
    assert Intercepts(vcpu_pb2.InterceptFilter(ports=ranges)).port(port, size) == expected


# -------------------------------------------------------------------------------------------------- descriptors


@pytest.mark.parametrize(
    ("low", "high", "attributes", "limit", "base"),
    [
        (0x00AF9B000000FFFF, 0, 0xA09B, 0xFFFFFFFF, 0),  # 64-bit code
        (0x00CF93000000FFFF, 0, 0xC093, 0xFFFFFFFF, 0),  # flat data
        (0x12008B345678ABCD, 0xFFFF8000, 0x008B, 0xABCD, 0xFFFF800012345678),  # busy TSS
    ],
)
def test_known_descriptors(low: int, high: int, attributes: int, limit: int, base: int) -> None:
    assert descriptors.decode(0x28, low, high) == (0x28, attributes, limit, base)


@quick
@given(U64)
def test_kinds_of_segments(low: int) -> None:
    segment = descriptors.decode(8, low)
    code = low >> 43 & 1 and low >> 44 & 1
    assert descriptors.is_code(segment) == bool(code)
    assert descriptors.is_conforming(segment) == bool(code and low >> 42 & 1)
    assert descriptors.is_writable_data(segment) == bool(low >> 44 & 1 and not low >> 43 & 1 and low >> 41 & 1)
    assert descriptors.dpl(segment) == low >> 45 & 3


# -------------------------------------------------------------------------------------------------- nested table

ACCESS = st.builds(
    vcpu_pb2.PageAccess,
    read=st.booleans(),
    write=st.booleans(),
    kernel_execute=st.booleans(),
    user_execute=st.booleans(),
    page_table=st.booleans(),
)


@quick
@given(ACCESS, st.integers(0, 63), st.integers(0, 63), st.sampled_from([nested.WRITABLE_BASE, nested.SEALED_BASE]))
def test_entries_say_what_was_asked(access: vcpu_pb2.PageAccess, first: int, count: int, base: int) -> None:
    table = nested.NestedTable(128 * 4096, 128 * 4096)
    table.map(first, count, base, access)
    for page in range(128):
        for user in (False, True):
            entry = table.entry(page, user)
            if not (first <= page < first + count and access.read):
                assert entry == 0
                continue
            execute = access.user_execute if user else access.kernel_execute
            assert entry & nested.P
            assert entry & nested.US
            assert bool(entry & nested.RW) == (access.write or access.page_table)
            assert bool(entry & nested.NX) != execute
            assert entry & nested.ADDRESS == base + page * 4096
    assert table.split == (access.kernel_execute != access.user_execute)


def test_tables_never_map_what_is_hidden() -> None:
    table = nested.NestedTable(1 << 21, 1 << 21)
    table.map(0, 512, nested.WRITABLE_BASE, vcpu_pb2.PageAccess(read=True, write=True))
    hidden = {nested.HIDDEN_BASE >> nested.REGION_SHIFT, nested.NESTED_BASE >> nested.REGION_SHIFT}
    assert all((table.entry(page) & nested.ADDRESS) >> nested.REGION_SHIFT not in hidden for page in range(512))
    assert table.entry(512) == table.entry(-1) == 0


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 513), (512, 1), (511, 2)])
def test_pages_outside_are_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        nested.NestedTable(1 << 21, 1 << 21).map(first, count, 0, vcpu_pb2.PageAccess())


# ---------------------------------------------------------------------------------------------- control registers

STATES = st.builds(
    control.ControlState,
    cr0=st.sampled_from([0x11, 0x80010033, 0x10]),
    cr4=st.sampled_from([0, 0x20, 0x220]),
    efer=st.sampled_from([0, 0x100, 0x500, 0xD01]),
    cs_long=st.booleans(),
)


@quick
@given(STATES, U64)
def test_accepted_cr0_is_consistent(state: control.ControlState, value: int) -> None:
    try:
        new = control.check_cr0(state, value)
    except GuestFault:
        return
    assert not new & Cr0.PG or new & Cr0.PE
    assert not new & Cr0.NW or new & Cr0.CD
    assert new & Cr0.ET
    assert not new & ~control.CR0_DEFINED
    efer = control.efer_after_cr0(state.efer, new)
    assert bool(efer & Efer.LMA) == bool(new & Cr0.PG and state.efer & Efer.LME)


@quick
@given(STATES, U64)
def test_accepted_cr4_has_no_bit_that_the_processor_lacks(state: control.ControlState, value: int) -> None:
    try:
        new = control.check_cr4(state, value)
    except GuestFault:
        return
    assert new == value
    assert not new & (Cr4.LA57 | Cr4.PCIDE | Cr4.VMXE | Cr4.PKE | Cr4.CET)
    assert not state.efer & Efer.LMA or new & Cr4.PAE


@quick
@given(STATES, U64)
def test_accepted_efer_never_enables_nesting(state: control.ControlState, value: int) -> None:
    try:
        new = control.check_efer(state, value)
    except GuestFault:
        return
    assert not new & Efer.SVME
    assert new & Efer.LMA == state.efer & Efer.LMA
    assert not state.cr0 & Cr0.PG or not (new ^ state.efer) & Efer.LME


@quick
@given(U32, U64)
def test_extended_control_register_rules(index: int, value: int) -> None:
    legal = index == 0 and value in (1, 3)
    if legal:
        assert control.check_xcr0(index, value) == value
    else:
        with pytest.raises(GuestFault):
            control.check_xcr0(index, value)


# ------------------------------------------------------------------------------------------------------- delivery

CONTRIBUTORY = {0, 10, 11, 12, 13, 21}


@quick
@given(st.one_of(st.none(), st.integers(0, 31)), st.integers(0, 31))
def test_double_fault_rules(first: int | None, second: int) -> None:
    if first == 8:
        with pytest.raises(Shutdown):
            delivery.combine(first, GuestFault(second))
        return
    combined = delivery.combine(first, GuestFault(second, 5))
    double = (first in CONTRIBUTORY and second in CONTRIBUTORY) or (
        first == 14 and (second == 14 or second in CONTRIBUTORY)
    )
    assert combined.vector == (8 if double else second)
    assert combined.error_code == (0 if double else 5)


# --------------------------------------------------------------------------------------------------------- others


@quick
@given(U32, U32, st.integers(0, 3))
def test_nested_virtualization_is_never_shown(leaf: int, subleaf: int, vp_index: int) -> None:
    values = cpuid(leaf, subleaf, vp_index, 4, 0, True)
    assert all(0 <= value < 1 << 32 for value in values)
    if leaf == 0x80000001:
        assert not values[2] & 4
    assert leaf != 0x8000000A or values == (0, 0, 0, 0)


def test_hypercall_page_layout() -> None:
    page = hypercall_page.content()
    assert len(page) == 4096
    assert page[0:4] == bytes.fromhex("0f01d9c3")
    assert page[0x0F:0x1B] == bytes.fromhex("4889c8b9110000000f01d9c3")
    assert page[0x26:0x32] == bytes.fromhex("4889c8b9120000000f01d9c3")
    assert set(page[0x32:]) == {0xCC}


def test_native_code_links_jumps_both_ways() -> None:
    jump = native_hooks._Jump(b"\x0f\x85", "there")
    code = native_hooks._link([jump, "here", b"\x90" * 3, "there", b"\xc3", native_hooks._Jump(b"\x0f\x84", "here")])
    assert code == b"\x0f\x85\x03\0\0\0\x90\x90\x90\xc3\x0f\x84" + (-10).to_bytes(4, "little", signed=True)
