"""What passes between the levels of a vCPU where both run guest code (TLFS, "Virtual Secure Mode", private state).

Shared: the general registers but RSP, CR2, x87 and SSE, DR0-DR3, XCR0. All else is each level's own.
"""

from __future__ import annotations

import struct

from vtl0_guest.cpu import msrs
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.control import XCR0_DEFINED
from vtl0_guest.cpu.environment import Gpr
from vtl0_guest.cpu.faults import NestedFault
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.hyperv.layouts import ASSIST_ENTRY_REASON_OFFSET, ASSIST_RETURN_RAX_OFFSET
from vtlab.hyperv.msrs import PAGE_ENABLE, HvMsr
from vtlab.v1 import registers_pb2, vcpu_pb2

_SHARED_GPRS = tuple(number for number in Gpr if number != Gpr.RSP)
_SHARED_DEBUG = 4  # DR0-DR3
_FAST = 1 << 16
_FAST_VECTORS = 6
_PAIR = struct.Struct("<QQ")


def assist_page(context: Context) -> int | None:
    """Guest-physical address of this level's VP assist page, or None while it is off."""
    if not msrs.modelled(context, HvMsr.VP_ASSIST_PAGE):
        return None
    value = msrs.read(context, HvMsr.VP_ASSIST_PAGE)
    return value & ~0xFFF if value & PAGE_ENABLE else None


def describe_hypercall(context: Context) -> vcpu_pb2.Hypercall:
    """What a hypercall exit carries beside the registers."""
    environment = context.environment
    message = vcpu_pb2.Hypercall()
    value = environment.words[Gpr.RCX if environment.bitness == 64 else Gpr.RAX]
    if value & _FAST:
        message.xmm = context.engine.vectors.vectors(_FAST_VECTORS)
    if value & 0xFFFF == HypercallCode.VTL_RETURN and context.vtl:
        page = assist_page(context)
        if page is not None:
            message.return_rax, message.return_rcx = _read_pair(context, page + ASSIST_RETURN_RAX_OFFSET)
        message.interrupt_pending = context.platform.pending_vector(context.vp_index) is not None
    return message


def _read_pair(context: Context, gpa: int) -> tuple[int, int]:
    try:
        first, second = _PAIR.unpack(context.memory.physical.read(gpa, _PAIR.size))
    except NestedFault:
        return 0, 0  # the guest enabled a page that is no memory
    return first, second


def note_entry(context: Context, reason: int, registers: registers_pb2.Registers) -> None:
    """Tells this level why it is entered: entry reason, RAX and RCX of the lower one, in its VP assist page."""
    page = assist_page(context)
    if page is None:
        return
    physical = context.memory.physical
    try:
        physical.write(page + ASSIST_ENTRY_REASON_OFFSET, reason.to_bytes(4, "little"))
        physical.write(page + ASSIST_RETURN_RAX_OFFSET, _PAIR.pack(registers.rax, registers.rcx))
    except NestedFault:
        return


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
