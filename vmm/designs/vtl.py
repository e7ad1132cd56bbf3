"""Design `vtl`: VTL1 judges. Hyper-V's hypercalls and leaves; a policy in the monitor, or guest code, answers."""

from __future__ import annotations

from vmm import discovery, secure_intercepts, startups, vtl_switch
from vmm.board import Answer, Board, complete, register_update
from vmm.designs.design import Design
from vmm.discovery import Leaf
from vmm.hypercalls import HYPERCALLS
from vmm.processor import Processor
from vmm.vtl1 import intercept, vtl_call
from vmm.vtl_switch import SKIP, UNDEFINED_OPCODE
from vtlab.hyperv.convention import Request, decode_registers
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit, Resolution

_RETRY = Resolution(action=vcpu_pb2.ACTION_RETRY)
_VTL_CALL, _VTL_RETURN = int(HypercallCode.VTL_CALL), int(HypercallCode.VTL_RETURN)


class Vtl(Design):
    """It has no state of its own: what holds is the monitor's, and ends with the board."""

    def watches(self, board: Board, processor: Processor) -> bool:
        return board.watches(processor)

    def intercepted(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        if not board.guest_code:
            return intercept(board, processor, exit_)
        if exit_.HasField("startup"):
            return startups.serve(board, processor, exit_)
        return secure_intercepts.deliver(board, processor, exit_)

    def leaf(self, board: Board, number: int) -> Leaf:
        return discovery.leaf(number, board.spec.vp_count, board.vtl.offered)

    def hypercall(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        request = decode_registers(exit_.registers)
        if request is None:
            return processor.resume(UNDEFINED_OPCODE)
        if request.value & 0xFFFF in (_VTL_CALL, _VTL_RETURN):
            return _switch(board, processor, exit_, request)
        result = HYPERCALLS.serve(board, processor, processor.vtl.active, exit_, request)
        if result is None:
            return processor.resume(_RETRY)
        if request.long_mode:
            return processor.resume(complete(result))
        halves = (
            register_update(registers_pb2.REGISTER_NAME_RAX, result & 0xFFFF_FFFF),
            register_update(registers_pb2.REGISTER_NAME_RDX, result >> 32),
        )
        return processor.resume(SKIP, halves)


def _switch(board: Board, processor: Processor, exit_: Exit, request: Request) -> Answer:
    """The value must be the bare code; other bits, and a return from VTL0, are #UD."""
    if request.value == _VTL_CALL:
        return (vtl_switch.call if board.guest_code else vtl_call)(board, processor, exit_, request.control)
    if request.value == _VTL_RETURN:
        return vtl_switch.return_(board, processor, exit_, request.control)
    return processor.resume(UNDEFINED_OPCODE)
