"""What clients may look at and change in a machine, and who judges it.

Clients have VTL0's rights on memory, never more. While VTL1 is on, they may set general registers, RIP and RFLAGS;
anything else is put to VTL1 as the exit that the guest's own write would have made, with origin CLIENT.
All functions find every vCPU parked (see Gate.all_parked), except where only memory is touched.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmm import processor_state
from vmm.board import Board
from vmm.devices.disk import Disk
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1
from vmm.vtl1 import enter_vtl1, take_updates
from vtlab.enums import name_of
from vtlab.errors import BadArgument, LimitExceeded, Refused, Unsupported
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import MsrValue, ProcessorState, RegisterName, RegisterValue
from vtlab.v1.vcpu_pb2 import Enter, Exit, MachineCheck, MsrAccess, PendingEvent, Resolution, SerialInput, Update
from vtlab.v1.vmm_pb2 import TranslateResponse
from vtlab.x86.paging import NonCanonicalAddress, PageFault, UnsupportedPaging, walk

MAX_TRANSFER = 1 << 20
MAX_SERIAL_INPUT = 64 << 10
# Updates that may wait for the next enter of a vCPU.
MAX_WAITING = 1024


def find_processor(board: Board, vp_index: int) -> Processor:
    if vp_index >= len(board.processors):
        raise BadArgument("vp_index", f"{vp_index}: the machine has {len(board.processors)} vCPUs")
    return board.processors[vp_index]


def read_memory(board: Board, gpa: int, size: int) -> bytes:
    if size > MAX_TRANSFER:
        raise BadArgument("size", f"{size} bytes are more than {MAX_TRANSFER}")
    return board.memory.read(gpa, size)


def write_memory(board: Board, gpa: int, data: bytes) -> None:
    if len(data) > MAX_TRANSFER:
        raise BadArgument("data", f"{len(data)} bytes are more than {MAX_TRANSFER}")
    with board.gate.none_inside():
        board.memory.write(gpa, data)


def inject_nmi(board: Board, vp_index: int) -> None:
    """Pends behind an exit that is open, as behind an instruction."""
    find_processor(board, vp_index)
    board.tell(vp_index, Update(event=PendingEvent(nmi=True)))


def inject_machine_check(board: Board, vp_index: int, error: MachineCheck) -> Resolution:
    """Gives it to VTL0, unless VTL1 decides otherwise; what it decided.

    Raises:
        Unsupported: VTL1 is guest code, which no machine check is brought to.
        LimitExceeded: earlier ones were not taken yet.
    """
    processor = find_processor(board, vp_index)
    if processor.waiting >= MAX_WAITING:
        raise LimitExceeded("machine check", "earlier ones were not taken yet", limit=MAX_WAITING)
    verdict = Resolution(action=vcpu_pb2.ACTION_COMMIT)
    if processor.vtl.has(VTL1):
        if board.guest_code:
            raise Unsupported("machine check", "VTL1 is the guest's own code and cannot be asked about it")
        verdict = _ask(board, processor, Exit(machine_check=error))
    if verdict.action == vcpu_pb2.ACTION_COMMIT:
        processor.post(Update(event=PendingEvent(machine_check=error)))
        board.gate.wake(vp_index)
    return verdict


def read_disk(board: Board, offset: int, size: int) -> bytes:
    if size > MAX_TRANSFER:
        raise BadArgument("size", f"{size} bytes are more than {MAX_TRANSFER}")
    return _disk(board).read(offset, size)


def write_disk(board: Board, offset: int, data: bytes) -> None:
    if len(data) > MAX_TRANSFER:
        raise BadArgument("data", f"{len(data)} bytes are more than {MAX_TRANSFER}")
    _disk(board).write(offset, data)


def _disk(board: Board) -> Disk:
    if board.disk is None:
        raise Unsupported(f"machine '{board.vm}'", "has no disk")
    return board.disk


def write_serial(board: Board, port: int, data: bytes) -> None:
    """Types at a port; the guest sees it at its next exit, which is soon."""
    if port not in (0, 1):
        raise BadArgument("port", f"{port}: there are COM1 (0) and COM2 (1)")
    if len(data) > MAX_SERIAL_INPUT:
        raise BadArgument("data", f"{len(data)} bytes are more than {MAX_SERIAL_INPUT}")
    processor = board.processors[0]
    if processor.waiting >= MAX_WAITING:
        raise LimitExceeded(f"COM{port + 1}", "earlier input was not taken yet", limit=MAX_WAITING)
    processor.post(Update(serial_input=SerialInput(port=port, data=data)))
    board.gate.kick(processor.index)


def get_registers(board: Board, vp_index: int) -> ProcessorState:
    find_processor(board, vp_index)
    return board.guest.state(vp_index)


def set_registers(
    board: Board, vp_index: int, registers: Iterable[RegisterValue], msrs: Iterable[MsrValue] = ()
) -> ProcessorState:
    """Writes all or none; returns the state after it, as the core holds it.

    Raises:
        BadArgument: no such vCPU or register.
        Refused: VTL1 does not want it; names the first register at fault and the rule.
    """
    processor = find_processor(board, vp_index)
    state = board.guest.state(vp_index)
    updates = [Update(register=_judged_register(board, processor, state, value)) for value in registers]
    updates += [Update(msr=_judged_msr(board, processor, state, value)) for value in msrs]
    processor.post(*updates)
    board.gate.wake(vp_index)
    board.gate.flush(vp_index)
    return board.guest.state(vp_index)


def _judged_register(board: Board, processor: Processor, state: ProcessorState, value: RegisterValue) -> RegisterValue:
    if value.name not in processor_state.REGISTERS:
        raise BadArgument(f"register {value.name:#x}", "cannot be set by name")
    if value.name in processor_state.FREE_REGISTERS or not processor.vtl.has(VTL1):
        return value
    write = processor_state.register_write(state, value)
    subject = name_of(RegisterName, value.name).removeprefix("REGISTER_NAME_")
    resolution = _judge(board, processor, Exit(registers=state.registers, register_write=write), subject)
    if resolution.action == vcpu_pb2.ACTION_REPLACE:
        return RegisterValue(name=value.name, value=resolution.value)
    return value


def _judged_msr(board: Board, processor: Processor, state: ProcessorState, value: MsrValue) -> MsrValue:
    old = processor_state.msr(state, value.index)
    if old is None:
        raise BadArgument(f"MSR {value.index:#x}", "is not one that the core models")
    if not processor.vtl.has(VTL1):
        return value
    access = MsrAccess(index=value.index, write=True, old_value=old, new_value=value.value)
    resolution = _judge(board, processor, Exit(registers=state.registers, msr=access), f"MSR {value.index:#x}")
    if resolution.action == vcpu_pb2.ACTION_REPLACE:
        return MsrValue(index=value.index, value=resolution.value)
    return value


def _judge(board: Board, processor: Processor, exit_: Exit, subject: str) -> Resolution:
    """VTL1's verdict on a client's write. Raises Refused unless it is COMMIT or REPLACE."""
    if board.guest_code:
        raise Refused(subject, "VTL1 is the guest's own code and cannot be asked about a client's write", rule="vtl1")
    resolution = _ask(board, processor, exit_)
    if resolution.action not in (vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_REPLACE):
        reason = resolution.reason or "no rule allows it"
        raise Refused(subject, f"VTL1 refuses the write: {reason}", rule=resolution.reason)
    return resolution


def _ask(board: Board, processor: Processor, exit_: Exit) -> Resolution:
    """VTL1's answer to what comes from outside the machine; what it wants programmed is."""
    exit_.vp_index, exit_.vtl, exit_.origin = processor.index, VTL0, vcpu_pb2.ORIGIN_CLIENT
    with board.serving:
        answer = enter_vtl1(board, processor, Enter(reason=vcpu_pb2.ENTER_REASON_CLIENT_WRITE, intercept=exit_))
        board.events.record(vmm_pb2.EVENT_KIND_VERDICT, (exit_, answer.resolution), processor.index, VTL0, weight=512)
        processor.post(*take_updates(board, processor, answer))
    return answer.resolution


def translate(board: Board, vp_index: int, gva: int) -> TranslateResponse:
    """Walks VTL0's tables as its kernel would for a read."""
    registers = get_registers(board, vp_index).registers

    def read_entry(address: int, size: int) -> int:
        return board.memory.read_entry(address, size) if address + size <= board.memory.size else 0

    try:
        found = walk(
            read_entry,
            cr0=registers.cr0,
            cr3=registers.cr3,
            cr4=registers.cr4,
            efer=registers.efer,
            gva=gva,
            ac=True,  # a look at a user page is no SMAP violation
        )
    except NonCanonicalAddress as error:
        raise BadArgument("gva", str(error)) from None
    except UnsupportedPaging as error:
        raise Unsupported("translate", str(error)) from None
    entries = [entry.address for entry in found.entries]
    if isinstance(found, PageFault):
        return TranslateResponse(present=False, entries=entries)
    return TranslateResponse(
        present=True,
        gpa=found.gpa,
        writable=found.writable,
        user=found.user,
        executable=found.executable,
        page_size=found.page_size,
        entries=entries,
        access=board.memory.access(found.gpa),
    )
