"""What passes between the levels of a vCPU where both run guest code (TLFS, "Virtual Secure Mode", private state).

Shared: the general registers but RSP, CR2, x87 and SSE, DR0-DR3, XCR0. All else is each level's own.
"""

from __future__ import annotations

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.control import XCR0_DEFINED
from vtl0_guest.cpu.environment import Gpr
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.v1 import registers_pb2, vcpu_pb2

_SHARED_GPRS = tuple(number for number in Gpr if number != Gpr.RSP)
_SHARED_DEBUG = 4  # DR0-DR3
_RAX, _RCX = int(Gpr.RAX), int(Gpr.RCX)
_VTL_RETURN = int(HypercallCode.VTL_RETURN)
_FAST = 1 << 16
_FAST_VECTORS = 6
_HYPERCALL = vcpu_pb2.Exit(hypercall=vcpu_pb2.Hypercall())  # one without anything: nearly all


def describe_hypercall(context: Context) -> vcpu_pb2.Exit:
    """The exit of a hypercall, with what it carries beside the registers. Nobody may change it."""
    environment = context.environment
    value = environment.words[_RCX if environment.bitness == 64 else _RAX]
    returns = context.vtl and value & 0xFFFF == _VTL_RETURN
    if not (value & _FAST or returns):
        return _HYPERCALL
    message = vcpu_pb2.Hypercall()
    if value & _FAST:
        message.xmm = context.engine.vectors.vectors(_FAST_VECTORS)
    if returns:
        message.return_rax, message.return_rcx = context.hyperv.assist.return_registers()
        message.interrupt_pending = context.platform.pending_vector(context.vp_index) is not None
    return vcpu_pb2.Exit(hypercall=message)


def save_shared(context: Context) -> registers_pb2.SharedState:
    engine = context.engine
    return registers_pb2.SharedState(
        fxsave=engine.vectors.save(), debug=context.debug[:_SHARED_DEBUG], xcr0=engine.xcr0
    )


def load_shared(context: Context, registers: registers_pb2.Registers, shared: registers_pb2.SharedState | None) -> None:
    """Takes over what the other level left. An image of another size than FXSAVE's is ignored."""
    environment = context.environment
    for number in _SHARED_GPRS:
        environment.set_gpr(number, getattr(registers, number.name.lower()))
    environment.set_cr2(registers.cr2)
    if shared is None:
        return
    if len(shared.fxsave) == 512:
        context.engine.vectors.load(shared.fxsave)
    context.debug[: len(shared.debug[:_SHARED_DEBUG])] = shared.debug[:_SHARED_DEBUG]
    context.engine.xcr0 = shared.xcr0 & XCR0_DEFINED | 1
