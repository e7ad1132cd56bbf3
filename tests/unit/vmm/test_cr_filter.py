"""The filter of registers that userspace owns: KVM's structures and errors, and what an owner answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import designs
from vmm.board import Board
from vmm.designs import register_filter
from vmm.designs.cr_filter import Access, decide
from vmm.exits import serve
from vtlab.client.filters import deny_writes, pinning
from vtlab.errors import BadArgument, Unsupported
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, MsrAccess, RegisterWrite
from vtlab.v1.vmm_pb2 import (
    FILTER_ANSWER_ALLOW,
    FILTER_ANSWER_REPLACE,
    FilterRange,
    FilterRule,
    MachineSpec,
    RegisterFilter,
    UserspaceFilters,
)
from vtlab.x86.registers import Cr4, Msr

CR4 = registers_pb2.REGISTER_NAME_CR4
SMEP, SMAP, PGE = int(Cr4.SMEP), int(Cr4.SMAP), int(Cr4.PGE)
COMMIT, DENY, REPLACE = vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_REPLACE
COMPLETE = vcpu_pb2.ACTION_COMPLETE
ALL = 2**64 - 1


@pytest.fixture
def spec() -> MachineSpec:
    return MachineSpec(ram_size=2 << 20, vp_count=2, design="cr-filter")


def enter_of(board: Board, exit_: Exit) -> Enter:
    answer = serve(board, board.processors[0], exit_)
    assert isinstance(answer, Enter)
    return answer


def cr4(old: int, new: int) -> Exit:
    return Exit(register_write=RegisterWrite(name=CR4, old_value=old, new_value=new))


def wrmsr(index: int, old: int, new: int) -> Exit:
    return Exit(msr=MsrAccess(index=index, write=True, old_value=old, new_value=new))


def told(board: Board) -> list[vmm_pb2.UserspaceExit]:
    return [event.userspace_exit for event in board.events.kept((vmm_pb2.EVENT_KIND_USERSPACE_EXIT,))]


# ------------------------------------------------------------------------------------------- the structure's checks


@pytest.mark.parametrize(
    ("filter_", "match"),
    [
        (RegisterFilter(default_deny=True), "EINVAL: everything would be denied"),
        (RegisterFilter(default_deny=True, ranges=[FilterRange(write=True)]), "EINVAL: everything"),
        (RegisterFilter(ranges=[FilterRange(write=True)] * 17), "17 ranges are more than 16"),
        (RegisterFilter(ranges=[FilterRange(count=1, bitmap=bytes(8))]), r"ranges\[0\].*neither for reads nor"),
        (RegisterFilter(ranges=[FilterRange(write=True, count=0x3001)]), "bitmap of 1544 bytes is more than 1536"),
        (RegisterFilter(ranges=[FilterRange(write=True, count=65, bitmap=bytes(8))]), "65 registers has 16 bytes"),
        (RegisterFilter(ranges=[FilterRange(write=True, count=1, bitmap=b"\0")]), "has 8 bytes, not 1"),
    ],
)
def test_what_kvm_refuses(board: Board, filter_: RegisterFilter, match: str) -> None:
    for filters in (UserspaceFilters(msr=filter_), UserspaceFilters(cr=filter_)):
        with pytest.raises(BadArgument, match=match):
            board.design.set_filters(board, filters)
        with pytest.raises(BadArgument, match=match):
            designs.create(MachineSpec(design="cr-filter", filters=filters))


def test_what_makes_no_sense(board: Board) -> None:
    for filters, match in (
        (UserspaceFilters(exit_reasons=8), "EINVAL: 0x8"),
        (UserspaceFilters(rules=[FilterRule(name="x", index=2)]), "no filter for CR2"),
        (UserspaceFilters(cr=RegisterFilter(ranges=[FilterRange(read=True, count=1, bitmap=bytes(8))])), "do not exit"),
    ):
        with pytest.raises(BadArgument, match=match):
            board.design.set_filters(board, filters)
    with pytest.raises(BadArgument, match="design 'none' has no filters"):
        designs.create(MachineSpec(design="none", filters=pinning()))
    with pytest.raises(Unsupported, match="design 'none' has none"):
        designs.create(MachineSpec(design="none")).set_filters(board, pinning())


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.integers(0, 200), st.integers(1, 70), st.integers(0, 2**128 - 1)),
        max_size=6,
    ),
    st.booleans(),
    st.integers(0, 300),
    st.booleans(),
)
def test_the_first_range_that_fits_decides(
    rows: list[tuple[bool, bool, int, int, int]], default_deny: bool, index: int, write: bool
) -> None:
    ranges = [
        FilterRange(read=r, write=w, base=base, count=count, bitmap=bits.to_bytes(16, "little"))
        for r, w, base, count, bits in rows
    ]
    expected = not default_deny
    for r, w, base, count, bits in rows:
        if (w if write else r) and base <= index < base + count:
            expected = bool(bits >> index - base & 1)
            break
    filter_ = RegisterFilter(default_deny=default_deny, ranges=ranges)
    assert register_filter.allowed(filter_, index, write) == expected
    if not default_deny and write:
        assert (index in register_filter.denied_msr_writes(filter_)) == (not expected)
    if not default_deny and not write:
        reads = register_filter.denied_msr_reads(filter_)
        assert any(one.first <= index < one.first + one.count for one in reads) == (not expected)


def test_x2apic_is_never_filtered() -> None:
    everything = RegisterFilter(ranges=[FilterRange(read=True, write=True, base=0x7F0, count=64, bitmap=bytes(8))])
    denied = register_filter.denied_msr_writes(everything)
    assert 0x7FF in denied
    assert 0x800 not in denied
    assert register_filter.msr_allowed(everything, 0x82F, True)


# ------------------------------------------------------------------------------------------- what the owner answers


def test_nothing_is_filtered_by_default(board: Board) -> None:
    wanted = board.design.filter()
    wanted.user_hypercalls = False
    assert not wanted.ByteSize()


def test_filters_are_replaced_while_it_runs_on_every_vcpu(board: Board) -> None:
    board.design.set_filters(board, pinning())
    for processor in board.processors:
        last = processor._pending[-1].intercepts
        assert (last.cr0_mask, last.cr4_mask, last.cr3_writes) == (ALL, ALL, False)
        assert {row.index for row in last.msr_writes} == {Msr.EFER, Msr.STAR, Msr.LSTAR, Msr.CSTAR, Msr.SFMASK}
    assert enter_of(board, cr4(SMEP, 0)).resolution.action == DENY
    board.design.set_filters(board, UserspaceFilters())
    assert not board.processors[1]._pending[-1].intercepts.cr4_mask


def test_allow_gp_or_another_value(board: Board) -> None:
    board.design.set_filters(board, pinning())
    for exit_, action in (
        (cr4(0, SMEP), COMMIT),
        (cr4(SMEP, SMEP | PGE), COMMIT),
        (cr4(SMEP, PGE), DENY),
        (wrmsr(Msr.LSTAR, 0, 0x1000), COMMIT),
        (wrmsr(Msr.LSTAR, 0x1000, 0x2000), DENY),
        (wrmsr(Msr.EFER, 0xD01, 0x501), DENY),
        (wrmsr(Msr.KERNEL_GS_BASE, 0, 1), COMMIT),
    ):
        if exit_.WhichOneof("reason") == "msr" and exit_.msr.index == Msr.KERNEL_GS_BASE:
            assert exit_.msr.index not in board.processors[0].watched.msr_writes
            continue
        assert enter_of(board, exit_).resolution.action == action, exit_
    assert [one.WhichOneof("run") for one in told(board)] == ["wrcr"] * 3 + ["wrmsr"] * 3
    assert [getattr(one, one.WhichOneof("run") or "").error for one in told(board)] == [0, 0, 1, 0, 1, 1]
    assert told(board)[2].wrcr.reason == register_filter.FILTERED
    board.design.set_filters(board, pinning(FILTER_ANSWER_REPLACE))
    enter = enter_of(board, cr4(SMEP | SMAP, PGE))
    assert (enter.resolution.action, enter.resolution.value) == (REPLACE, SMEP | SMAP | PGE)
    assert told(board)[-1].wrcr.replaced == SMEP | SMAP | PGE
    board.design.set_filters(board, pinning(FILTER_ANSWER_ALLOW))
    assert enter_of(board, cr4(SMEP | SMAP, PGE)).resolution.action == COMMIT


def test_without_the_exit_what_is_filtered_takes_gp(board: Board) -> None:
    filters = pinning()
    filters.exit_reasons = register_filter.INVALID | register_filter.UNKNOWN
    board.design.set_filters(board, filters)
    assert enter_of(board, cr4(0, SMEP)).resolution.action == DENY
    assert not told(board)


def test_no_rule_is_a_denial(board: Board) -> None:
    filters = UserspaceFilters(cr=deny_writes(4), exit_reasons=register_filter.FILTERED)
    board.design.set_filters(board, filters)
    assert enter_of(board, cr4(0, SMEP)).resolution.action == DENY
    filters.otherwise = FILTER_ANSWER_ALLOW
    board.design.set_filters(board, filters)
    assert enter_of(board, cr4(0, SMEP)).resolution.action == COMMIT


def test_reads_of_msrs(board: Board) -> None:
    no_reads = RegisterFilter(ranges=[FilterRange(read=True, base=Msr.LSTAR, count=1, bitmap=bytes(8))])
    board.design.set_filters(board, UserspaceFilters(msr=no_reads, exit_reasons=register_filter.FILTERED))
    read = Exit(msr=MsrAccess(index=Msr.LSTAR, old_value=0x1234))
    assert enter_of(board, read).resolution.action == DENY
    rules = [FilterRule(name="seen", msr=True, index=Msr.LSTAR)]
    filters = UserspaceFilters(msr=no_reads, exit_reasons=register_filter.FILTERED, rules=rules)
    board.design.set_filters(board, filters)
    resolution = enter_of(board, read).resolution
    assert (resolution.action, resolution.value) == (COMPLETE, 0x1234)
    assert told(board)[-1].rdmsr.data == 0x1234


@pytest.mark.parametrize("keep", [False, True])
def test_a_reset_lifts_them_unless_the_owner_keeps_them(board: Board, keep: bool) -> None:
    filters = pinning()
    filters.keep_on_reset = keep
    board.design.set_filters(board, filters)
    board.design.reset()
    assert bool(board.design.filter().cr4_mask) == keep


@given(st.integers(0, ALL), st.integers(0, ALL), st.integers(0, ALL), st.integers(0, ALL))
def test_another_value_satisfies_every_rule(old: int, new: int, stays_set: int, stays_clear: int) -> None:
    rule = FilterRule(
        name="r", index=4, stays_set=stays_set & ~stays_clear, stays_clear=stays_clear, answer=FILTER_ANSWER_REPLACE
    )
    filters = UserspaceFilters(rules=[rule], exit_reasons=register_filter.FILTERED)
    reply = decide(filters, Access(False, 4, True, old, new))
    assert reply.value & old & rule.stays_set == old & rule.stays_set
    assert reply.value & ~old & rule.stays_clear == 0
    again = decide(filters, Access(False, 4, True, old, reply.value))
    assert again.answer == FILTER_ANSWER_ALLOW
