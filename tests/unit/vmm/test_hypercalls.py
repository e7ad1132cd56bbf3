"""The hypercall ABI and the first hypercalls, by the statuses of the facts (profile openvmm)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.vmm.fakes import FakeLevel, returns
from vmm.board import Board
from vmm.hypercalls import HYPERCALLS
from vmm.hypercalls.protection import runs_of
from vmm.hypercalls.rules import legal_map_flags
from vmm.vtl import VTL1
from vtlab.hyperv.convention import Request
from vtlab.hyperv.hypercalls import (
    PARTITION_SELF,
    VP_SELF,
    HypercallCode,
    InputValue,
    decode_input_value,
    encode_input_value,
)
from vtlab.hyperv.layouts import (
    EnablePartitionVtlInput,
    ModifyProtectionHeader,
    RegisterAssociation,
    VpHeader,
    decode_initial_vp_context,
    encode_initial_vp_context,
)
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.registers import HvRegister
from vtlab.hyperv.status import HvStatus as S
from vtlab.hyperv.vsm import VTL_CALL_OFFSET, VTL_RETURN_OFFSET
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.registers_pb2 import MsrValue, RegisterName, RegisterValue
from vtlab.v1.vcpu_pb2 import Exit, Hypercall, PageAccess, ProtectionUpdate, Update

INPUT, OUTPUT = 0x10000, 0x20000
C = HypercallCode


def call(
    board: Board, value: int, data: bytes = b"", gpa: int = INPUT, output: int = OUTPUT, vtl: int = 0
) -> tuple[S, int]:
    """Status and reps completed of a slow call."""
    if data:
        board.memory.write(gpa, data, vtl=1)
    request = Request(value, gpa, output, 0, True)
    result = HYPERCALLS.serve(board, board.processors[0], vtl, Exit(hypercall=Hypercall()), request)
    assert result is not None, "the caller was told to make the call again"
    assert result & ~(0xFFFF | 0xFFF << 32) == 0
    status = S(result & 0xFFFF)
    declared = HYPERCALLS.statuses(board.profile.name)
    assert status == S.INVALID_HYPERCALL_CODE or (value & 0xFFFF, status) in declared
    return status, result >> 32


def simple(code: HypercallCode) -> int:
    return encode_input_value(code)


def rep(code: HypercallCode, count: int, start: int = 0) -> int:
    return encode_input_value(code, rep_count=count, rep_start=start)


ENABLE_PARTITION = EnablePartitionVtlInput(PARTITION_SELF, 1, 0)
CONTEXT = bytes(224)
ENABLE_VP = VpHeader(PARTITION_SELF, VP_SELF, 1).encode() + CONTEXT


@pytest.fixture
def enabled(board: Board) -> Board:
    """VTL1 enabled on partition and VP."""
    assert call(board, simple(C.ENABLE_PARTITION_VTL), ENABLE_PARTITION.encode()) == (S.SUCCESS, 0)
    assert call(board, simple(C.ENABLE_VP_VTL), ENABLE_VP) == (S.SUCCESS, 0)
    return board


# --------------------------------------------------------------------------------------------------------------- ABI


@given(st.integers(0, 2**64 - 1))
def test_input_value_round_trip(value: int) -> None:
    found = decode_input_value(value)
    again = encode_input_value(
        found.code,
        fast=found.fast,
        variable_header=found.variable_header,
        rep_count=found.rep_count,
        rep_start=found.rep_start,
    )
    assert again | found.nested << 31 | found.reserved == value


def test_input_value_fields() -> None:
    assert decode_input_value(0x0002_0005_0001_0050) == InputValue(0x50, True, 0, False, 5, 2, 0)


@pytest.mark.parametrize(
    ("value", "gpa", "output", "status"),
    [
        (0x7FFF, INPUT, OUTPUT, S.INVALID_HYPERCALL_CODE),
        (simple(C.ENABLE_PARTITION_VTL) | 1 << 32, INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (simple(C.ENABLE_PARTITION_VTL) | 1 << 48, INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (simple(C.ENABLE_PARTITION_VTL) | 1 << 17, INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (simple(C.ENABLE_VP_VTL) | 1 << 16, INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (rep(C.GET_VP_REGISTERS, 0), INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (rep(C.GET_VP_REGISTERS, 1, 1), INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (rep(C.GET_VP_REGISTERS, 1) | 1 << 16, INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (rep(C.MODIFY_VTL_PROTECTION_MASK, 1) | 1 << 16, INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (rep(C.MODIFY_VTL_PROTECTION_MASK, 511), INPUT, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (simple(C.ENABLE_VP_VTL), INPUT + 0xFF8, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (simple(C.ENABLE_VP_VTL), INPUT + 4, OUTPUT, S.INVALID_ALIGNMENT),
        (simple(C.ENABLE_VP_VTL), 1 << 40, OUTPUT, S.INVALID_HYPERCALL_INPUT),
        (rep(C.GET_VP_REGISTERS, 1), INPUT, OUTPUT + 0xFF8, S.INVALID_HYPERCALL_INPUT),
        (rep(C.GET_VP_REGISTERS, 1), INPUT, OUTPUT + 4, S.INVALID_ALIGNMENT),
        (rep(C.GET_VP_REGISTERS, 1), INPUT, 1 << 40, S.INVALID_HYPERCALL_INPUT),
    ],
)
def test_checks_before_the_call(board: Board, value: int, gpa: int, output: int, status: S) -> None:
    assert call(board, value, gpa=gpa, output=output)[0] == status
    assert board.vtl.enabled == 1


def test_fast_input_is_in_registers(board: Board) -> None:
    low, high = struct.unpack("<QQ", ENABLE_PARTITION.encode())
    request = Request(simple(C.ENABLE_PARTITION_VTL) | 1 << 16, low, high, 0, True)
    assert HYPERCALLS.serve(board, board.processors[0], 0, Exit(), request) == S.SUCCESS
    assert board.vtl.has(VTL1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.builds(
        lambda code, rest: code | rest << 16, st.sampled_from([*map(int, C), 0, 0xFFFF]), st.integers(0, 2**48 - 1)
    ),
    gpa=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 0x200).map(lambda page: page * 0xFF8)),
    output=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 0x200).map(lambda page: page * 0xFF8)),
    data=st.binary(max_size=240),
)
def test_hostile_input_gives_a_known_status(board: Board, value: int, gpa: int, output: int, data: bytes) -> None:
    secret = ProtectionUpdate(runs=[7, 1], access=PageAccess(), store=vcpu_pb2.PAGE_STORE_PRIVATE)
    board.memory.apply(secret)
    if data and gpa + len(data) <= board.memory.size:
        board.memory.write(gpa, data, vtl=1)
    before = board.memory.read(0x7000, PAGE_SIZE, vtl=1)
    status, _ = call(board, value, gpa=gpa, output=output)
    assert status in S
    assert board.memory.read(0x7000, PAGE_SIZE, vtl=1) == before


# ------------------------------------------------------------------------------------------------ EnablePartitionVtl


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (EnablePartitionVtlInput(1, 1, 0), S.INVALID_PARTITION_ID),
        (EnablePartitionVtlInput(PARTITION_SELF, 0, 0), S.ACCESS_DENIED),
        (EnablePartitionVtlInput(PARTITION_SELF, 2, 0), S.ACCESS_DENIED),
        (EnablePartitionVtlInput(PARTITION_SELF, 1, 2), S.INVALID_PARAMETER),
        (EnablePartitionVtlInput(PARTITION_SELF, 1, 4), S.INVALID_PARAMETER),
        (EnablePartitionVtlInput(PARTITION_SELF, 1, 0x80), S.INVALID_PARAMETER),
    ],
)
def test_enable_partition_vtl_refusals(board: Board, request_: EnablePartitionVtlInput, status: S) -> None:
    assert call(board, simple(C.ENABLE_PARTITION_VTL), request_.encode()) == (status, 0)
    assert not board.vtl.has(VTL1)


def test_enable_partition_vtl(board: Board) -> None:
    with_mbec = EnablePartitionVtlInput(PARTITION_SELF, 1, 1).encode()
    assert call(board, simple(C.ENABLE_PARTITION_VTL), with_mbec) == (S.SUCCESS, 0)
    assert board.vtl.has_mbec
    assert call(board, simple(C.ENABLE_PARTITION_VTL), with_mbec) == (S.INVALID_VTL_STATE, 0)
    assert board.processors[0].vtl.active == 0


def test_vsm_not_offered(board: Board) -> None:
    board.vtl.offered = False
    assert call(board, simple(C.ENABLE_PARTITION_VTL), ENABLE_PARTITION.encode())[0] == S.ACCESS_DENIED


# ------------------------------------------------------------------------------------------------------- EnableVpVtl


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (VpHeader(5, VP_SELF, 1), S.INVALID_PARTITION_ID),
        (VpHeader(PARTITION_SELF, 1, 1), S.INVALID_VP_INDEX),
        (VpHeader(PARTITION_SELF, 0xFFFFFFFF, 1), S.INVALID_VP_INDEX),
        (VpHeader(PARTITION_SELF, VP_SELF, 0), S.INVALID_PARAMETER),
        (VpHeader(PARTITION_SELF, VP_SELF, 2), S.INVALID_PARAMETER),
    ],
)
def test_enable_vp_vtl_refusals(board: Board, monitor: FakeLevel, header: VpHeader, status: S) -> None:
    call(board, simple(C.ENABLE_PARTITION_VTL), ENABLE_PARTITION.encode())
    assert call(board, simple(C.ENABLE_VP_VTL), header.encode() + CONTEXT) == (status, 0)
    assert not monitor.entered


def test_enable_vp_vtl_needs_the_partition(board: Board) -> None:
    assert call(board, simple(C.ENABLE_VP_VTL), ENABLE_VP)[0] == S.INVALID_VTL_STATE


def test_enable_vp_vtl_enters_vtl1_with_its_context(board: Board, monitor: FakeLevel) -> None:
    call(board, simple(C.ENABLE_PARTITION_VTL), ENABLE_PARTITION.encode())
    context = bytearray(CONTEXT)
    struct.pack_into("<Q", context, 0, 0xABC000)
    assert call(board, simple(C.ENABLE_VP_VTL), ENABLE_VP[:16] + context) == (S.SUCCESS, 0)
    (enter,) = monitor.entered
    assert enter.reason == vcpu_pb2.ENTER_REASON_ENABLE
    assert enter.updates[0].register.name == RegisterName.REGISTER_NAME_RIP
    assert enter.updates[0].register.value == 0xABC000
    assert board.processors[0].vtl.has(VTL1)
    assert call(board, simple(C.ENABLE_VP_VTL), ENABLE_VP)[0] == S.ACCESS_DENIED  # VTL1 is there: its right alone


def test_vtl1_may_refuse_to_start(board: Board, monitor: FakeLevel) -> None:
    call(board, simple(C.ENABLE_PARTITION_VTL), ENABLE_PARTITION.encode())
    monitor.say(returns(action=vcpu_pb2.ACTION_DENY))
    assert call(board, simple(C.ENABLE_VP_VTL), ENABLE_VP)[0] == S.ACCESS_DENIED
    assert not board.processors[0].vtl.has(VTL1)


# ------------------------------------------------------------------------------------------- ModifyVtlProtectionMask


def protect(board: Board, pages: list[int], flags: int = 15, input_vtl: int = 0, vtl: int = 0) -> tuple[S, int]:
    header = ModifyProtectionHeader(PARTITION_SELF, flags, input_vtl).encode()
    data = header + struct.pack(f"<{len(pages)}Q", *pages)
    return call(board, rep(C.MODIFY_VTL_PROTECTION_MASK, len(pages)), data, vtl=vtl)


@pytest.mark.parametrize("input_vtl", [0x00, 0x10, 0x11, 0x01, 0xF1])
def test_vtl0_cannot_relax_protection(enabled: Board, input_vtl: int) -> None:
    seal = ProtectionUpdate(runs=[5, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    enabled.protect([seal])
    status, reps = protect(enabled, [5], input_vtl=input_vtl)
    explicit_vtl1 = input_vtl == 0x11
    assert status == (S.ACCESS_DENIED if explicit_vtl1 else S.INVALID_PARAMETER)
    assert reps == 0
    assert not enabled.memory.access(0x5000).write


def vtl1_with_protection(board: Board) -> Board:
    board.vtl.config |= 1
    return board


def test_vtl1_protects_and_relaxes(enabled: Board) -> None:
    board = vtl1_with_protection(enabled)
    board.memory.write(0x5000, b"kept")
    assert protect(board, [5, 6, 9], flags=1, vtl=1) == (S.SUCCESS, 3)
    assert board.memory.access(0x6000) == PageAccess(read=True)
    assert protect(board, [5], flags=0, vtl=1) == (S.SUCCESS, 1)
    assert not board.memory.access(0x5000).read
    assert protect(board, [5], flags=15, vtl=1) == (S.SUCCESS, 1)
    assert board.memory.read(0x5000, 4) == b"kept"


def test_pages_beyond_ram_stop_the_rep(enabled: Board) -> None:
    board = vtl1_with_protection(enabled)
    assert protect(board, [5, 6, 1 << 40, 7], flags=1, vtl=1) == (S.INVALID_PARAMETER, 2)
    assert not board.memory.access(0x6000).write
    assert board.memory.access(0x7000).write


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"flags": 2}, S.INVALID_REGISTER_VALUE),
        ({"flags": 1 | 4}, S.INVALID_REGISTER_VALUE),
        ({"flags": 1 | 8}, S.INVALID_REGISTER_VALUE),
        ({"flags": 1 | 16}, S.INVALID_REGISTER_VALUE),
        ({"flags": 1 | 1 << 9}, S.INVALID_REGISTER_VALUE),
        ({"flags": 1 | 1 << 31}, S.INVALID_REGISTER_VALUE),
        ({"input_vtl": 0x12}, S.ACCESS_DENIED),
        ({"input_vtl": 0x10}, S.INVALID_PARAMETER),
        ({"input_vtl": 0x31}, S.INVALID_PARAMETER),
    ],
)
def test_modify_refusals_for_vtl1(enabled: Board, change: dict[str, int], status: S) -> None:
    assert protect(vtl1_with_protection(enabled), [5], vtl=1, **change) == (status, 0)


def test_own_protection_needs_to_be_enabled(enabled: Board) -> None:
    assert protect(enabled, [5], flags=1, vtl=1) == (S.ACCESS_DENIED, 0)


def test_protection_before_vtl1(board: Board) -> None:
    assert protect(board, [5], vtl=1) == (S.INVALID_VTL_STATE, 0)


@given(st.integers(0, 0xFFFF), st.booleans())
def test_legal_flags_never_give_write_or_execute_without_read(flags: int, mbec: bool) -> None:
    if legal_map_flags(flags, mbec=mbec):
        assert flags & 1 or not flags
        assert flags < 16


@given(st.lists(st.integers(0, 60), min_size=1))
def test_runs_cover_exactly_the_pages(pages: list[int]) -> None:
    runs = runs_of(pages)
    assert [
        page for first, count in zip(runs[::2], runs[1::2], strict=True) for page in range(first, first + count)
    ] == pages


# -------------------------------------------------------------------------------------------------- Get/SetVpRegisters


def get(
    board: Board, *names: int, partition: int = PARTITION_SELF, vp: int = VP_SELF, vtl: int = 0, start: int = 0
) -> tuple[S, int]:
    data = VpHeader(partition, vp, vtl).encode() + struct.pack(f"<{len(names)}I", *names)
    return call(board, rep(C.GET_VP_REGISTERS, len(names), start), data)


def results(board: Board, count: int) -> list[int]:
    data = board.memory.read(OUTPUT, 16 * count)
    return [int.from_bytes(data[at : at + 16], "little") for at in range(0, len(data), 16)]


def test_get_vsm_registers(enabled: Board) -> None:
    names = (HvRegister.VSM_CODE_PAGE_OFFSETS, HvRegister.VSM_VP_STATUS, HvRegister.VSM_PARTITION_STATUS)
    assert get(enabled, *names) == (S.SUCCESS, 3)
    assert results(enabled, 3) == [VTL_CALL_OFFSET | VTL_RETURN_OFFSET << 12, 0b11 << 16, 0b11 | 1 << 16]


def test_rep_start_skips_what_is_done(enabled: Board) -> None:
    enabled.memory.write(OUTPUT, b"\xff" * 16)
    assert get(enabled, 0xDEAD, HvRegister.VSM_VP_STATUS, start=1) == (S.SUCCESS, 2)
    assert results(enabled, 2) == [2**128 - 1, 0b11 << 16]


def test_get_stops_at_the_first_refusal(enabled: Board) -> None:
    assert get(enabled, HvRegister.VSM_VP_STATUS, 0xDEAD, HvRegister.VSM_VP_STATUS) == (S.INVALID_PARAMETER, 1)
    assert results(enabled, 2) == [0b11 << 16, 0]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"partition": 3}, S.ACCESS_DENIED),
        ({"vp": 1}, S.ACCESS_DENIED),
        ({"vtl": 0x11}, S.ACCESS_DENIED),
        ({"vtl": 0x30}, S.INVALID_PARAMETER),
    ],
)
def test_get_refusals(enabled: Board, change: dict[str, int], status: S) -> None:
    assert get(enabled, HvRegister.VSM_VP_STATUS, **change) == (status, 0)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        (RegisterName.REGISTER_NAME_CR0, S.ACCESS_DENIED),
        (0x00080009, S.ACCESS_DENIED),
        (HvRegister.VSM_PARTITION_CONFIG, S.INVALID_PARAMETER),
        (HvRegister.VSM_VP_SECURE_CONFIG_VTL0, S.ACCESS_DENIED),
        (0xDEAD, S.INVALID_PARAMETER),
    ],
)
def test_registers_that_vtl0_does_not_get(enabled: Board, name: int, status: S) -> None:
    assert get(enabled, name) == (status, 0)


def set_register(board: Board, name: int, value: int, vtl: int = 0, vp: int = VP_SELF) -> tuple[S, int]:
    data = VpHeader(PARTITION_SELF, vp, vtl).encode() + RegisterAssociation(name, value).encode()
    return call(board, rep(C.SET_VP_REGISTERS, 1), data, vtl=int(vtl == 0x11))


def test_set_assist_page(enabled: Board) -> None:
    assert set_register(enabled, HvRegister.VP_ASSIST_PAGE, 0x9001) == (S.SUCCESS, 1)
    assert enabled.processors[0]._pending[-1].msr == MsrValue(index=HvMsr.VP_ASSIST_PAGE, value=0x9001)
    assert set_register(enabled, HvRegister.VSM_VP_STATUS, 0) == (S.INVALID_PARAMETER, 0)
    assert set_register(enabled, HvRegister.VP_ASSIST_PAGE, 1, vp=1) == (S.INVALID_VP_INDEX, 0)


@pytest.mark.parametrize(
    ("values", "statuses"),
    [
        ((0b11111,), (S.SUCCESS,)),
        ((0b11111, 0b11110), (S.SUCCESS, S.INVALID_REGISTER_VALUE)),
        ((0b11111, 0b00111), (S.SUCCESS, S.INVALID_REGISTER_VALUE)),
        ((0b11111, 0b111111), (S.SUCCESS, S.SUCCESS)),
        ((1 << 7 | 0b11111,), (S.INVALID_REGISTER_VALUE,)),
        ((0b11001,), (S.INVALID_REGISTER_VALUE,)),
    ],
)
def test_partition_config(enabled: Board, values: tuple[int, ...], statuses: tuple[S, ...]) -> None:
    assert tuple(set_register(enabled, HvRegister.VSM_PARTITION_CONFIG, v, 0x11)[0] for v in values) == statuses


def test_private_page_as_output_buffer_is_refused(enabled: Board) -> None:
    """The attack: have the hypervisor write into VTL1's memory, or read it as input."""
    hide = ProtectionUpdate(runs=[OUTPUT >> 12, 1], access=PageAccess(), store=vcpu_pb2.PAGE_STORE_PRIVATE)
    enabled.protect([hide])
    before = enabled.memory.read(OUTPUT, PAGE_SIZE, vtl=1)
    assert get(enabled, HvRegister.VSM_VP_STATUS) == (S.INVALID_HYPERCALL_INPUT, 0)
    assert enabled.memory.read(OUTPUT, PAGE_SIZE, vtl=1) == before
    assert call(enabled, rep(C.GET_VP_REGISTERS, 1), gpa=OUTPUT, output=INPUT)[0] == S.INVALID_HYPERCALL_INPUT


def test_sealed_page_as_output_buffer_is_refused(enabled: Board) -> None:
    seal = ProtectionUpdate(runs=[OUTPUT >> 12, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    enabled.protect([seal])
    assert get(enabled, HvRegister.VSM_VP_STATUS)[0] == S.INVALID_HYPERCALL_INPUT
    assert results(enabled, 1) == [0]


# ---------------------------------------------------------------------------------------------------------- layouts


@given(st.binary(min_size=224, max_size=224))
def test_initial_context_round_trip(data: bytes) -> None:
    registers, pat = decode_initial_vp_context(data)
    again = bytearray(encode_initial_vp_context(registers, pat))
    for offset in (152, 168):  # padding before a table register
        again[offset : offset + 6] = data[offset : offset + 6]
    assert bytes(again) == data


def test_initial_context_offsets() -> None:
    """Against the format string of the facts, packed independently."""
    values = iter(range(1, 100))
    context = struct.pack("<3Q" + "QIHH" * 8 + "6xHQ" * 2 + "5Q", *[next(values) for _ in range(3 + 4 * 8 + 2 * 2 + 5)])
    registers, pat = decode_initial_vp_context(context)
    found = {RegisterName.Name(item.name): item for item in registers}
    assert found["REGISTER_NAME_RFLAGS"].value == 3
    assert found["REGISTER_NAME_CS"].segment.base == 4
    assert found["REGISTER_NAME_LDTR"].segment.attributes == 35
    assert found["REGISTER_NAME_IDTR"].table.limit == 36
    assert found["REGISTER_NAME_GDTR"].table.base == 39
    assert found["REGISTER_NAME_EFER"].value == 40
    assert found["REGISTER_NAME_CR4"].value == 43
    assert pat == 44
    with pytest.raises(ValueError, match="223"):
        decode_initial_vp_context(context[:-1])


@pytest.mark.parametrize("kind", [EnablePartitionVtlInput, VpHeader, ModifyProtectionHeader, RegisterAssociation])
def test_layouts_round_trip(kind: Callable[..., EnablePartitionVtlInput]) -> None:
    fields = len(kind.__annotations__)
    value = kind(*range(1, fields + 1))
    assert type(value).decode(value.encode()) == value


def test_a_flush_waits_for_the_lock_of_vtl1(enabled: Board) -> None:
    """The call is made again until VTL1 lets go; a level above the lock does not wait."""
    data = struct.pack("<QQQ", 0, 1, 0)
    enabled.memory.write(INPUT, data, vtl=1)
    request = Request(simple(C.FLUSH_VIRTUAL_ADDRESS_SPACE), INPUT, 0, 0, True)
    processor = enabled.processors[0]
    processor.vtl.secure_config = 2
    assert HYPERCALLS.serve(enabled, processor, 0, Exit(hypercall=Hypercall()), request) is None
    assert HYPERCALLS.serve(enabled, processor, 1, Exit(hypercall=Hypercall()), request) == S.SUCCESS
    assert processor.vtl.release_tlb_lock()
    assert HYPERCALLS.serve(enabled, processor, 0, Exit(hypercall=Hypercall()), request) == S.SUCCESS
    assert processor._pending[-1].HasField("flush_translations")


def test_fast_output_goes_to_xmm_registers(board: Board) -> None:
    """After one name (20 bytes of input, so from byte 32): XMM1."""
    value = rep(C.GET_VP_REGISTERS, 1) | 1 << 16
    low, high = struct.unpack("<QQ", VpHeader(PARTITION_SELF, VP_SELF, 0).encode())
    xmm = int(HvRegister.VSM_CODE_PAGE_OFFSETS).to_bytes(4, "little").ljust(96, b"\0")
    result = HYPERCALLS.serve(
        board, board.processors[0], 0, Exit(hypercall=Hypercall(xmm=xmm)), Request(value, low, high, 0, True)
    )
    assert result == 1 << 32
    register = board.processors[0]._pending[-1].register
    assert register.name == 0x30001
    assert int.from_bytes(register.vector, "little") == VTL_CALL_OFFSET | VTL_RETURN_OFFSET << 12


@pytest.mark.parametrize("count", [4, 5])
def test_fast_calls_end_with_xmm5(board: Board, count: int) -> None:
    value = rep(C.GET_VP_REGISTERS, count) | 1 << 16
    low, high = struct.unpack("<QQ", VpHeader(PARTITION_SELF, VP_SELF, 0).encode())
    names = int(HvRegister.VSM_VP_STATUS).to_bytes(4, "little") * count
    exit_ = Exit(hypercall=Hypercall(xmm=names.ljust(96, b"\0")))
    result = HYPERCALLS.serve(board, board.processors[0], 0, exit_, Request(value, low, high, 0, True))
    assert result == (4 << 32 if count == 4 else S.INVALID_HYPERCALL_INPUT)


def test_what_a_level_repeats_for_another_one_waits_once(enabled: Board) -> None:
    """Flushes, interrupts and registers that nobody takes meanwhile do not pile up."""
    processor = enabled.processors[0]
    flush = struct.pack("<QQQ", 0, 1, 0)
    interrupt = struct.pack("<IBBHQ", 0x40, 0, 0, 0, 1)
    for _ in range(50):
        assert call(enabled, simple(C.FLUSH_VIRTUAL_ADDRESS_SPACE), flush) == (S.SUCCESS, 0)
        assert call(enabled, simple(C.SEND_SYNTHETIC_CLUSTER_IPI), interrupt) == (S.SUCCESS, 0)
    kinds = [update.WhichOneof("change") for update in processor.waiting_for(0)]
    assert (kinds.count("flush_translations"), kinds.count("apic_interrupt")) == (1, 1)


def test_the_last_value_of_a_register_is_the_one_that_waits(enabled: Board) -> None:
    processor = enabled.processors[0]
    names = (registers_pb2.REGISTER_NAME_RAX, registers_pb2.REGISTER_NAME_RCX)
    registers = [Update(register=RegisterValue(name=name, value=value)) for value in (1, 2) for name in names]
    for update in registers:
        processor.post_latest(update)
    assert processor.waiting_for(0)[-2:] == registers[2:]
    before = processor.waiting
    event = Update(event=vcpu_pb2.PendingEvent(nmi=True))
    processor.post(event)
    processor.post_latest(registers[0])
    assert processor.waiting == before + 2, "an event in between sees the value that was before it"
