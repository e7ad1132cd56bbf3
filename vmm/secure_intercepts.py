"""Secure intercepts for a VTL1 that is guest code: what VTL0 tried becomes a message in SINT0 of VTL1's SynIC.

The message raises VTL1's interrupt, which preempts VTL0; its instruction has done nothing and runs again unless VTL1
moves RIP on, injects an event or removes the reason. Where VTL1 cannot take the message (SINT0 masked, its slot taken)
the message is lost and the instruction meets the same intercept again.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm import vtl_switch
from vmm.board import Answer, Board
from vmm.processor import Processor
from vtlab.errors import VtlabError
from vtlab.hyperv import messages
from vtlab.hyperv.messages import INTERCEPT_SINT, InterceptType
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit, SynicMessage, Update
from vtlab.x86.paging import NonCanonicalAddress, Translation, UnsupportedPaging, walk
from vtlab.x86.registers import Msr

_Message = tuple[InterceptType, bytes]
_RETURN_ADDRESS = 8


def deliver(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """The enter of VTL1 that carries the message."""
    kind, payload = _MESSAGES[exit_.WhichOneof("reason") or ""](board, exit_)
    message = SynicMessage(sint=INTERCEPT_SINT, type=kind, payload=payload, drop_if_busy=True)
    update = Update(synic_message=message)
    return vtl_switch.interrupt(board, processor, exit_, vtl_switch.RETRY, [update])


def _memory(board: Board, exit_: Exit) -> _Message:
    profile = board.profile
    branch = 0
    if profile.branch_length_in_execute_message and exit_.memory_fault.access == vcpu_pb2.ACCESS_KIND_EXECUTE:
        branch = _branch_length(board, exit_)
    return InterceptType.GPA_INTERCEPT, messages.memory_message(exit_, profile.memory_message_size, branch)


def _branch_length(board: Board, exit_: Exit) -> int:
    """Length of the near CALL whose target could not be fetched, by the return address that it pushed; 0 if none."""
    registers = exit_.registers
    raw = _read(board, registers, registers.rsp, _RETURN_ADDRESS)
    after = int.from_bytes(raw, "little")
    code = _read(board, registers, after - 5, 5) if raw else b""
    if code[:1] == b"\xe8":
        return 5
    if code[3:4] == b"\xff" and code[4:5] and code[4] >> 3 & 7 == 2:
        return 2 if code[2] & 0xF0 != 0x40 else 3
    return 0


def _read(board: Board, registers: registers_pb2.Registers, gva: int, size: int) -> bytes:
    """Bytes of VTL0 that lie in one page, with its rights; none if they cannot be read."""
    try:
        found = walk(
            board.memory.read_entry,
            cr0=registers.cr0,
            cr3=registers.cr3,
            cr4=registers.cr4,
            efer=registers.efer,
            gva=gva & (1 << 64) - 1,
            ac=True,
        )
        return board.memory.read(found.gpa, size) if isinstance(found, Translation) else b""
    except (VtlabError, NonCanonicalAddress, UnsupportedPaging):
        return b""


def _register(_board: Board, exit_: Exit) -> _Message:
    if exit_.register_write.name == registers_pb2.REGISTER_NAME_EFER:
        return InterceptType.MSR_INTERCEPT, messages.msr_write_message(exit_, Msr.EFER)
    return InterceptType.REGISTER_INTERCEPT, messages.register_message(exit_)


_MESSAGES: dict[str, Callable[[Board, Exit], _Message]] = {
    "memory_fault": _memory,
    "register_write": _register,
    "msr": lambda _board, exit_: (InterceptType.MSR_INTERCEPT, messages.msr_message(exit_)),
    "port": lambda _board, exit_: (InterceptType.IO_PORT_INTERCEPT, messages.port_message(exit_)),
}
