"""HvCallGetVpRegisters and HvCallSetVpRegisters: the registers of the VSM interface as a table.

A row says who may use it at which target level (conditions, in order), how to read it and how to write it. The
architectural registers of a level belong to the levels above it; a profile may let a level name its own as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmm import vina
from vmm.hypercalls import architectural, pending_event
from vmm.hypercalls.cr_intercepts import CONTROL_BITS, apply_intercepts
from vmm.hypercalls.protection import protect_all
from vmm.hypercalls.rules import first_objection, legal_map_flags, register_vtl, resolve_vp
from vmm.hypercalls.table import Call, Reply
from vmm.processor import Processor
from vmm.vtl import HIGHEST_VTL, VTL0, VTL1
from vtlab.hyperv.layouts import REGISTER_VALUE_SIZE, RegisterAssociation, VpHeader
from vtlab.hyperv.registers import HvRegister
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.synic import FIRST_VECTOR
from vtlab.hyperv.vsm import (
    DEFAULT_MASK,
    DEFAULT_MASK_SHIFT,
    Capabilities,
    MapGpaFlags,
    PartitionConfig,
    SecureConfig,
    capabilities,
    code_page_offsets,
)
from vtlab.v1.vcpu_pb2 import ExecuteControl, PendingEvent, Update

# What a row of the table, or of the architectural registers, can refuse with.
GET_FAILS = (
    HvStatus.ACCESS_DENIED,
    HvStatus.INVALID_PARAMETER,
    HvStatus.INVALID_VTL_STATE,
)
SET_FAILS = (*GET_FAILS, HvStatus.INVALID_REGISTER_VALUE)
_DENIED = HvStatus.ACCESS_DENIED
_BAD_VALUE = HvStatus.INVALID_REGISTER_VALUE
_WORD = (1 << 64) - 1
_ENABLE = int(PartitionConfig.ENABLE_VTL_PROTECTION)
_CONFIG_BITS = DEFAULT_MASK | int(
    PartitionConfig.ENABLE_VTL_PROTECTION
    | PartitionConfig.ZERO_MEMORY_ON_RESET
    | PartitionConfig.DENY_LOWER_VTL_STARTUP
)
_SECURE_BITS = int(SecureConfig.MBEC | SecureConfig.TLB_LOCKED)
_VINA_BITS = 0x7FF
_MBEC_OF_VTL1 = 1 << VTL1


class Scope(NamedTuple):
    """A register access: the call, the level that it is about, and whose vCPU."""

    call: Call
    target: int
    processor: Processor


class Row(NamedTuple):
    """`objection` gives the status that forbids the access at all; `write` gives the status of a value."""

    objection: Callable[[Scope], HvStatus]
    read: Callable[[Scope], int]
    write: Callable[[Scope, int], HvStatus] | None = None


def _anyone(_scope: Scope) -> HvStatus:
    return HvStatus.SUCCESS


def _needs_vsm(scope: Scope) -> HvStatus:
    return HvStatus.SUCCESS if scope.call.board.vtl.offered else _DENIED


def _vtl1_config(scope: Scope) -> HvStatus:
    if scope.target != VTL1:
        return HvStatus.INVALID_PARAMETER
    return HvStatus.SUCCESS if scope.call.board.vtl.has(VTL1) else HvStatus.INVALID_VTL_STATE


def _from_above(scope: Scope) -> HvStatus:
    return HvStatus.SUCCESS if scope.call.vtl > VTL0 else _DENIED


def _above_vtl0(scope: Scope) -> HvStatus:
    return HvStatus.SUCCESS if scope.target > VTL0 else HvStatus.INVALID_PARAMETER


def _cr_intercept(scope: Scope) -> HvStatus:
    if scope.target != VTL1:
        return _DENIED
    return HvStatus.SUCCESS if scope.processor.vtl.has(VTL1) else HvStatus.INVALID_VTL_STATE


def _below_caller(scope: Scope) -> HvStatus:
    return HvStatus.SUCCESS if scope.target < scope.call.vtl else HvStatus.INVALID_PARAMETER


def _vp_status(scope: Scope) -> int:
    levels = scope.processor.vtl
    mbec = levels.active == VTL0 and bool(levels.secure_config & SecureConfig.MBEC)
    return levels.active | mbec << 4 | levels.enabled << 16


def _partition_status(scope: Scope) -> int:
    levels = scope.call.board.vtl
    return levels.enabled | HIGHEST_VTL << 16 | levels.mbec << 20


def _capabilities(scope: Scope) -> int:
    found = Capabilities.DENY_LOWER_VTL_STARTUP
    return capabilities(found, _MBEC_OF_VTL1, from_top=scope.call.profile.capabilities_from_top)


def _write_config(scope: Scope, value: int) -> HvStatus:
    """Protection cannot be turned off again, and the default mask is written once; it holds from then on."""
    call = scope.call
    levels, profile = call.board.vtl, call.profile
    if value & ~_CONFIG_BITS:
        return _BAD_VALUE
    if levels.protections_enabled:
        frozen = DEFAULT_MASK | _ENABLE
        if (value ^ levels.config) & frozen:
            if profile.config_change:
                return profile.config_change
            value = value & ~frozen | levels.config & frozen
        levels.config = value
        return HvStatus.SUCCESS
    mask = (value & DEFAULT_MASK) >> DEFAULT_MASK_SHIFT
    full = MapGpaFlags.READABLE | MapGpaFlags.WRITABLE
    legal = legal_map_flags(mask, mbec=levels.has_mbec, execute_bits=profile.execute_bits)
    if mask & full != full or not legal:
        return _BAD_VALUE
    status = protect_all(call, mask) if value & _ENABLE else HvStatus.SUCCESS
    if not status:
        levels.config = value
    return status


def _write_secure_config(scope: Scope, value: int) -> HvStatus:
    """MBEC follows the partition; the lock of VTL0's translations holds until it is cleared or VTL1 returns."""
    mbec = bool(value & SecureConfig.MBEC)
    partition = scope.call.board.vtl.has_mbec
    if value & ~_SECURE_BITS or (mbec and not partition):
        return _BAD_VALUE
    if partition and not mbec and scope.call.profile.vp_without_mbec:
        return scope.call.profile.vp_without_mbec
    levels, board = scope.processor.vtl, scope.call.board
    if board.guest_code and (value ^ levels.secure_config) & SecureConfig.MBEC:
        control = Update(execute_control=ExecuteControl(kernel_right_alone=not mbec))
        with board.gate.none_inside():
            scope.processor.post(control)
    levels.secure_config = value
    board.gate.changed()
    return HvStatus.SUCCESS


def _write_vina(scope: Scope, value: int) -> HvStatus:
    """A vector below 16 is no interrupt's."""
    if value & ~_VINA_BITS or (value & vina.ENABLE and value & vina.VECTOR < FIRST_VECTOR):
        return _BAD_VALUE
    if value & vina.ENABLE and not any(processor.vtl.vina & vina.ENABLE for processor in scope.call.board.processors):
        vina.listen(scope.call.board)
    scope.processor.vtl.vina = value
    return HvStatus.SUCCESS


def _write_event(scope: Scope, value: int) -> HvStatus:
    try:
        exception = pending_event.decode(value)
    except pending_event.IllegalEvent:
        return _BAD_VALUE
    if exception is not None:
        scope.processor.post(Update(event=PendingEvent(exception=exception)), vtl=scope.target)
        scope.call.board.gate.wake(scope.processor.index, scope.target)
    return HvStatus.SUCCESS


def _cr_row(name: int, bits: int) -> Row:
    def write(scope: Scope, value: int) -> HvStatus:
        if value & ~bits:
            return _BAD_VALUE
        scope.processor.vtl.cr_intercepts[name] = value
        apply_intercepts(scope.processor)
        return HvStatus.SUCCESS

    return Row(_cr_intercept, lambda scope: scope.processor.vtl.cr_intercepts.get(name, 0), write)


def _write_nothing(_scope: Scope, _value: int) -> HvStatus:
    return HvStatus.SUCCESS


_N = HvRegister
_TABLE: dict[int, Row] = {
    _N.VSM_CODE_PAGE_OFFSETS: Row(_needs_vsm, lambda _scope: code_page_offsets()),
    _N.VSM_VP_STATUS: Row(_needs_vsm, _vp_status),
    _N.VSM_PARTITION_STATUS: Row(_needs_vsm, _partition_status),
    _N.VSM_CAPABILITIES: Row(_needs_vsm, _capabilities),
    _N.VSM_PARTITION_CONFIG: Row(_vtl1_config, lambda scope: scope.call.board.vtl.config, _write_config),
    _N.VSM_VP_SECURE_CONFIG_VTL0: Row(
        _from_above, lambda scope: scope.processor.vtl.secure_config, _write_secure_config
    ),
    _N.VSM_VP_WAIT_FOR_TLB_LOCK: Row(_from_above, lambda _scope: 0, _write_nothing),
    _N.VSM_VINA: Row(_above_vtl0, lambda scope: scope.processor.vtl.vina, _write_vina),
    _N.CR_INTERCEPT_CONTROL: _cr_row(_N.CR_INTERCEPT_CONTROL, CONTROL_BITS),
    _N.CR_INTERCEPT_CR0_MASK: _cr_row(_N.CR_INTERCEPT_CR0_MASK, _WORD),
    _N.CR_INTERCEPT_CR4_MASK: _cr_row(_N.CR_INTERCEPT_CR4_MASK, _WORD),
    _N.CR_INTERCEPT_MISC_ENABLE_MASK: _cr_row(_N.CR_INTERCEPT_MISC_ENABLE_MASK, _WORD),
    _N.PENDING_EVENT0: Row(_below_caller, lambda _scope: 0, _write_event),
    _N.GUEST_OS_ID: Row(_anyone, lambda scope: scope.call.board.msrs_of(scope.target).guest_os_id),
    _N.HYPERCALL: Row(_anyone, lambda scope: scope.call.board.msrs_of(scope.target).hypercall),
}


def _architectural(name: int) -> Row | HvStatus:
    if not architectural.known(name):
        return HvStatus.INVALID_PARAMETER
    return Row(
        lambda scope: architectural.objection(scope.call, scope.processor, scope.target, name),
        lambda scope: architectural.read(scope.call, scope.processor, scope.target, name),
        lambda scope, value: architectural.write(scope.call, scope.processor, scope.target, name, value),
    )


def _find(scope: Scope, name: int) -> Row | HvStatus:
    row = _TABLE.get(name) or _architectural(name)
    return row if isinstance(row, HvStatus) else row.objection(scope) or row


def _scope(call: Call, header: VpHeader) -> Scope:
    facts = call.facts()
    return Scope(call, register_vtl(facts, header), call.board.processors[resolve_vp(facts, header.vp_index)])


def get_vp_registers(call: Call) -> Reply:
    """Reads until the first name that is refused; `reps` tells how far it came."""
    header = VpHeader.decode(call.header)
    status = first_objection(call.rules.get_vp_registers, call.facts(), header)
    if status:
        return Reply(status)
    scope = _scope(call, header)
    output = bytearray()
    for done, element in enumerate(call.elements):
        row = _find(scope, int.from_bytes(element, "little"))
        if isinstance(row, HvStatus):
            return Reply(row, bytes(output), done)
        output += row.read(scope).to_bytes(REGISTER_VALUE_SIZE, "little")
    return Reply(HvStatus.SUCCESS, bytes(output), len(call.elements))


def set_vp_registers(call: Call) -> Reply:
    """Writes until the first that is refused."""
    header = VpHeader.decode(call.header)
    status = first_objection(call.rules.set_vp_registers, call.facts(), header)
    if status:
        return Reply(status)
    scope = _scope(call, header)
    for done, element in enumerate(call.elements):
        name, value = RegisterAssociation.decode(element)
        row = _find(scope, name)
        if isinstance(row, HvStatus):
            return Reply(row, reps=done)
        status = row.write(scope, value) if row.write else HvStatus.INVALID_PARAMETER
        if status:
            return Reply(status, reps=done)
    return Reply(HvStatus.SUCCESS, reps=len(call.elements))
