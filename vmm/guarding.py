"""Guarding from outside: VTL1 for a guest that does not ask for it.

The VMM does what the guest's hypercalls would do (HvCallEnablePartitionVtl, HvCallEnableVpVtl on each vCPU) and VTL1,
which is told that a client wants it, applies the operator's policy at once to the state that the guest is in.
"""

from __future__ import annotations

from vmm.board import Board
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1
from vmm.vtl1 import enter_vtl1, finish_reopened, take_updates
from vtlab.errors import Refused, WrongState
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, Hypercall, VtlReturn


def guard(board: Board) -> None:
    """To be called while every vCPU is parked.

    Raises:
        WrongState: VTL1 cannot be had, or is there already.
        Refused: VTL1 has no policy, or the state of a vCPU is not what it wants.
    """
    subject = f"machine '{board.vm}'"
    if not board.vtl.offered:
        raise WrongState(subject, "was created without VTL1", state="without VTL1", operation="guard it")
    if board.guest_code:
        raise WrongState(subject, "its VTL1 is for the guest's own code", state="guest code", operation="guard it")
    if board.vtl.has(VTL1):
        raise WrongState(subject, "VTL1 is enabled already", state="VTL1 enabled", operation="guard it")
    with board.serving:
        for processor in board.processors:
            _guard(board, processor)


def _guard(board: Board, processor: Processor) -> None:
    registers = board.guest.state(processor.index).registers
    asked = Exit(vp_index=processor.index, origin=vcpu_pb2.ORIGIN_CLIENT, registers=registers, hypercall=Hypercall())
    enter = Enter(reason=vcpu_pb2.ENTER_REASON_ENABLE, registers=registers, intercept=asked)
    answer = enter_vtl1(board, processor, enter)
    processor.post(*take_updates(board, processor, answer))
    _take(board, processor, answer)


def _take(board: Board, processor: Processor, answer: VtlReturn) -> None:
    if answer.resolution.action != vcpu_pb2.ACTION_COMMIT:
        reason = answer.resolution.reason or "VTL1 does not want to"
        raise Refused(f"vCPU {processor.index} of machine '{board.vm}'", reason, rule=reason)
    board.vtl.enabled |= 1 << VTL1
    processor.vtl.enabled |= 1 << VTL1
    board.log_vtl(processor, VTL0, "guard", VTL1)


def finish(board: Board) -> None:
    """Has VTL1 end what a client wanted of it when the VMM died; a machine that was half guarded becomes so wholly."""
    guarding = False
    for processor in board.processors:
        reopened = processor.reopened
        answer = finish_reopened(board, processor)
        if answer is None or reopened is None or reopened.reason != vcpu_pb2.ENTER_REASON_ENABLE:
            continue
        if not processor.vtl.has(VTL1) and answer.resolution.action == vcpu_pb2.ACTION_COMMIT:
            _take(board, processor, answer)
            guarding = True
    if guarding:
        for processor in board.processors:
            if not processor.vtl.has(VTL1):
                _guard(board, processor)
