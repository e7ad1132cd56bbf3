"""VTL1 stands down: one kernel ends, the next starts with the state that VTL1 gave, and nothing runs between."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tests.unit.vmm.fakes import FakeLevel
from tests.waiting import wait_until
from vmm.machine import Machine
from vmm.states import FAILED, RUNNING, Operation
from vmm.vtl import VTL1
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.registers_pb2 import ProcessorState, Registers, Segment
from vtlab.v1.vcpu_pb2 import (
    Exit,
    Hypercall,
    PageAccess,
    Protect,
    ProtectionUpdate,
    RegisterWrite,
    StandDown,
    VtlReturn,
)

Parts = tuple[Machine, FakeLevel, FakeLevel]
MakeMachine = Callable[..., Parts]
LONG_MODE = Registers(rcx=0x11, rdi=0x1FF06, efer=0x500, cs=Segment(attributes=0xA09B))
VTL_CALL = Exit(registers=LONG_MODE, hypercall=Hypercall())
KERNEL = b"the next kernel"
ENTRY = ProcessorState(registers=Registers(rip=0x100000, rax=0x2BADB002))


def stand_down(sha256: bytes = hashlib.sha256(KERNEL).digest()) -> Exit:
    answer = StandDown(entry=ENTRY, image=[PAGE_SIZE, 4, PAGE_SIZE + 4, 11], image_sha256=sha256, reason="kexec to 2")
    return Exit(vtl_return=VtlReturn(stand_down=answer))


def protect(first: int, store: vcpu_pb2.PageStore.ValueType, **access: bool) -> Exit:
    update = ProtectionUpdate(runs=[first, 1], store=store, access=PageAccess(**access))
    return Exit(protect=Protect(protections=[update]))


def read(machine: Machine, gpa: int, size: int) -> bytes:
    with machine.doing(Operation.READ_MEMORY) as board:
        return board.memory.read(gpa, size)


def begin(parts: Parts, *monitor_says: Exit) -> tuple[Machine, FakeLevel, FakeLevel]:
    """A machine with VTL1 on, whose kernel file is in memory, calls for the stand-down."""
    machine, guest, monitor = parts
    for processor in machine._board.processors:
        processor.vtl.enabled |= 1 << VTL1
    machine._board.memory.write(PAGE_SIZE, KERNEL)
    machine._board.memory.write(2 * PAGE_SIZE, b"secret")
    monitor.say(*monitor_says)
    guest.say(VTL_CALL)
    machine.start()
    return parts


def test_the_next_kernel_starts_with_what_vtl1_gave(machine_parts: Parts) -> None:
    sealed = protect(1, vcpu_pb2.PAGE_STORE_SEALED)
    private = protect(2, vcpu_pb2.PAGE_STORE_PRIVATE)
    machine, guest, monitor = begin(machine_parts, sealed, private, stand_down())
    wait_until(lambda: machine.describe().generation == 2)
    info = machine.describe()
    assert (info.state, info.vtl1_enabled) == (RUNNING, False)
    wait_until(lambda: machine.describe().reason == "kexec to 2")
    first, second = guest.attached
    assert not first.HasField("start")
    assert second.start == ENTRY
    assert monitor.attached[1].image.path == second.image.path == "successor"
    assert monitor.attached[1].image.sha256 == hashlib.sha256(KERNEL).digest()
    assert (machine._directory / "successor").read_bytes() == KERNEL
    assert read(machine, PAGE_SIZE, len(KERNEL)) == KERNEL
    assert read(machine, 2 * PAGE_SIZE, 6) == bytes(6)  # VTL1's own
    enters = guest.wait_entered(2)
    assert enters[1].sequence == 1  # the call was never answered: nothing of the old kernel ran again
    assert guest.log.index("detach 1") < guest.log.index("detach 0") < guest.log.index("attach 0 2")


def test_a_reset_after_it_boots_the_image_of_the_machine(machine_parts: Parts) -> None:
    machine, guest, _ = begin(machine_parts, stand_down())
    wait_until(lambda: machine.describe().reason == "kexec to 2")
    machine.reset()
    assert not guest.attached[2].HasField("start")
    assert guest.attached[2].image.path == "image"


def test_no_exit_of_another_vcpu_is_served_any_more(make_machine: MakeMachine) -> None:
    machine, guest, _ = begin(make_machine(vp_count=2), stand_down())
    board = machine._board
    wait_until(lambda: machine.describe().generation == 2)
    assert board.over
    assert {len([one for one in guest.entered if one.vp_index == 1])} <= {0, 1, 2}
    assert machine.describe().state == RUNNING


def test_a_file_that_is_not_what_vtl1_means_fails_closed(machine_parts: Parts) -> None:
    machine, guest, _ = begin(machine_parts, stand_down(bytes(32)))
    wait_until(lambda: machine.describe().state == FAILED)
    assert "not what VTL1 verified" in machine.describe().reason
    assert len(guest.attached) == 1


def test_only_a_call_makes_vtl1_stand_down(machine_parts: Parts) -> None:
    machine, guest, monitor = machine_parts
    machine._board.processors[0].vtl.enabled |= 1 << VTL1
    monitor.say(stand_down())
    guest.say(Exit(register_write=RegisterWrite(name=registers_pb2.REGISTER_NAME_CR4)))
    machine.start()
    wait_until(lambda: machine.describe().state == FAILED)
    assert "stands down though no VTL call asked for it" in machine.describe().reason
