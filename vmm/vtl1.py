"""Entering VTL1 and taking its answer: the only way from VTL0's exits to the monitor and back.

VTL1 may ask for page rights any number of times before it returns (Protect); its return carries the verdict and what to
program below. Nothing of VTL0 runs on this vCPU meanwhile, and if no answer comes, nothing will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

from vmm.board import Answer, Board, reset_wanted, stopped, succeeded
from vmm.intercept_filter import Watched
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1, may_call
from vmm.vtl_switch import SKIP, UNDEFINED_OPCODE
from vtlab.errors import BadArgument, GuestMisbehaved, Refused
from vtlab.hyperv.status import HvStatus
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import MsrValue, RegisterValue
from vtlab.v1.vcpu_pb2 import Enter, Exit, PeerUpdate, Resolution, Update, VtlReturn
from vtlab.x86.registers import Msr


def enter_vtl1(board: Board, processor: Processor, enter: Enter, cause: Exit | None = None) -> VtlReturn:
    """Runs VTL1 until it returns, serving what it asks for. The level that was active is so again then.

    Args:
        cause: the exit of VTL0 that it is about; None if a client, or guest code at VTL1, is the reason.

    Raises:
        PeerUnavailable: the monitor is gone or silent.
        GuestMisbehaved: it exits with something that VTL1 cannot ask for.
    """
    if cause is not None:
        enter.cause, enter.cause_vp_index = cause.sequence, cause.vp_index
    if board.tracer is not None:
        enter.trace = board.tracer.context(board, processor)
    return _until_return(board, processor, processor.run_monitor(enter), enter)


def _until_return(board: Board, processor: Processor, exit_: Exit, enter: Enter) -> VtlReturn:
    """From the exit that answers an enter of VTL1 on."""
    caller, processor.vtl.active = VTL1 if board.guest_code else VTL0, VTL1
    while True:
        kind = exit_.WhichOneof("reason")
        if kind == "vtl_return":
            processor.vtl.active = caller
            return exit_.vtl_return
        serve = _ASKED.get(kind or "")
        if serve is None:
            raise GuestMisbehaved(f"VTL1 of {board.vm}", f"exits with {kind or 'nothing'}")
        cause, vp_index, trace = enter.cause, enter.cause_vp_index, enter.trace
        enter = serve(board, processor, exit_)
        enter.reason, enter.cause, enter.cause_vp_index = vcpu_pb2.ENTER_REASON_RESUME, cause, vp_index
        if trace:
            enter.trace = trace
        exit_ = processor.run_monitor(enter)


def _protect(board: Board, _processor: Processor, exit_: Exit) -> Enter:
    try:
        board.protect(exit_.protect.protections)
    except BadArgument:
        return Enter(status=HvStatus.INVALID_PARAMETER)
    except Refused:
        return Enter(status=HvStatus.OPERATION_DENIED)
    return Enter(status=HvStatus.SUCCESS)


def _state(board: Board, processor: Processor, _exit: Exit) -> Enter:
    return Enter(state=board.guest.state(processor.index))


# What VTL1 may ask for before it returns.
_ASKED: dict[str, Callable[[Board, Processor, Exit], Enter]] = {"protect": _protect, "state_request": _state}


def finish_reopened(board: Board, processor: Processor) -> VtlReturn | None:
    """Has VTL1 end what a client had it do when the VMM died; what VTL0 had it do is taken up with VTL0's exit.

    Guest code at VTL1 is entered by the thread of its vCPU, as before.
    """
    reopened = processor.reopened
    if reopened is None or reopened.cause or board.guest_code:
        return None
    answer = _until_return(board, processor, processor.run_reopened(), reopened)
    processor.post(*take_updates(board, processor, answer))
    return answer


def take_updates(board: Board, processor: Processor, answer: VtlReturn) -> list[Update]:
    """Applies what VTL1 wants for VTL0. Gives what concerns this vCPU alone, for its next enter.

    Raises:
        BadArgument, Refused: page rights that cannot be given. VTL1 cannot be told any more: the machine has to stop.
    """
    if answer.peers:
        with board.gate.none_inside() if answer.stop_all else nullcontext():
            for peer in answer.peers:
                _take_peer_update(board, peer)
    rest = []
    for update in answer.updates:
        kind = update.WhichOneof("change")
        if kind == "protection":
            board.protect([update.protection])
            continue
        if kind == "intercepts":
            processor.watched = Watched(update.intercepts)
            processor.post(update)  # behind what waits: the last filter counts
            continue
        rest.append(update)
    return rest


def _take_peer_update(board: Board, peer: PeerUpdate) -> None:
    """The filter of another vCPU, or its end until SIPI, before that one runs again."""
    kind = peer.update.WhichOneof("change")
    if peer.vp_index >= len(board.processors) or kind not in ("intercepts", "park_processor"):
        raise GuestMisbehaved(f"VTL1 of {board.vm}", f"updates vCPU {peer.vp_index} with {kind or 'nothing'}")
    other = board.processors[peer.vp_index]
    if kind == "intercepts":
        other.watched = Watched(peer.update.intercepts)
    other.post(peer.update)


def intercept(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """Has VTL1 judge an exit of VTL0."""
    resolution, updates = _verdict(board, processor, exit_, exit_)
    return conclude(board, processor, resolution, updates)


def judged(board: Board, processor: Processor, exit_: Exit, cause: Exit | None = None) -> Resolution:
    """VTL1's verdict on what an exit of VTL0, or of its own code, asks for besides; what it wants programmed is."""
    resolution, updates = _verdict(board, processor, exit_, cause)
    processor.post(*updates)
    return resolution


def _verdict(board: Board, processor: Processor, exit_: Exit, cause: Exit | None) -> tuple[Resolution, list[Update]]:
    enter = Enter(reason=vcpu_pb2.ENTER_REASON_INTERCEPT)
    enter.intercept.CopyFrom(exit_)
    answer = enter_vtl1(board, processor, enter, cause)
    if answer.HasField("stand_down"):
        raise GuestMisbehaved(f"VTL1 of {board.vm}", "stands down though no VTL call asked for it")
    resolution = answer.resolution
    board.events.record(
        vmm_pb2.EVENT_KIND_VERDICT, (exit_, resolution), processor.index, exit_.vtl, exit_.sequence, weight=512
    )
    return resolution, take_updates(board, processor, answer)


def conclude(board: Board, processor: Processor, resolution: Resolution, updates: Iterable[Update] = ()) -> Answer:
    """What a verdict means for the vCPU."""
    if resolution.action == vcpu_pb2.ACTION_HALT:
        return stopped(f"halted by VTL1: {resolution.reason}")
    if resolution.action == vcpu_pb2.ACTION_RESET:
        return reset_wanted(board.spec, f"reset by VTL1: {resolution.reason}")
    return processor.resume(resolution, updates)


def vtl_call(board: Board, processor: Processor, exit_: Exit, control: int) -> Answer:
    """HvCallVtlCall. Illegal ones are #UD and reach nobody."""
    if not may_call(processor.vtl, control):
        return processor.resume(UNDEFINED_OPCODE)
    code = exit_.registers.rdi
    board.log_vtl(processor, VTL0, "call", code)
    enter = Enter(reason=vcpu_pb2.ENTER_REASON_VTL_CALL)
    enter.registers.CopyFrom(exit_.registers)
    answer = enter_vtl1(board, processor, enter, exit_)
    if answer.HasField("stand_down"):
        board.over = True
        board.log_vtl(processor, VTL1, "stand-down", code)
        return succeeded(answer.stand_down)
    updates = take_updates(board, processor, answer)
    board.log_vtl(processor, VTL1, "return", code)
    if answer.resolution.action in (vcpu_pb2.ACTION_HALT, vcpu_pb2.ACTION_RESET):
        return conclude(board, processor, answer.resolution)
    return processor.resume(SKIP, updates)


def enable_vtl1(board: Board, processor: Processor, exit_: Exit, registers: list[RegisterValue], pat: int) -> bool:
    """HvCallEnableVpVtl, rules checked: VTL1 starts on that vCPU with that context. False if VTL1 denies."""
    updates = [Update(register=value) for value in registers] + [Update(msr=MsrValue(index=Msr.PAT, value=pat))]
    enter = Enter(reason=vcpu_pb2.ENTER_REASON_ENABLE, registers=exit_.registers, intercept=exit_, updates=updates)
    answer = enter_vtl1(board, processor, enter, exit_)
    if answer.resolution.action == vcpu_pb2.ACTION_DENY:
        return False
    processor.vtl.enabled |= 1 << VTL1
    processor.post(*take_updates(board, processor, answer))
    board.log_vtl(processor, VTL0, "enable-vp", VTL1)
    return True
