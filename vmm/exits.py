"""What the VMM does with each kind of exit of guest code, VTL0's or VTL1's, as a table.

Each row takes an exit that the machine's design (vmm.designs) does not want and gives the next enter or the end. Kinds
without a row are not VTL0's to make: they break the machine.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm import startups, vtl_switch
from vmm.board import Answer, Board, complete, failed, register_update, reset_wanted, stopped
from vmm.hyperv_msrs import GeneralProtectionError, ResetRequestError
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1
from vmm.vtl1 import conclude
from vmm.vtl_switch import SKIP
from vtlab.errors import Cancelled, GuestMisbehaved
from vtlab.hyperv.cpuid import HYPERVISOR_LEAVES
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2
from vtlab.v1.vcpu_pb2 import Exit, Resolution

# Exits that are no news: they are not logged.
_QUIET = frozenset({"kicked", "output", "vtl_return"})
_EXIT = vmm_pb2.EVENT_KIND_EXIT
_COMPLETE = vcpu_pb2.ACTION_COMPLETE
_DENY = Resolution(action=vcpu_pb2.ACTION_DENY)
_COMMIT = Resolution(action=vcpu_pb2.ACTION_COMMIT)
_RESULT_REGISTERS = (
    registers_pb2.REGISTER_NAME_RAX,
    registers_pb2.REGISTER_NAME_RBX,
    registers_pb2.REGISTER_NAME_RCX,
    registers_pb2.REGISTER_NAME_RDX,
)


def serve(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """Answers an exit of the active level: the design has what it watches of VTL0, the table does the rest.

    One at a time.

    Raises:
        GuestMisbehaved: an exit that this level cannot make.
        Cancelled: it comes from before VTL1 stood down.
        VtlabError: VTL1 did not answer, or what it wants cannot be done.
    """
    with board.serving:
        if board.over:
            raise Cancelled(f"vCPU {processor.index}", "VTL1 stood down")
        answer = _serve(board, processor, exit_)
        if board.ledger.dirty:
            board.commit(processor, answer)
        return answer


def _serve(board: Board, processor: Processor, exit_: Exit) -> Answer:
    vtl = processor.vtl.active
    if exit_.serial:
        board.record_serial(processor, vtl, exit_)
    if exit_.synic_delivered and vtl == VTL0:
        board.connections.give_back(processor.index, exit_.synic_delivered)
        board.ledger.touch()
    kind = exit_.WhichOneof("reason")
    handler = _TABLE.get(kind or "")
    if kind is None or handler is None:
        raise GuestMisbehaved(f"VTL{vtl} of {board.vm}", f"exits with {kind or 'nothing'}")
    board.exits[kind] += 1
    if board.design.has_state:
        board.ledger.touch()
    if kind not in _QUIET:
        board.events.record(_EXIT, exit_, processor.index, vtl, exit_.sequence, weight=512)
    if vtl == VTL0 and processor.watched.wants(kind, exit_) and board.design.watches(board, processor):
        return board.design.intercepted(board, processor, exit_)
    return handler(board, processor, exit_)


def _hypercall(board: Board, processor: Processor, exit_: Exit) -> Answer:
    return board.design.hypercall(board, processor, exit_)


def _msr(board: Board, processor: Processor, exit_: Exit) -> Answer:
    access = exit_.msr
    vtl = processor.vtl.active
    msrs = board.msrs_of(vtl)
    try:
        if not access.write:
            return processor.resume(complete(msrs.read(access.index, processor.index, processor.vtl)))
        updates = msrs.write(access.index, access.new_value, processor.vtl)
        board.ledger.touch()
    except GeneralProtectionError:
        return processor.resume(_DENY)
    except ResetRequestError:
        return reset_wanted(board.spec, "reset by the RESET MSR")
    for update in updates:
        board.post_all(update, vtl)
    return processor.resume(SKIP)


def _cpuid(board: Board, processor: Processor, exit_: Exit) -> Answer:
    if exit_.cpuid.leaf not in HYPERVISOR_LEAVES:
        return processor.resume(_COMMIT)
    values = board.design.leaf(board, exit_.cpuid.leaf)
    updates = [register_update(name, value) for name, value in zip(_RESULT_REGISTERS, values, strict=True)]
    return processor.resume(SKIP, updates)


def _port(board: Board, processor: Processor, exit_: Exit) -> Answer:
    access = exit_.port
    if access.size not in (1, 2, 4):
        raise GuestMisbehaved(f"VTL0 of {board.vm}", f"accesses port {access.port:#x} with {access.size} bytes")
    port = access.port & 0xFFFF
    if board.ports.answers(port):
        board.ledger.touch()
    if not access.write:
        return processor.resume(complete(board.ports.read(port, access.size)))
    value = access.value & ((1 << 8 * access.size) - 1)
    return processor.resume(complete(0), board.ports.write(port, access.size, value))


def _memory_fault(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """Where nothing is, reads give all ones and writes are lost, as on a bus that nobody drives; no code is there.

    A design may have a device there.
    """
    fault = exit_.memory_fault
    if not fault.unmapped or fault.page_walk or fault.access == vcpu_pb2.ACCESS_KIND_EXECUTE:
        return processor.resume(_DENY)
    answer = board.design.unmapped(board, processor, exit_)
    if answer is not None:
        return answer
    if fault.access == vcpu_pb2.ACCESS_KIND_READ:
        return processor.resume(complete((1 << 64) - 1))
    return processor.resume(complete(0))


def _halt(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """HLT that no interrupt can end waits at the gate, and whoever wakes it finds the vCPU behind the instruction.

    Another vCPU could end it with NMI or INIT: where there is one, it waits in the core.
    """
    if exit_.halt.interrupts_enabled or board.spec.vp_count > 1:
        return processor.resume(_COMMIT)
    board.gate.halt(processor.index, processor.vtl.active)
    board.ledger.touch()
    return processor.resume(SKIP)


def _resume(_board: Board, processor: Processor, _exit: Exit) -> Answer:
    return processor.resume()


def _kicked(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """VTL0 comes out for an interrupt of VTL1, or for whoever holds the gate."""
    levels = processor.vtl
    if board.guest_code and levels.active == VTL0 and board.gate.take_interrupt(processor.index) and levels.has(VTL1):
        return vtl_switch.interrupt(board, processor, exit_, None)
    return processor.resume()


def _vtl_return(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """The guest-code personality's own: VTL1 does not let the interrupt in, or a policy ends it."""
    if not board.guest_code or processor.vtl.active != VTL1:
        raise GuestMisbehaved(f"VTL{processor.vtl.active} of {board.vm}", "exits with vtl_return")
    if exit_.vtl_return.HasField("resolution"):
        return conclude(board, processor, exit_.vtl_return.resolution)
    return vtl_switch.nothing_to_take(board, processor)


def _commit(_board: Board, processor: Processor, _exit: Exit) -> Answer:
    return processor.resume(_COMMIT)


def _deny(_board: Board, processor: Processor, _exit: Exit) -> Answer:
    """VTL1's to decide, but VTL1 is not there."""
    return processor.resume(_DENY)


def _shutdown(board: Board, _processor: Processor, exit_: Exit) -> Answer:
    return reset_wanted(board.spec, f"triple fault: {exit_.shutdown.cause or 'no cause given'}")


def _reset(board: Board, _processor: Processor, exit_: Exit) -> Answer:
    return reset_wanted(board.spec, f"reset by {exit_.reset_request.source or 'the guest'}")


def _power_off(_board: Board, _processor: Processor, exit_: Exit) -> Answer:
    return stopped(f"switched off by {exit_.power_off.source or 'the guest'}")


def _debug_exit(_board: Board, _processor: Processor, exit_: Exit) -> Answer:
    value = exit_.debug_exit.value
    return stopped(f"the guest wrote {value:#x} to the debug-exit port", value)


def _failure(_board: Board, _processor: Processor, exit_: Exit) -> Answer:
    return failed(f"the core cannot go on: {exit_.failure.message}")


_TABLE: dict[str, Callable[[Board, Processor, Exit], Answer]] = {
    "register_write": _deny,
    "startup": startups.serve,
    "state_load": _deny,
    "sleep": _commit,
    "msr": _msr,
    "memory_fault": _memory_fault,
    "hypercall": _hypercall,
    "port": _port,
    "cpuid": _cpuid,
    "halt": _halt,
    "invlpg": _commit,
    "kicked": _kicked,
    "output": _resume,
    "shutdown": _shutdown,
    "reset_request": _reset,
    "power_off": _power_off,
    "debug_exit": _debug_exit,
    "failure": _failure,
    "vtl_return": _vtl_return,
}

REASONS = tuple(_TABLE)
"""Kinds of exits that are served."""
