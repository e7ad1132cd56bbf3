"""The VSM hypercalls that bring levels to life and protect pages (TLFS, "Virtual Secure Mode")."""

from __future__ import annotations

from vmm.hypercalls.cr_intercepts import apply_intercepts
from vmm.hypercalls.protection import protect
from vmm.hypercalls.rules import first_objection, resolve_vp
from vmm.hypercalls.table import Call, Reply
from vmm.processor import Processor
from vmm.processor_state import initial_state
from vmm.vtl import VTL1
from vmm.vtl1 import enable_vtl1, judged
from vtlab.hyperv.hypercalls import PARTITION_SELF, decode_input_vtl
from vtlab.hyperv.layouts import (
    INITIAL_VP_CONTEXT_SIZE,
    VP_HEADER_SIZE,
    EnablePartitionVtlInput,
    ModifyProtectionHeader,
    VpHeader,
    decode_initial_vp_context,
)
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import EnablePartitionVtlFlags
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import ExecuteControl, Exit, StartProcessor, Startup, Update

ENABLE_VP_VTL_SIZE = VP_HEADER_SIZE + INITIAL_VP_CONTEXT_SIZE
APIC_ID_HEADER_SIZE = 16
APIC_ID_FAILS = (HvStatus.INVALID_PARTITION_ID, HvStatus.INVALID_PARAMETER, HvStatus.ACCESS_DENIED)


def enable_partition_vtl(call: Call) -> Reply:
    """HvCallEnablePartitionVtl: VTL1 may be enabled on VPs from now on."""
    request = EnablePartitionVtlInput.decode(call.header)
    status = first_objection(call.rules.enable_partition_vtl, call.facts(), request)
    if status:
        return Reply(status)
    levels = call.board.vtl
    levels.enabled |= 1 << VTL1
    if request.flags & EnablePartitionVtlFlags.MBEC:
        levels.mbec |= 1 << VTL1
        if call.board.guest_code:  # off on every VP until VTL1 turns it on; a policy has it on
            call.board.post_all(Update(execute_control=ExecuteControl(kernel_right_alone=True)))
    if call.board.guest_code:
        for processor in call.board.processors:
            apply_intercepts(processor)
            call.board.gate.kick(processor.index)
    call.board.log_vtl(call.processor, call.vtl, "enable-partition", request.vtl)
    return Reply(HvStatus.SUCCESS)


def enable_vp_vtl(call: Call) -> Reply:
    """HvCallEnableVpVtl: VTL1 comes to life on a VP; the monitor may refuse."""
    request = VpHeader.decode(call.header[:VP_HEADER_SIZE])
    facts = call.facts()
    status = first_objection(call.rules.enable_vp_vtl, facts, request)
    if status:
        return Reply(status)
    target = call.board.processors[resolve_vp(facts, request.vp_index)]
    registers, pat = decode_initial_vp_context(call.header[VP_HEADER_SIZE:])
    if call.board.guest_code:
        target.vtl.enabled |= 1 << VTL1
        _start(target, VTL1, call.header[VP_HEADER_SIZE:])
        call.board.log_vtl(target, call.vtl, "enable-vp", VTL1)
        return Reply(HvStatus.SUCCESS)
    if not enable_vtl1(call.board, target, call.exit, registers, pat):
        return Reply(HvStatus.ACCESS_DENIED)
    return Reply(HvStatus.SUCCESS)


def _start(target: Processor, vtl: int, context: bytes) -> None:
    """What that level starts with on its first entry."""
    registers, pat = decode_initial_vp_context(context)
    target.post(Update(start_processor=StartProcessor(state=initial_state(registers, pat))), vtl=vtl)


def _may_start(call: Call, target: Processor, context: bytes) -> bool:
    """Whether a policy at VTL1 that judges startups lets the VP begin with that context."""
    board = call.board
    if board.guest_code or not board.watches(call.processor) or not call.processor.watched.filter.startups:
        return True
    registers, pat = decode_initial_vp_context(context)
    startup = Startup(
        target_vp=target.index,
        kind=vcpu_pb2.STARTUP_KIND_CONTEXT,
        context=initial_state(registers, pat),
        target_parked=not target.vtl.started,
    )
    exit_ = Exit(vp_index=call.processor.index, vtl=call.vtl, origin=vcpu_pb2.ORIGIN_VCPU, startup=startup)
    exit_.registers.CopyFrom(call.exit.registers)
    return judged(board, call.processor, exit_, call.exit).action == vcpu_pb2.ACTION_COMMIT


def start_virtual_processor(call: Call) -> Reply:
    """HvCallStartVirtualProcessor: a VP that was never started begins in its highest level.

    The context is for the level that is named; another one has that of HvCallEnableVpVtl.
    """
    request = VpHeader.decode(call.header[:VP_HEADER_SIZE])
    facts = call.facts()
    status = first_objection(call.rules.start_virtual_processor, facts, request)
    if status:
        return Reply(status)
    target = call.board.processors[resolve_vp(facts, request.vp_index)]
    if not _may_start(call, target, call.header[VP_HEADER_SIZE:]):
        return Reply(HvStatus.ACCESS_DENIED)
    target.vtl.started = True
    _start(target, request.vtl, call.header[VP_HEADER_SIZE:])
    if call.board.guest_code and target.vtl.has(VTL1):
        target.vtl.starts_above = True
        call.board.gate.interrupt(target.index)
    else:
        call.board.gate.kick(target.index)
    return Reply(HvStatus.SUCCESS)


def get_vp_index_from_apic_id(call: Call) -> Reply:
    """HvCallGetVpIndexFromApicId: both are the same here. partition u64@0, HV_INPUT_VTL u8@8, reserved 7; ids u32."""
    partition, target = int.from_bytes(call.header[:8], "little"), decode_input_vtl(call.header[8])
    if partition != PARTITION_SELF:
        return Reply(HvStatus.INVALID_PARTITION_ID)
    if target.reserved:
        return Reply(HvStatus.INVALID_PARAMETER)
    if target.explicit and target.vtl > call.vtl:
        return Reply(HvStatus.ACCESS_DENIED)
    count = len(call.board.processors)
    good = next((n for n, raw in enumerate(call.elements) if int.from_bytes(raw, "little") >= count), None)
    output = b"".join(call.elements[:good])
    status = HvStatus.SUCCESS if good is None else HvStatus.INVALID_PARAMETER
    return Reply(status, output, len(call.elements) if good is None else good)


def modify_vtl_protection_mask(call: Call) -> Reply:
    """HvCallModifyVtlProtectionMask: what VTL0 may do with pages. From VTL0 itself it is always refused."""
    header = ModifyProtectionHeader.decode(call.header)
    status = first_objection(call.rules.modify_vtl_protection_mask, call.facts(), header)
    if status:
        return Reply(status)
    pages = [int.from_bytes(element, "little") for element in call.elements]
    good = next((count for count, page in enumerate(pages) if page >= call.board.memory.pages), len(pages))
    status = protect(call, pages[:good], header.map_flags) if good else HvStatus.SUCCESS
    if status:
        return Reply(status)
    return Reply(HvStatus.SUCCESS if good == len(pages) else HvStatus.INVALID_PARAMETER, reps=good)
