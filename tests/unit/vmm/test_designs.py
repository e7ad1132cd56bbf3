"""Which designs there are, and what a plain KVM machine answers."""

from __future__ import annotations

import pytest

from tests.unit.vmm.fakes import FakeLevel
from vmm import designs
from vmm.board import Board
from vmm.designs import kvm_abi
from vmm.exits import serve
from vmm.machines import check_spec
from vtlab.errors import BadArgument
from vtlab.v1 import vcpu_pb2
from vtlab.v1.registers_pb2 import RegisterName, Registers, Segment
from vtlab.v1.vcpu_pb2 import Cpuid, Enter, Exit, Hypercall, RegisterWrite
from vtlab.v1.vmm_pb2 import MachineSpec

LONG_MODE = {"efer": 0x500, "cr0": 0x80000001, "cs": Segment(attributes=0xA09B)}
ENOSYS, EPERM = 1000, 1


def enter_of(board: Board, exit_: Exit) -> Enter:
    answer = serve(board, board.processors[0], exit_)
    assert isinstance(answer, Enter)
    return answer


def call(board: Board, *, number: int, cpl: int = 0, long_mode: bool = True) -> int:
    registers = Registers(**(LONG_MODE if long_mode else {"cr0": 1}), rax=number, cpl=cpl)
    resolution = enter_of(board, Exit(hypercall=Hypercall(), registers=registers)).resolution
    assert resolution.action == vcpu_pb2.ACTION_COMPLETE
    return resolution.value


@pytest.fixture
def spec() -> MachineSpec:
    return MachineSpec(ram_size=2 << 20, vp_count=1, design="none")


def test_names_and_options_are_checked() -> None:
    good = MachineSpec(ram_size=2 << 20, vp_count=1)
    check_spec("vm", good)
    for name in designs.NAMES:
        check_spec("vm", MachineSpec(ram_size=2 << 20, vp_count=1, design=name))
    with pytest.raises(BadArgument, match=r"spec\.design.*must be .*vtl"):
        check_spec("vm", MachineSpec(ram_size=2 << 20, vp_count=1, design="heki-v9"))
    with pytest.raises(BadArgument, match=r"spec\.vtl1.*must be false"):
        check_spec("vm", MachineSpec(ram_size=2 << 20, vp_count=1, design="none", vtl1=True))
    with pytest.raises(BadArgument, match=r"option 'vendor' of design 'none'.*there are: none"):
        check_spec("vm", MachineSpec(ram_size=2 << 20, vp_count=1, design="none", design_options={"vendor": "amd"}))


def test_a_plain_machine_has_no_hypercall_and_looks_like_kvm(board: Board, monitor: FakeLevel) -> None:
    for number in (0, 1, 13, 14, 0x11, 1 << 40):
        assert call(board, number=number) == 2**64 - ENOSYS
    assert call(board, number=13, cpl=3) == 2**64 - EPERM
    assert call(board, number=13, long_mode=False) == 2**32 - ENOSYS
    enter = enter_of(board, Exit(cpuid=Cpuid(leaf=0x40000000)))
    assert [update.register.value for update in enter.updates] == [0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D]
    assert b"".join(value.to_bytes(4, "little") for value in (0x4B4D564B, 0x564B4D56, 0x4D)) == b"KVMKVMKVM\0\0\0"
    assert not any(update.register.value for update in enter_of(board, Exit(cpuid=Cpuid(leaf=0x40000003))).updates)
    assert not monitor.entered


def test_a_plain_machine_watches_no_register(board: Board) -> None:
    wanted = board.design.filter()
    assert wanted.user_hypercalls
    wanted.user_hypercalls = False
    assert not wanted.ByteSize()
    write = Exit(register_write=RegisterWrite(name=RegisterName.REGISTER_NAME_CR4))
    assert enter_of(board, write).resolution.action == vcpu_pb2.ACTION_DENY  # a core that exits without being asked


def test_arguments_outside_long_mode_are_32_bits() -> None:
    registers = Registers(cr0=1, rax=1 << 32 | 13, rbx=1 << 32 | 4, rcx=-1 % 2**64, rdx=2, rsi=3)
    decoded = kvm_abi.decode(registers)
    assert (decoded.number, decoded.arguments) == (13, (4, 0xFFFFFFFF, 2, 3))
