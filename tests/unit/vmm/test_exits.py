"""The table of exits: what each kind gives, with and without VTL1."""

from __future__ import annotations

import pytest

from tests.unit.vmm.fakes import FakeLevel, returns
from vmm.board import Board, Ending
from vmm.exits import serve
from vmm.processor import Processor
from vmm.states import FAILED, RUNNING, STOPPED
from vmm.vtl import VTL1
from vtlab.errors import GuestMisbehaved
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import hypercall_page
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import RegisterName, Registers, RegisterValue, Segment
from vtlab.v1.vcpu_pb2 import (
    Cpuid,
    EmulationFailure,
    Enter,
    Exit,
    Halt,
    Hypercall,
    IndexRange,
    InterceptFilter,
    Kicked,
    MemoryFault,
    MsrAccess,
    MsrFilter,
    PageAccess,
    PortAccess,
    ProtectionUpdate,
    RegisterWrite,
    ResetRequest,
    SerialOutput,
    Shutdown,
    Update,
    VtlReturn,
)

LONG_MODE = Registers(efer=0x500, cr0=0x80000001, cs=Segment(attributes=0xA09B))
UD = 6


def enter_of(board: Board, exit_: Exit) -> Enter:
    answer = serve(board, board.processors[0], exit_)
    assert isinstance(answer, Enter)
    return answer


def ending_of(board: Board, exit_: Exit) -> Ending:
    answer = serve(board, board.processors[0], exit_)
    assert isinstance(answer, Ending)
    return answer


def registers(**values: int) -> Registers:
    result = Registers()
    result.CopyFrom(LONG_MODE)
    for name, value in values.items():
        setattr(result, name, value)
    return result


def hypercall(**values: int) -> Exit:
    return Exit(hypercall=Hypercall(), registers=registers(**values))


def written(enter: Enter) -> dict[str, int]:
    """Registers that an enter's updates write."""
    return {
        RegisterName.Name(update.register.name).removeprefix("REGISTER_NAME_"): update.register.value
        for update in enter.updates
        if update.HasField("register")
    }


def msr(index: int, value: int | None = None) -> Exit:
    return Exit(msr=MsrAccess(index=index, write=value is not None, new_value=value or 0))


def watch(board: Board, filter_: InterceptFilter) -> None:
    """VTL1 is on and watches that."""
    board.processors[0].vtl.enabled |= 1 << VTL1
    board.monitor.say(returns(Update(intercepts=filter_)))  # type: ignore[union-attr]
    enter_of(board, hypercall(rcx=HypercallCode.VTL_CALL))
    board.monitor.entered.clear()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------ without VTL1


@pytest.mark.parametrize(
    "exit_",
    [
        Exit(register_write=RegisterWrite(name=RegisterName.REGISTER_NAME_CR0)),
        Exit(memory_fault=MemoryFault(gpa=0x1000, access=vcpu_pb2.ACCESS_KIND_WRITE)),
        Exit(memory_fault=MemoryFault(unmapped=True, access=vcpu_pb2.ACCESS_KIND_EXECUTE)),
        Exit(memory_fault=MemoryFault(unmapped=True, access=vcpu_pb2.ACCESS_KIND_READ, page_walk=True)),
        Exit(memory_fault=MemoryFault(unmapped=False)),
        msr(0x1234),
        msr(0x1234, 1),
        msr(HvMsr.VP_INDEX, 1),
        msr(HvMsr.TIME_REF_COUNT, 1),
        msr(HvMsr.SIMP),
    ],
    ids=str,
)
def test_nobody_decided_so_it_is_denied(board: Board, exit_: Exit) -> None:
    assert enter_of(board, exit_).resolution.action == vcpu_pb2.ACTION_DENY


@pytest.mark.parametrize("exit_", [Exit(), Exit(vtl_return=VtlReturn()), Exit(protect=vcpu_pb2.Protect())], ids=str)
def test_what_vtl0_cannot_exit_with(board: Board, exit_: Exit) -> None:
    with pytest.raises(GuestMisbehaved):
        serve(board, board.processors[0], exit_)


@pytest.mark.parametrize(
    ("exit_", "state", "reason"),
    [
        (Exit(shutdown=Shutdown(cause="#DF")), RUNNING, "triple fault: #DF"),
        (Exit(reset_request=ResetRequest(source="0x64")), RUNNING, "0x64"),
        (msr(HvMsr.RESET, 1), RUNNING, "RESET MSR"),
        (Exit(debug_exit=vcpu_pb2.DebugExit(value=5)), STOPPED, "0x5"),
        (Exit(failure=EmulationFailure(message="no such opcode")), FAILED, "no such opcode"),
    ],
)
def test_endings(board: Board, exit_: Exit, state: int, reason: str) -> None:
    ending = ending_of(board, exit_)
    assert ending.state == state
    assert reason in ending.reason


def test_stop_on_reset(board: Board) -> None:
    board.spec.stop_on_reset = True
    for exit_ in (Exit(shutdown=Shutdown()), Exit(reset_request=ResetRequest()), msr(HvMsr.RESET, 1)):
        assert ending_of(board, exit_).state == STOPPED


def test_halt(board: Board) -> None:
    """With interrupts on, the core waits; with interrupts off, the vCPU waits here and then goes on behind HLT."""
    assert enter_of(board, Exit(halt=Halt(interrupts_enabled=True))).resolution.action == vcpu_pb2.ACTION_COMMIT
    assert not board.gate._halted
    assert enter_of(board, Exit(halt=Halt())).resolution.action == vcpu_pb2.ACTION_SKIP
    assert board.gate._halted == {(0, 0)}


def test_empty_ports_and_empty_memory(board: Board) -> None:
    for size, ones in ((1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)):
        enter = enter_of(board, Exit(port=PortAccess(port=0x1234, size=size)))
        assert (enter.resolution.action, enter.resolution.value) == (vcpu_pb2.ACTION_COMPLETE, ones)
    enter = enter_of(board, Exit(port=PortAccess(port=0x1234, size=1, write=True, value=1)))
    assert enter.resolution.action == vcpu_pb2.ACTION_COMPLETE
    read = Exit(memory_fault=MemoryFault(unmapped=True, gpa=1 << 40, access=vcpu_pb2.ACCESS_KIND_READ))
    assert enter_of(board, read).resolution.value == 2**64 - 1
    write = Exit(memory_fault=MemoryFault(unmapped=True, gpa=1 << 40, access=vcpu_pb2.ACCESS_KIND_WRITE))
    assert enter_of(board, write).resolution.action == vcpu_pb2.ACTION_COMPLETE
    with pytest.raises(GuestMisbehaved, match="3 bytes"):
        serve(board, board.processors[0], Exit(port=PortAccess(port=1, size=3)))


def test_the_test_device(board: Board) -> None:
    enter_of(board, Exit(port=PortAccess(port=0xE0, size=4, write=True, value=0x12345678)))
    assert enter_of(board, Exit(port=PortAccess(port=0xE1, size=2))).resolution.value == 0x3456
    enter = enter_of(board, Exit(port=PortAccess(port=0x2003, size=1, write=True, value=1)))
    assert (enter.updates[0].event.irq_line.irq, enter.updates[0].event.irq_line.asserted) == (3, True)
    enter = enter_of(board, Exit(port=PortAccess(port=0x2003, size=1, write=True, value=0)))
    assert (enter.updates[0].event.irq_line.irq, enter.updates[0].event.irq_line.asserted) == (3, False)
    assert not enter_of(board, Exit(port=PortAccess(port=0x2017, size=1, write=True, value=1))).updates


def test_discovery(board: Board) -> None:
    def leaf(number: int) -> dict[str, int]:
        enter = enter_of(board, Exit(cpuid=Cpuid(leaf=number)))
        assert enter.resolution.action == vcpu_pb2.ACTION_SKIP
        return written(enter)

    assert leaf(0x40000000) == {"RAX": 0x40000005, "RBX": 0x7263694D, "RCX": 0x666F736F, "RDX": 0x76482074}
    assert leaf(0x40000001)["RAX"] == 0x31237648
    assert leaf(0x40000003)["RAX"] == sum(1 << bit for bit in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11))
    assert leaf(0x40000003)["RBX"] == sum(1 << bit for bit in (4, 5, 16, 17, 21))
    assert leaf(0x40000003)["RDX"] == sum(1 << bit for bit in (4, 5, 8, 15, 17, 19))
    board.vtl.offered = False
    assert leaf(0x40000003)["RBX"] == 1 << 4 | 1 << 5
    assert set(leaf(0x400000FF).values()) == {0}
    assert enter_of(board, Exit(cpuid=Cpuid(leaf=1))).resolution.action == vcpu_pb2.ACTION_COMMIT


def test_hypercall_page_needs_an_os_id(board: Board) -> None:
    enter_of(board, msr(HvMsr.HYPERCALL, 0x5001))  # no OS id yet
    assert posted(board)[-1].hypercall_page.enabled is False
    assert enter_of(board, msr(HvMsr.HYPERCALL)).resolution.value == 0x5000


def posted(board: Board) -> list[Update]:
    """Updates that go with the next enter, or wait for it."""
    return [*board.processors[0]._answer.updates, *board.processors[0]._pending]


def test_hypercall_page_goes_to_the_guest(board: Board) -> None:
    enter_of(board, msr(HvMsr.GUEST_OS_ID, 1 << 63))
    enter_of(board, msr(HvMsr.HYPERCALL, 0x5001))
    assert posted(board)[-1].hypercall_page == vcpu_pb2.HypercallPage(enabled=True, gfn=5)
    enter_of(board, msr(HvMsr.GUEST_OS_ID, 0))
    assert posted(board)[-1].hypercall_page == vcpu_pb2.HypercallPage(enabled=False, gfn=5)


def test_hypercall_page_cannot_cover_what_vtl0_may_not_write(board: Board) -> None:
    enter_of(board, msr(HvMsr.GUEST_OS_ID, 1))
    seal = ProtectionUpdate(runs=[5, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    board.protect([seal])
    for value in (0x5001, 0x7FFFF001):  # sealed; no RAM
        assert enter_of(board, msr(HvMsr.HYPERCALL, value)).resolution.action == vcpu_pb2.ACTION_DENY
    assert board.msrs.hypercall == 0


def test_locked_hypercall_page(board: Board) -> None:
    enter_of(board, msr(HvMsr.GUEST_OS_ID, 1))
    enter_of(board, msr(HvMsr.HYPERCALL, 0x5003))
    assert enter_of(board, msr(HvMsr.HYPERCALL, 0)).resolution.action == vcpu_pb2.ACTION_DENY
    assert enter_of(board, msr(HvMsr.HYPERCALL)).resolution.value == 0x5003


def test_hypercall_page_bytes() -> None:
    page = hypercall_page()
    assert len(page) == PAGE_SIZE
    assert page[0x0F:0x1B] == bytes.fromhex("4889c8b9110000000f01d9c3")
    assert page[0x26:0x32] == bytes.fromhex("4889c8b9120000000f01d9c3")
    assert page[0x32:] == b"\xcc" * (PAGE_SIZE - 0x32)


def test_serial_output_is_logged_first(board: Board) -> None:
    enter_of(board, Exit(kicked=Kicked(), serial=[SerialOutput(port=1, data=b"hi")]))
    (event,) = board.events.kept()
    assert (event.kind, event.serial.data, event.serial.port) == (vmm_pb2.EVENT_KIND_SERIAL, b"hi", 1)


def test_enters_are_numbered(board: Board) -> None:
    numbers = [enter_of(board, Exit(kicked=Kicked())).sequence for _ in range(3)]
    assert numbers == [1, 2, 3]


# -------------------------------------------------------------------------------------------------------- VTL switch


@pytest.mark.parametrize(
    "values",
    [
        {"rcx": 0x11},  # VTL1 not enabled
        {"rcx": 0x12},  # return from VTL0
        {"rcx": 0x11 | 1 << 16},
        {"rcx": 0x11 | 1 << 32},
    ],
)
def test_illegal_switches_are_undefined_opcodes(board: Board, monitor: FakeLevel, values: dict[str, int]) -> None:
    enter = enter_of(board, hypercall(**values))
    assert (enter.resolution.action, enter.resolution.exception.vector) == (vcpu_pb2.ACTION_DENY, UD)
    assert not enter.resolution.exception.HasField("error_code")
    assert not monitor.entered


def test_illegal_control_input(board: Board, processor: Processor, monitor: FakeLevel) -> None:
    processor.vtl.enabled |= 1 << VTL1
    assert enter_of(board, hypercall(rcx=0x11, rax=1)).resolution.exception.vector == UD
    assert not monitor.entered


def test_real_mode_hypercall_is_an_undefined_opcode(board: Board) -> None:
    assert enter_of(board, Exit(hypercall=Hypercall(), registers=Registers())).resolution.exception.vector == UD


def test_protected_mode_hypercall_has_its_own_registers(board: Board) -> None:
    exit_ = Exit(hypercall=Hypercall(), registers=Registers(cr0=1, rax=0x7777))
    enter = enter_of(board, exit_)
    assert enter.resolution.action == vcpu_pb2.ACTION_SKIP
    assert written(enter) == {"RAX": HvStatus.INVALID_HYPERCALL_CODE, "RDX": 0}


def test_vtl_call_carries_registers_and_brings_updates_back(
    board: Board, processor: Processor, monitor: FakeLevel
) -> None:
    processor.vtl.enabled |= 1 << VTL1
    result = Update(register=RegisterValue(name=RegisterName.REGISTER_NAME_R8, value=42))
    monitor.say(returns(result))
    enter = enter_of(board, hypercall(rcx=0x11, rdi=0x1FF05))
    assert monitor.entered[0].reason == vcpu_pb2.ENTER_REASON_VTL_CALL
    assert monitor.entered[0].registers.rdi == 0x1FF05
    assert enter.resolution.action == vcpu_pb2.ACTION_SKIP
    assert list(enter.updates) == [result]
    assert processor.vtl.active == 0


# --------------------------------------------------------------------------------------------------------- with VTL1


def test_watched_exits_are_judged(board: Board, monitor: FakeLevel) -> None:
    watch(board, InterceptFilter(msr_writes=[MsrFilter(index=0xC0000082)], ports=[IndexRange(first=0x80, count=2)]))
    for exit_ in (
        Exit(register_write=RegisterWrite(name=RegisterName.REGISTER_NAME_CR4)),
        msr(0xC0000082, 5),
        Exit(memory_fault=MemoryFault(gpa=0x1000, access=vcpu_pb2.ACCESS_KIND_WRITE)),
        Exit(port=PortAccess(port=0x81, size=1)),
    ):
        monitor.say(returns(action=vcpu_pb2.ACTION_COMMIT, reason="rule"))
        enter = enter_of(board, exit_)
        assert enter.resolution.action == vcpu_pb2.ACTION_COMMIT
        assert monitor.entered[-1].reason == vcpu_pb2.ENTER_REASON_INTERCEPT
        assert monitor.entered[-1].intercept.WhichOneof("reason") == exit_.WhichOneof("reason")
    verdicts = board.events.kept((vmm_pb2.EVENT_KIND_VERDICT,))
    assert [event.verdict.resolution.reason for event in verdicts] == ["rule"] * 4


def test_unwatched_exits_are_not(board: Board, monitor: FakeLevel) -> None:
    watch(board, InterceptFilter(msr_writes=[MsrFilter(index=0xC0000082)]))
    for exit_ in (
        msr(HvMsr.GUEST_OS_ID),
        msr(0xC0000082),
        Exit(port=PortAccess(port=0x81, size=1)),
        Exit(cpuid=Cpuid(leaf=0x40000000)),
        Exit(halt=Halt(interrupts_enabled=True)),
        Exit(memory_fault=MemoryFault(unmapped=True, access=vcpu_pb2.ACCESS_KIND_READ)),
    ):
        enter_of(board, exit_)
    assert not monitor.entered


def test_an_empty_verdict_stays_a_denial(board: Board) -> None:
    watch(board, InterceptFilter())
    enter = enter_of(board, Exit(register_write=RegisterWrite(name=RegisterName.REGISTER_NAME_CR0)))
    assert enter.resolution.action == vcpu_pb2.ACTION_UNSPECIFIED


@pytest.mark.parametrize(("action", "state"), [(vcpu_pb2.ACTION_HALT, STOPPED), (vcpu_pb2.ACTION_RESET, RUNNING)])
def test_verdicts_that_end(board: Board, monitor: FakeLevel, action: vcpu_pb2.Action.ValueType, state: int) -> None:
    watch(board, InterceptFilter())
    monitor.say(returns(action=action, reason="cr3"))
    ending = ending_of(board, Exit(register_write=RegisterWrite(name=RegisterName.REGISTER_NAME_CR3)))
    assert ending.state == state
    assert "cr3" in ending.reason


def test_protect_in_the_middle(board: Board, monitor: FakeLevel) -> None:
    """Memory has moved when VTL1 goes on; the guest is told with the next enter, before anything else."""
    watch(board, InterceptFilter())
    board.memory.write(0x3000, b"text")
    seal = ProtectionUpdate(runs=[3, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    bad = ProtectionUpdate(runs=[1 << 30, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    monitor.say(
        Exit(protect=vcpu_pb2.Protect(protections=[seal])),
        Exit(protect=vcpu_pb2.Protect(protections=[bad])),
        returns(Update(invalidate_code=vcpu_pb2.InvalidateCode(gfns=[3])), action=vcpu_pb2.ACTION_RETRY),
    )
    enter_of(board, Exit(memory_fault=MemoryFault(gpa=0x3000)))
    assert [enter.status for enter in monitor.entered] == [0, 0, HvStatus.INVALID_PARAMETER]
    assert [enter.sequence for enter in monitor.entered] == [2, 3, 4]
    assert not board.memory.access(0x3000).write
    assert [update.WhichOneof("change") for update in posted(board)[-2:]] == ["protection", "invalidate_code"]
    assert posted(board)[-2].protection == seal


def test_rights_in_a_return_are_applied_or_break_the_machine(board: Board, monitor: FakeLevel) -> None:
    watch(board, InterceptFilter())
    hide = ProtectionUpdate(runs=[4, 1], access=PageAccess(), store=vcpu_pb2.PAGE_STORE_PRIVATE)
    monitor.say(returns(Update(protection=hide), action=vcpu_pb2.ACTION_RETRY))
    enter_of(board, Exit(memory_fault=MemoryFault(gpa=0x4000)))
    assert not board.memory.access(0x4000).read
    assert posted(board)[-1].protection == hide
    monitor.say(returns(Update(protection=ProtectionUpdate(runs=[4, 1]))))
    with pytest.raises(Exception, match="no store"):
        serve(board, board.processors[0], Exit(memory_fault=MemoryFault(gpa=0x4000)))


def test_vtl1_that_exits_with_nonsense(board: Board, monitor: FakeLevel) -> None:
    watch(board, InterceptFilter())
    monitor.say(Exit(kicked=Kicked()))
    with pytest.raises(GuestMisbehaved, match=r"VTL1.*kicked"):
        serve(board, board.processors[0], Exit(memory_fault=MemoryFault(gpa=0x4000)))
