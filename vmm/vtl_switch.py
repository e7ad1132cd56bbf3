"""Switches between VTL0 and a VTL1 that is guest code, on one vCPU (TLFS, "Virtual Secure Mode", VTL call and return).

What the levels share travels with the exit of one and the enter of the other (vcpu.proto, Enter.registers and
Enter.shared; vtl0_guest.cpu.levels has the list). All else each level's core keeps. The exit that a level left with
stays open; how it ends is noted and told to the level when it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmm import vina
from vmm.board import Answer, Board
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1, may_call, may_return
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, Resolution, Update
from vtlab.v1.vcpu_pb2 import Exception as GuestException
from vtlab.x86.registers import Vector

SKIP = Resolution(action=vcpu_pb2.ACTION_SKIP)
RETRY = Resolution(action=vcpu_pb2.ACTION_RETRY)
UNDEFINED_OPCODE = Resolution(
    action=vcpu_pb2.ACTION_DENY, exception=GuestException(vector=Vector.UD), reason="#UD by the rules of the TLFS"
)
# HvCallVtlReturn: leave RAX and RCX of the lower level as they are.
FAST_RETURN = 1


def call(board: Board, processor: Processor, exit_: Exit, control: int) -> Answer:
    """HvCallVtlCall of VTL0. Illegal ones are #UD."""
    if not may_call(processor.vtl, control):
        return processor.resume(UNDEFINED_OPCODE)
    board.log_vtl(processor, VTL0, "call")
    return to_vtl1(board, processor, exit_, SKIP, vcpu_pb2.ENTER_REASON_VTL_CALL)


def return_(board: Board, processor: Processor, exit_: Exit, control: int) -> Answer:
    """HvCallVtlReturn of VTL1. Illegal ones are #UD."""
    if not may_return(processor.vtl, control):
        return processor.resume(UNDEFINED_OPCODE)
    board.log_vtl(processor, VTL1, "return")
    processor.suspended[VTL1] = SKIP
    if exit_.hypercall.interrupt_pending:
        board.gate.interrupt(processor.index)
    enter = _to_vtl0(board, processor)
    enter.registers.CopyFrom(exit_.registers)
    enter.shared.CopyFrom(exit_.shared)
    if control != FAST_RETURN:
        enter.registers.rax, enter.registers.rcx = exit_.hypercall.return_rax, exit_.hypercall.return_rcx
    return enter


def interrupt(
    board: Board, processor: Processor, exit_: Exit, resolution: Resolution | None, updates: Iterable[Update] = ()
) -> Answer:
    """An interrupt for VTL1, or a message that raises one, preempts VTL0 after `exit_`.

    A VP that is started in VTL1 comes here too, and runs there whether an interrupt waits or not.
    """
    if processor.vtl.starts_above:
        processor.vtl.starts_above = False
        return to_vtl1(board, processor, exit_, resolution, vcpu_pb2.ENTER_REASON_RESUME, updates)
    return to_vtl1(board, processor, exit_, resolution, vcpu_pb2.ENTER_REASON_INTERRUPT, updates)


def nothing_to_take(board: Board, processor: Processor) -> Answer:
    """VTL1 was entered for an interrupt that it does not let in: VTL0 goes on."""
    processor.suspended[VTL1] = None
    return _to_vtl0(board, processor)


def to_vtl1(
    board: Board,
    processor: Processor,
    exit_: Exit,
    resolution: Resolution | None,
    reason: vcpu_pb2.EnterReason.ValueType,
    updates: Iterable[Update] = (),
) -> Enter:
    """The enter of VTL1 after an exit of VTL0, which will end with `resolution`."""
    board.gate.take_interrupt(processor.index)  # VTL1 sees for itself what waits
    board.ledger.touch()
    processor.suspended[VTL0] = resolution
    processor.vtl.active = VTL1
    vina.entered(processor)
    ending, processor.suspended[VTL1] = processor.suspended[VTL1], None
    enter = processor.resume(ending, updates, reason)
    enter.registers.CopyFrom(exit_.registers)
    enter.shared.CopyFrom(exit_.shared)
    return enter


def _to_vtl0(board: Board, processor: Processor) -> Enter:
    processor.vtl.active = VTL0
    vina.left(processor)
    board.ledger.touch()
    if processor.vtl.release_tlb_lock():
        board.gate.changed()
    ending, processor.suspended[VTL0] = processor.suspended[VTL0], None
    return processor.resume(ending)
