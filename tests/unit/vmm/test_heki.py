"""Heki's two hypercalls: every check of their arguments, what is enforced, and what is left open."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import designs
from vmm.board import Board
from vmm.designs import cr_pins, memory_list
from vmm.designs.cr_pins import ABI_VERSION, CR4_PINNED_MASK, HOST_CR0, HOST_CR4
from vmm.exits import serve
from vtlab.errors import BadArgument
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import Registers, Segment
from vtlab.v1.vcpu_pb2 import Enter, Exit, Hypercall, MemoryFault, RegisterWrite
from vtlab.v1.vmm_pb2 import MachineSpec
from vtlab.x86.registers import Cr0, Cr4

WP, SMEP, SMAP = int(Cr0.WP), int(Cr4.SMEP), int(Cr4.SMAP)
EINVAL, EFAULT, E2BIG, EPERM = -22, -14, -7, -1
CR0, CR4 = registers_pb2.REGISTER_NAME_CR0, registers_pb2.REGISTER_NAME_CR4
MOV_CR4 = bytes.fromhex("0f22e0")
CALL, MEMORY = 13, 14
RAM = 2 << 20


@pytest.fixture
def spec(request: pytest.FixtureRequest) -> MachineSpec:
    design, options = getattr(request, "param", ("heki-v3", {}))
    return MachineSpec(ram_size=RAM, vp_count=2, design=design, design_options=options)


def enter_of(board: Board, exit_: Exit) -> Enter:
    answer = serve(board, board.processors[0], exit_)
    assert isinstance(answer, Enter)
    return answer


def call(board: Board, number: int, *arguments: int, cpl: int = 0, long_mode: bool = True) -> int:
    """RAX afterwards, signed."""
    a0, a1, a2, a3 = (*arguments, 0, 0, 0, 0)[:4]
    registers = Registers(cr0=0x80000001, cpl=cpl, rax=number, rbx=a0, rcx=a1, rdx=a2, rsi=a3)
    if long_mode:
        registers.efer = 0x500
        registers.cs.CopyFrom(Segment(attributes=0xA09B))
    resolution = enter_of(board, Exit(hypercall=Hypercall(), registers=registers)).resolution
    assert resolution.action == vcpu_pb2.ACTION_COMPLETE
    bits = 64 if long_mode else 32
    return resolution.value - (1 << bits if resolution.value >> bits - 1 else 0)


def write(name: registers_pb2.RegisterName.ValueType, old: int, new: int, code: bytes = MOV_CR4) -> Exit:
    return Exit(register_write=RegisterWrite(name=name, old_value=old, new_value=new), instruction=code)


def told(board: Board) -> list[vmm_pb2.UserspaceExit]:
    return [event.userspace_exit for event in board.events.kept((vmm_pb2.EVENT_KIND_USERSPACE_EXIT,))]


# ------------------------------------------------------------------------------------------ the arguments of the call


@pytest.mark.parametrize(
    ("number", "pin", "flags", "value"),
    [
        (0, 0, 1, ABI_VERSION),
        (4, 0, 1, EINVAL),
        (0, WP, 1, EINVAL),
        (0, 0, 2, EINVAL),
        (0, 0, 3, EINVAL),
        (0, WP, 1 << 63, EINVAL),
        (0, 0, 0, EINVAL),
        (4, 0, 0, EINVAL),
        (3, WP, 0, EINVAL),
        (8, 1, 0, EINVAL),
        (1 << 32, WP, 0, EINVAL),
        (1 << 32 | 4, SMEP, 0, EINVAL),
        (1 << 32, 0, 1, EINVAL),
        (0, int(Cr0.PE), 0, EINVAL),  # without WP
        (0, WP | int(Cr0.EM), 0, EINVAL),  # not set in the host
        (0, WP | 1 << 40, 0, EINVAL),
        (0, WP, 0, 0),
        (0, HOST_CR0, 0, 0),
        (4, SMEP, 0, 0),
        (4, CR4_PINNED_MASK, 0, 0),
        (4, 1 << 23, 0, 0),  # CET: accepted, and masked away where the host has none
        (4, SMEP | int(Cr4.PGE), 0, EINVAL),
        (4, int(Cr4.TSD), 0, EINVAL),
        (4, 1 << 63, 0, EINVAL),
    ],
)
def test_arguments(board: Board, number: int, pin: int, flags: int, value: int) -> None:
    assert call(board, CALL, number, pin, flags) == value


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_only_what_the_host_has_is_ever_pinned(number: int, pin: int, flags: int) -> None:
    lock = cr_pins.lock_cr(number, pin, flags)
    assert lock.pin & ~(HOST_CR0 if lock.number == 0 else HOST_CR4) == 0
    assert (lock.pin == 0) or (lock.value == 0 and not flags and lock.number == number)


def test_who_may_call(board: Board) -> None:
    assert call(board, CALL, 0, WP, cpl=3) == EPERM
    assert call(board, MEMORY, 0x1000) == -1000  # of v2 alone
    assert call(board, CALL | 1 << 32, 0, WP) == -1000
    assert call(board, CALL, 1 << 32, 1 << 32 | WP, long_mode=False) == 0  # 32-bit registers


# ------------------------------------------------------------------------------------------------------- enforcement


def test_pins_are_of_the_machine_and_only_grow(board: Board) -> None:
    call(board, CALL, 4, SMEP)
    call(board, CALL, 4, SMAP)
    call(board, CALL, 0, WP)
    for processor in board.processors:
        last = [*processor._answer.updates, *processor._pending][-1].intercepts
        assert (last.cr0_pinned, last.cr4_pinned) == (WP, SMEP | SMAP)
    for old, new, denied in (
        (SMEP | SMAP, SMAP, True),
        (SMEP | SMAP, SMEP, True),
        (SMEP | SMAP, SMEP | SMAP | int(Cr4.PGE), False),
        (0, int(Cr4.PAE), True),  # the first MOV of a kernel that starts again
        (0, 0, False),
    ):
        enter = enter_of(board, write(CR4, old, new))
        assert (enter.resolution.action == vcpu_pb2.ACTION_DENY) == denied, (old, new)
        assert not enter.resolution.HasField("exception")  # #GP(0)
    assert enter_of(board, write(CR0, WP | 1, 1, bytes.fromhex("0f22c0"))).resolution.action == vcpu_pb2.ACTION_DENY


def test_pins_survive_a_reset(board: Board) -> None:
    call(board, CALL, 4, SMEP)
    board.design.reset()
    assert board.design.filter().cr4_pinned == SMEP


@pytest.mark.parametrize("code", ["0f01f0", "0f06", "0faa", ""], ids=["lmsw", "clts", "rsm", "no instruction"])
def test_what_is_no_mov_is_not_checked(board: Board, code: str) -> None:
    call(board, CALL, 0, HOST_CR0)
    exit_ = write(CR0, HOST_CR0, HOST_CR0 & ~int(Cr0.MP), bytes.fromhex(code))
    assert enter_of(board, exit_).resolution.action == vcpu_pb2.ACTION_COMMIT


@pytest.mark.parametrize("spec", [("heki-v3", {"vendor": "amd"})], indirect=True)
def test_svm_takes_pins_and_checks_nothing(board: Board) -> None:
    assert call(board, CALL, 4, SMEP) == 0
    assert board.design.filter().cr4_pinned == 0


# ----------------------------------------------------------------------------------------------- exits to userspace


@pytest.mark.parametrize("spec", [("heki-v3", {"configure": "2", "denial": "0x3"})], indirect=True)
def test_exits_to_userspace(board: Board) -> None:
    call(board, CALL, 0, 0, 1)
    call(board, CALL, 0, WP)  # not asked for
    call(board, CALL, 4, SMEP)
    call(board, CALL, 4, SMAP)
    call(board, CALL, 4, 1 << 63)  # refused
    configured = [(one.heki_configure.reason, one.heki_configure.value) for one in told(board)]
    assert configured == [(2, SMEP), (2, SMAP)]  # what was accepted each time, not the sum
    assert board.design.filter().cr4_pinned == SMEP | SMAP
    assert enter_of(board, write(CR4, SMEP | SMAP, SMAP)).resolution.action == vcpu_pb2.ACTION_DENY
    assert enter_of(board, write(CR0, WP, 0)).resolution.action == vcpu_pb2.ACTION_DENY
    denials = [(one.heki_denial.reason, one.heki_denial.value) for one in told(board)[2:]]
    assert denials == [(2, SMAP), (1, 0)]


def test_without_the_capabilities_nobody_is_told(board: Board) -> None:
    call(board, CALL, 4, SMEP)
    enter_of(board, write(CR4, SMEP, 0))
    assert told(board) == []


@pytest.mark.parametrize("value", ["4", "7", "-1", "0x100000000", "both", ""])
@pytest.mark.parametrize("option", ["configure", "denial"])
def test_masks_with_unknown_bits(option: str, value: str) -> None:
    with pytest.raises(BadArgument, match=rf"option '{option}'.*EINVAL"):
        designs.create(MachineSpec(design="heki-v3", design_options={option: value}))


def test_options() -> None:
    with pytest.raises(BadArgument, match="must be intel or amd, not 'arm'"):
        designs.create(MachineSpec(design="heki-v3", design_options={"vendor": "arm"}))
    with pytest.raises(BadArgument, match=r"option 'mbec' of design 'heki-v3'.*vendor, configure, denial"):
        designs.create(MachineSpec(design="heki-v3", design_options={"mbec": "1"}))


# -------------------------------------------------------------------------------------------------- rights of pages

V2 = pytest.mark.parametrize("spec", [("heki-v2", {})], indirect=True)
LIST = 0x10000
READ, WRITE, EXEC, IMMUTABLE = 1, 2, 4, 8


def page_list(*entries: tuple[int, int, int], following: int = 0, count: int | None = None) -> bytes:
    header = struct.pack("<3Q", 0xFFFF888000000000, following, len(entries) if count is None else count)
    return header + b"".join(struct.pack("<3Q", *entry) for entry in entries)


def protect(board: Board, *entries: tuple[int, int, int]) -> int:
    board.memory.write(LIST, page_list(*entries))
    return call(board, MEMORY, LIST)


@V2
def test_pages_get_their_rights(board: Board) -> None:
    assert protect(board, (0x2000, 0x4000, READ | EXEC), (0x5000, 0x6000, READ)) == 0
    for gpa in (0x2000, 0x3000, 0x5000):
        access = board.memory.access(gpa)
        assert (access.read, access.write, access.kernel_execute) == (True, False, True)  # no MBEC: EXEC is granted
    assert board.memory.access(0x4000).write
    assert protect(board, (0x2000, 0x3000, READ | WRITE)) == 0
    assert board.memory.access(0x2000).write


@pytest.mark.parametrize("spec", [("heki-v2", {"mbec": "1"})], indirect=True)
def test_with_mbec_exec_is_what_was_asked(board: Board) -> None:
    assert protect(board, (0x2000, 0x3000, READ)) == 0
    access = board.memory.access(0x2000)
    assert (access.kernel_execute, access.user_execute) == (False, True)


@V2
@pytest.mark.parametrize(
    "entry",
    [
        (0x2001, 0x3000, READ),
        (0x2000, 0x3001, READ),
        (0x2000, 0x3000, 0),
        (0x2000, 0x3000, 16 | READ),
        (0x2000, 0x3000, 1 << 63 | READ),
        (0x2000, 0x3000, EXEC),
        (0x3000, 0x3000, READ),
        (0x3000, 0x2000, READ),
        (0x2000, RAM + 0x1000, READ),
        (2**64 - 0x1000, 0, READ),
        (RAM, RAM + 0x1000, READ),
    ],
)
def test_bad_entries_change_nothing(board: Board, entry: tuple[int, int, int]) -> None:
    assert protect(board, (0x5000, 0x6000, READ), entry) == EINVAL
    assert board.memory.access(0x5000).write


@V2
def test_chains(board: Board) -> None:
    full = [(0x2000, 0x3000, READ)] * memory_list.MAX_ENTRIES
    assert memory_list.MAX_ENTRIES == 169
    board.memory.write(LIST, page_list(*full, following=LIST + 0x1000))
    board.memory.write(LIST + 0x1000, page_list((0x4000, 0x5000, READ)))
    assert call(board, MEMORY, LIST) == 0
    assert not board.memory.access(0x4000).write
    board.memory.write(LIST, page_list(count=170))
    assert call(board, MEMORY, LIST) == E2BIG
    board.memory.write(LIST, page_list(count=2**64 - 1))
    assert call(board, MEMORY, LIST) == E2BIG
    board.memory.write(LIST, page_list((0x6000, 0x7000, READ), following=LIST))  # a ring
    assert call(board, MEMORY, LIST) == E2BIG
    assert board.memory.access(0x6000).write
    for gpa in (RAM, RAM - 0x800, 2**64 - 8):
        assert call(board, MEMORY, gpa) == EFAULT
    board.memory.write(LIST, page_list(following=RAM))
    assert call(board, MEMORY, LIST) == EFAULT


@V2
def test_immutable_pages_stay(board: Board) -> None:
    assert protect(board, (0x2000, 0x4000, READ | IMMUTABLE)) == 0
    for start, end in ((0x2000, 0x3000), (0x3000, 0x5000), (0x1000, 0x9000)):
        assert protect(board, (start, end, READ | WRITE)) == EPERM
    assert not board.memory.access(0x2000).write
    assert board.memory.access(0x4000).write
    assert protect(board, (0x4000, 0x5000, READ)) == 0


@V2
@pytest.mark.parametrize(
    ("access", "cpl", "error"),
    [
        (vcpu_pb2.ACCESS_KIND_WRITE, 0, 3),
        (vcpu_pb2.ACCESS_KIND_WRITE, 3, 7),
        (vcpu_pb2.ACCESS_KIND_READ, 0, 1),
        (vcpu_pb2.ACCESS_KIND_EXECUTE, 0, 0x11),
    ],
)
def test_a_violation_is_a_page_fault(board: Board, access: vcpu_pb2.AccessKind.ValueType, cpl: int, error: int) -> None:
    fault = MemoryFault(gpa=0x2008, gva=0xFFFF888000002008, access=access)
    resolution = enter_of(board, Exit(memory_fault=fault, registers=Registers(cpl=cpl))).resolution
    assert resolution.action == vcpu_pb2.ACTION_DENY
    exception = resolution.exception
    assert (exception.vector, exception.error_code, exception.address) == (14, error, 0xFFFF888000002008)
    walk = enter_of(board, Exit(memory_fault=MemoryFault(gpa=0x2008, access=access, page_walk=True))).resolution
    assert walk.action == vcpu_pb2.ACTION_DENY
    assert not walk.HasField("exception")


def test_devices_of_the_host_are_not_bound() -> None:
    rights = {name: designs.create(MachineSpec(design=name)).device_rights for name in designs.NAMES}
    assert rights["heki-v2"] == 1
    assert rights["vtl"] == rights["heki-v3"] == 0
