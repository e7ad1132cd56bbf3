"""What the VMM does with each kind of exit of VTL0, as a table.

Each row takes an exit that VTL1 does not want and gives the next enter or the end. Kinds without a row are not VTL0's
to make: they break the machine.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.board import Answer, Board, failed, reset_wanted, stopped
from vmm.discovery import leaf
from vmm.hypercalls import HYPERCALLS
from vmm.hypercalls.abi import decode_registers
from vmm.hyperv_msrs import GeneralProtectionError, ResetRequestError
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1
from vmm.vtl1 import SKIP, UNDEFINED_OPCODE, intercept, vtl_call
from vtlab.errors import GuestMisbehaved
from vtlab.hyperv.cpuid import HYPERVISOR_LEAVES
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import RegisterValue
from vtlab.v1.vcpu_pb2 import Exit, Resolution, Update

# Exits that are no news: they are not logged.
_QUIET = frozenset({"kicked", "output"})
_SERIAL = vmm_pb2.EVENT_KIND_SERIAL
_EXIT = vmm_pb2.EVENT_KIND_EXIT
_COMPLETE = vcpu_pb2.ACTION_COMPLETE
_DENY = Resolution(action=vcpu_pb2.ACTION_DENY)
_COMMIT = Resolution(action=vcpu_pb2.ACTION_COMMIT)
_VTL_SWITCHES = frozenset({int(HypercallCode.VTL_CALL), int(HypercallCode.VTL_RETURN)})
_RESULT_REGISTERS = (
    registers_pb2.REGISTER_NAME_RAX,
    registers_pb2.REGISTER_NAME_RBX,
    registers_pb2.REGISTER_NAME_RCX,
    registers_pb2.REGISTER_NAME_RDX,
)


def serve(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """Answers an exit of VTL0: VTL1 judges what it watches, the table does the rest.

    Raises:
        GuestMisbehaved: an exit that VTL0 cannot make.
        VtlabError: VTL1 did not answer, or what it wants cannot be done.
    """
    for output in exit_.serial:
        board.events.record(_SERIAL, output, processor.index, VTL0, exit_.sequence, weight=len(output.data))
    if exit_.synic_delivered:
        board.connections.give_back(processor.index, exit_.synic_delivered)
    kind = exit_.WhichOneof("reason")
    handler = _TABLE.get(kind or "")
    if kind is None or handler is None:
        raise GuestMisbehaved(f"VTL0 of {board.vm}", f"exits with {kind or 'nothing'}")
    if kind not in _QUIET:
        board.events.record(_EXIT, exit_, processor.index, VTL0, exit_.sequence, weight=512)
    if processor.vtl.enabled >> VTL1 & 1 and processor.watched.wants(kind, exit_):
        return intercept(board, processor, exit_)
    return handler(board, processor, exit_)


def complete(value: int) -> Resolution:
    """The operation is done, with that result."""
    return Resolution(action=_COMPLETE, value=value)


def _register(name: registers_pb2.RegisterName.ValueType, value: int) -> Update:
    return Update(register=RegisterValue(name=name, value=value))


def _hypercall(board: Board, processor: Processor, exit_: Exit) -> Answer:
    request = decode_registers(exit_.registers)
    if request is None:
        return processor.resume(UNDEFINED_OPCODE)
    if request.value & 0xFFFF in _VTL_SWITCHES:
        if request.value != HypercallCode.VTL_CALL:
            return processor.resume(UNDEFINED_OPCODE)  # a return from VTL0, or bits beside the bare code
        return vtl_call(board, processor, exit_, request.control)
    result = HYPERCALLS.serve(board, processor, VTL0, exit_, request)
    if request.long_mode:
        return processor.resume(complete(result))
    halves = (
        _register(registers_pb2.REGISTER_NAME_RAX, result & 0xFFFF_FFFF),
        _register(registers_pb2.REGISTER_NAME_RDX, result >> 32),
    )
    return processor.resume(SKIP, halves)


def _msr(board: Board, processor: Processor, exit_: Exit) -> Answer:
    access = exit_.msr
    try:
        if not access.write:
            return processor.resume(complete(board.msrs.read(access.index, processor.index, processor.vtl)))
        updates = board.msrs.write(access.index, access.new_value, processor.vtl)
    except GeneralProtectionError:
        return processor.resume(_DENY)
    except ResetRequestError:
        return reset_wanted(board.spec, "reset by the RESET MSR")
    for update in updates:
        board.post_all(update)
    return processor.resume(SKIP)


def _cpuid(board: Board, processor: Processor, exit_: Exit) -> Answer:
    if exit_.cpuid.leaf not in HYPERVISOR_LEAVES:
        return processor.resume(_COMMIT)
    values = leaf(exit_.cpuid.leaf, board.spec.vp_count, board.vtl.offered)
    updates = [_register(name, value) for name, value in zip(_RESULT_REGISTERS, values, strict=True)]
    return processor.resume(SKIP, updates)


def _port(board: Board, processor: Processor, exit_: Exit) -> Answer:
    access = exit_.port
    if access.size not in (1, 2, 4):
        raise GuestMisbehaved(f"VTL0 of {board.vm}", f"accesses port {access.port:#x} with {access.size} bytes")
    port = access.port & 0xFFFF
    if not access.write:
        return processor.resume(complete(board.ports.read(port, access.size)))
    value = access.value & ((1 << 8 * access.size) - 1)
    return processor.resume(SKIP, board.ports.write(port, access.size, value))


def _memory_fault(_board: Board, processor: Processor, exit_: Exit) -> Answer:
    """Where nothing is, reads give all ones and writes are lost, as on a bus that nobody drives; no code is there."""
    fault = exit_.memory_fault
    if not fault.unmapped or fault.page_walk or fault.access == vcpu_pb2.ACCESS_KIND_EXECUTE:
        return processor.resume(_DENY)
    if fault.access == vcpu_pb2.ACCESS_KIND_READ:
        return processor.resume(complete((1 << 64) - 1))
    return processor.resume(SKIP)


def _halt(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """HLT that no interrupt can end waits at the gate, and whoever wakes it finds the vCPU behind the instruction."""
    if exit_.halt.interrupts_enabled:
        return processor.resume(_COMMIT)
    board.gate.halt(processor.index)
    return processor.resume(SKIP)


def _resume(_board: Board, processor: Processor, _exit: Exit) -> Answer:
    return processor.resume()


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
    "msr": _msr,
    "memory_fault": _memory_fault,
    "hypercall": _hypercall,
    "port": _port,
    "cpuid": _cpuid,
    "halt": _halt,
    "invlpg": _commit,
    "kicked": _resume,
    "output": _resume,
    "shutdown": _shutdown,
    "reset_request": _reset,
    "power_off": _power_off,
    "debug_exit": _debug_exit,
    "failure": _failure,
}
