"""The guard device: registers, ring, requests, and who may make them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.board import Board
from vmm.designs.guard_requests import DESCRIPTOR, MAX_RULES, Action, Authority, Rule, Status
from vmm.designs.mmio import BASE, LEAF, MAGIC, Error
from vmm.exits import serve
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import Registers
from vtlab.v1.vcpu_pb2 import Cpuid, Enter, Exit, MemoryFault, MsrAccess, RegisterWrite
from vtlab.v1.vmm_pb2 import MachineSpec
from vtlab.x86.registers import Cr4, Msr

RAM = 2 << 20
RING, ENTRIES = 0x10000, 4
SMEP, SMAP = int(Cr4.SMEP), int(Cr4.SMAP)
CR4 = 0x3008A0
KERNEL_RIP = 0xFFFFFFFF80100000
READ, WRITE = vcpu_pb2.ACCESS_KIND_READ, vcpu_pb2.ACCESS_KIND_WRITE
U64 = 2**64 - 1


@pytest.fixture
def spec() -> MachineSpec:
    return MachineSpec(ram_size=RAM, vp_count=2, design="mmio-device")


def enter_of(board: Board, exit_: Exit) -> Enter:
    answer = serve(board, board.processors[0], exit_)
    assert isinstance(answer, Enter)
    return answer


def read(board: Board, offset: int, size: int = 4) -> int:
    fault = MemoryFault(gpa=BASE + offset, access=READ, unmapped=True)
    resolution = enter_of(board, Exit(memory_fault=fault)).resolution
    assert resolution.action == vcpu_pb2.ACTION_COMPLETE
    return resolution.value & (1 << 8 * size) - 1


def store(board: Board, offset: int, value: int, size: int = 4, rip: int = KERNEL_RIP, cpl: int = 0) -> Error:
    """Returns why it failed, as the status register has it."""
    data = (value % (1 << 8 * size)).to_bytes(size, "little")
    fault = MemoryFault(gpa=BASE + offset, access=WRITE, unmapped=True, data=data)
    registers = Registers(rip=rip, cpl=cpl, cr0=0x80010033, cr4=CR4)
    resolution = enter_of(board, Exit(memory_fault=fault, registers=registers)).resolution
    assert resolution.action == vcpu_pb2.ACTION_COMPLETE
    return Error(read(board, 0x30) >> 8 & 0xFF)


@pytest.fixture
def ring(board: Board) -> Board:
    """The board, with the device enabled."""
    assert store(board, 0x10, RING, 8) is Error.NONE
    assert store(board, 0x18, ENTRIES) is Error.NONE
    assert store(board, 0x38, 1) is Error.NONE
    return board


def ask(board: Board, action: int, *arguments: int, rip: int = KERNEL_RIP, cpl: int = 0, reserved: int = 0) -> Status:
    """One request; its status."""
    head = read(board, 0x20)
    at = RING + head % ENTRIES * DESCRIPTOR.size
    a, b, c, d = (*arguments, 0, 0, 0, 0)[:4]
    board.memory.write(at, DESCRIPTOR.pack(action, 0, a, b, c, d, 0, reserved, 0, 0))
    assert store(board, 0x28, head + 1, rip=rip, cpl=cpl) is Error.NONE
    return Status(struct.unpack("<I", board.memory.read(at + 40, 4))[0])


# --------------------------------------------------------------------------------------------- discovery, registers


def test_it_is_found_by_cpuid(board: Board) -> None:
    def leaf(number: int) -> list[int]:
        return [update.register.value for update in enter_of(board, Exit(cpuid=Cpuid(leaf=number))).updates]

    assert leaf(0x40000000)[0] == LEAF
    low, high, size, version = leaf(LEAF)
    assert (low | high << 32, size, version) == (BASE, 4096, 1)
    assert (read(board, 0), read(board, 4), read(board, 8, 8)) == (MAGIC, 1, 0x1FE)
    assert read(board, 0x800) == 0


def test_beside_the_device_there_is_nothing(board: Board) -> None:
    for gpa in (BASE - 8, BASE + 4096):
        fault = MemoryFault(gpa=gpa, access=READ, unmapped=True)
        assert enter_of(board, Exit(memory_fault=fault)).resolution.value == U64
    fetch = MemoryFault(gpa=BASE, access=vcpu_pb2.ACCESS_KIND_EXECUTE, unmapped=True)
    assert enter_of(board, Exit(memory_fault=fetch)).resolution.action == vcpu_pb2.ACTION_DENY


@pytest.mark.parametrize(
    ("gpa", "entries"),
    [(RING, 0), (RING, 3), (RING, 512), (RING + 8, 4), (RAM, 4), (RAM - 64, 4), (U64 - 63, 4), (RING, 2**32 - 1)],
)
def test_rings_that_are_refused(board: Board, gpa: int, entries: int) -> None:
    store(board, 0x10, gpa, 8)
    store(board, 0x18, entries)
    assert store(board, 0x38, 1) is Error.BAD_RING
    assert read(board, 0x30) & 1 == 0
    assert store(board, 0x28, 1) is Error.NOT_ENABLED


def test_accesses_that_are_refused(ring: Board) -> None:
    for offset, value, size in ((0, 1, 4), (0x20, 1, 4), (0x30, 1, 4), (0x10, 0, 8), (0x18, 8, 4), (0x29, 1, 4)):
        assert store(ring, offset, value, size) is Error.BAD_ACCESS
    for size in (1, 2, 16):
        assert store(ring, 0x28, 1, size) is Error.BAD_ACCESS
    assert store(ring, 0x38, 0, cpl=3) is Error.BAD_ACCESS
    unknown = MemoryFault(gpa=BASE + 0x28, access=WRITE, unmapped=True)
    enter_of(ring, Exit(memory_fault=unknown))
    assert read(ring, 0x30) >> 8 == Error.BAD_ACCESS
    assert read(ring, 0x20) == 0


def test_tails(ring: Board) -> None:
    assert store(ring, 0x28, ENTRIES + 1) is Error.BAD_TAIL
    assert store(ring, 0x28, -1) is Error.BAD_TAIL
    assert store(ring, 0x28, ENTRIES) is Error.NONE
    assert read(ring, 0x20) == ENTRIES
    for index in range(ENTRIES):
        assert ring.memory.read(RING + 64 * index + 40, 4) == struct.pack("<I", Status.UNKNOWN_ACTION)


def test_the_ring_goes_round(ring: Board) -> None:
    for number in range(3 * ENTRIES):
        assert ask(ring, Action.PIN, 4, 1 << number) is Status.OK
    assert ring.design.filter().cr4_mask == (1 << 3 * ENTRIES) - 1


def test_a_ring_that_became_unwritable_is_not_served(ring: Board) -> None:
    """By its own request: that one is done, its status has nowhere to go, and no further one is read."""
    ring.memory.write(RING, DESCRIPTOR.pack(Action.PROTECT, 0, RING, 0x1000, 1, 0, 0, 0, 0, 0))
    assert store(ring, 0x28, 1) is Error.BAD_RING
    assert store(ring, 0x28, 2) is Error.BAD_RING
    assert read(ring, 0x20) == 1
    assert ring.memory.read(RING + 40, 4) == bytes(4)


# --------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("action", "arguments", "status"),
    [
        (0, (), Status.UNKNOWN_ACTION),
        (9, (), Status.UNKNOWN_ACTION),
        (0xFFFFFFFF, (), Status.UNKNOWN_ACTION),
        (Action.PIN, (4, SMEP), Status.OK),
        (Action.PIN, (4, 0), Status.BAD_ARGUMENT),
        (Action.PIN, (3, 1), Status.BAD_ARGUMENT),
        (Action.PIN, (4, 1, 1), Status.BAD_ARGUMENT),
        (Action.PIN_MSR, (Msr.LSTAR,), Status.OK),
        (Action.PIN_MSR, (1 << 32,), Status.BAD_ARGUMENT),
        (Action.PROTECT, (0x2000, 0x1000, 5), Status.OK),
        (Action.PROTECT, (0x2001, 0x1000, 5), Status.BAD_ARGUMENT),
        (Action.PROTECT, (0x2000, 0x1001, 5), Status.BAD_ARGUMENT),
        (Action.PROTECT, (0x2000, 0, 5), Status.BAD_ARGUMENT),
        (Action.PROTECT, (0x2000, 0x1000, 4), Status.BAD_ARGUMENT),
        (Action.PROTECT, (0x2000, 0x1000, 9), Status.BAD_ARGUMENT),
        (Action.PROTECT, (RAM, 0x1000, 1), Status.BAD_ARGUMENT),
        (Action.PROTECT, (RAM - 0x1000, 0x2000, 1), Status.BAD_ARGUMENT),
        (Action.PROTECT, (0x2000, U64 - 0xFFF, 1), Status.BAD_ARGUMENT),
        (Action.PROTECT, (U64 - 0xFFF, 0x2000, 1), Status.BAD_ARGUMENT),
        (Action.WRITE_REGISTER, (4, CR4 & ~SMEP), Status.OK),
        (Action.WRITE_REGISTER, (4, 0), Status.BAD_ARGUMENT),
        (Action.WRITE_REGISTER, (0, 0x80010033 ^ 1), Status.BAD_ARGUMENT),
        (Action.WRITE_REGISTER, (3, CR4), Status.BAD_ARGUMENT),
        (Action.STAND_DOWN, (1,), Status.OK),
        (Action.STAND_DOWN, (0,), Status.BAD_ARGUMENT),
        (Action.STAND_DOWN, (3,), Status.BAD_ARGUMENT),
        (Action.STAND_DOWN, (1, 0, 0, 1), Status.BAD_ARGUMENT),
        (Action.DELEGATE, (Action.PIN, 1, 2, 3), Status.OK),
        (Action.DELEGATE, (Action.PIN, 2, 1, 3), Status.BAD_ARGUMENT),
        (Action.DELEGATE, (Action.PIN, 1, 2, 0), Status.BAD_ARGUMENT),
        (Action.DELEGATE, (Action.PIN, 1, 2, 4), Status.BAD_ARGUMENT),
        (Action.DELEGATE, (Action.DELEGATE, 1, 2, 3), Status.BAD_ARGUMENT),
        (Action.DELEGATE, (0, 1, 2, 3), Status.BAD_ARGUMENT),
        (Action.RESTRICT, (0, 1, 2), Status.OK),
        (Action.RESTRICT, (99, 1, 2), Status.BAD_ARGUMENT),
        (Action.RESTRICT, (Action.PIN, 2, 1), Status.BAD_ARGUMENT),
        (Action.RESTRICT, (Action.PIN, 1, 2, 3), Status.BAD_ARGUMENT),
        (Action.LOCK, (), Status.OK),
        (Action.LOCK, (1,), Status.BAD_ARGUMENT),
    ],
)
def test_statuses(ring: Board, action: int, arguments: tuple[int, ...], status: Status) -> None:
    assert ask(ring, action, *arguments) is status
    refused = [event.device.refused for event in ring.events.kept((vmm_pb2.EVENT_KIND_DEVICE,))]
    assert refused == [status is not Status.OK]


def test_reserved_fields(ring: Board) -> None:
    assert ask(ring, Action.PIN, 4, SMEP, reserved=1) is Status.RESERVED_SET
    assert not ring.design.filter().cr4_mask


def test_pins_hold_on_every_vcpu_until_a_stand_down(ring: Board) -> None:
    assert ask(ring, Action.PIN, 4, SMEP) is Status.OK
    assert ask(ring, Action.PIN_MSR, Msr.LSTAR) is Status.OK
    assert ask(ring, Action.PROTECT, 0x2000, 0x1000, 1) is Status.OK
    assert ring.processors[1].watched.filter.cr4_mask == SMEP
    assert any(update.HasField("protection") for update in ring.processors[1]._pending)
    name = registers_pb2.REGISTER_NAME_CR4
    for new, action in ((CR4 & ~SMEP, vcpu_pb2.ACTION_DENY), (CR4 & ~SMAP, vcpu_pb2.ACTION_COMMIT)):
        write = Exit(register_write=RegisterWrite(name=name, old_value=CR4, new_value=new))
        assert enter_of(ring, write).resolution.action == action
    msr = Exit(msr=MsrAccess(index=Msr.LSTAR, write=True, new_value=1))
    assert enter_of(ring, msr).resolution.action == vcpu_pb2.ACTION_DENY
    fault = Exit(memory_fault=MemoryFault(gpa=0x2000, access=WRITE))
    assert enter_of(ring, fault).resolution.action == vcpu_pb2.ACTION_DENY
    assert ask(ring, Action.STAND_DOWN, 1) is Status.OK
    assert not ring.processors[1].watched.filter.cr4_mask
    assert ring.memory.access(0x2000).write


def test_a_reset_resets_it(ring: Board) -> None:
    ask(ring, Action.PIN, 4, SMEP)
    ask(ring, Action.LOCK)
    assert read(ring, 0x30) == 3
    ring.design.reset()
    assert read(ring, 0x30) == 0
    assert not ring.design.filter().cr4_mask


# ----------------------------------------------------------------------------------------- delegation, restriction


def test_restriction_is_by_rip(ring: Board) -> None:
    assert ask(ring, Action.RESTRICT, Action.STAND_DOWN, 0x1000, 0x1FFF) is Status.OK
    for rip, status in ((0x1000, Status.DENIED), (0x1FFF, Status.DENIED), (0xFFF, Status.OK), (0x2000, Status.OK)):
        ask(ring, Action.RESTRICT, Action.STAND_DOWN, 0x1000, 0x1FFF)  # each stand-down forgets it
        assert ask(ring, Action.STAND_DOWN, 1, rip=rip) is status
    assert ask(ring, Action.PIN, 4, SMEP, rip=0x1000) is Status.OK


def test_delegation_is_by_rip_cpl_and_action(ring: Board) -> None:
    assert ask(ring, Action.PIN, 4, SMEP, rip=0x400000, cpl=3) is Status.DENIED
    assert ask(ring, Action.DELEGATE, Action.PIN, 0x400000, 0x400FFF, 3) is Status.OK
    assert ask(ring, Action.PIN, 4, SMEP, rip=0x400000, cpl=3) is Status.OK
    assert ask(ring, Action.PIN, 4, SMEP, rip=0x401000, cpl=3) is Status.DENIED
    for action, arguments in ((Action.STAND_DOWN, (1,)), (Action.LOCK, ()), (Action.DELEGATE, (1, 0, 1, 3))):
        assert ask(ring, action, *arguments, rip=0x400000, cpl=3) is Status.DENIED


def test_both_are_settable_until_locked(ring: Board) -> None:
    assert ask(ring, Action.LOCK) is Status.OK
    assert ask(ring, Action.DELEGATE, Action.PIN, 1, 2, 3) is Status.LOCKED
    assert ask(ring, Action.RESTRICT, Action.PIN, 1, 2) is Status.LOCKED
    assert ask(ring, Action.LOCK) is Status.LOCKED
    assert store(ring, 0x38, 0) is Error.BAD_ACCESS
    assert ask(ring, Action.PIN, 4, SMEP) is Status.OK


def test_rules_are_bounded() -> None:
    authority = Authority()
    for _ in range(MAX_RULES):
        assert authority.restrict((0, 1, 1, 0)) is Status.OK
    assert authority.restrict((0, 1, 1, 0)) is Status.TOO_MANY


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 99), st.integers(0, 99)), max_size=5),
    st.sampled_from(list(Action)),
    st.integers(0, 99),
    st.integers(0, 3),
)
def test_nobody_above_cpl0_may_without_a_delegation(
    rules: list[tuple[int, int, int]], action: Action, rip: int, cpl: int
) -> None:
    ranges = [Rule(one, first, last, 3) for one, first, last in rules]
    assert not Authority(restrictions=ranges).permits(action, rip, max(cpl, 1))
    restricted = any(one in (0, action) and first <= rip <= last for one, first, last in rules)
    assert Authority(restrictions=ranges).permits(action, rip, 0) == (not restricted)
    assert Authority(delegations=ranges).permits(action, rip, 3) == restricted
