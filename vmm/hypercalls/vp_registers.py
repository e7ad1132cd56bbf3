"""HvCallGetVpRegisters and HvCallSetVpRegisters: the registers of the VSM interface as a table.

A row says who may use it at which target level (conditions, in order), how to read it and how to write it. The
architectural registers of a level belong to the levels above it; from VTL0, which has none below, they are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmm.hypercalls.rules import first_objection, register_vtl
from vmm.hypercalls.table import Call, Reply
from vmm.processor_state import REGISTERS
from vmm.vtl import HIGHEST_VTL, VTL0, VTL1
from vtlab.hyperv.layouts import REGISTER_VALUE_SIZE, RegisterAssociation, VpHeader
from vtlab.hyperv.registers import MSR_OF_REGISTER, HvRegister
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import DEFAULT_MASK, PartitionConfig, code_page_offsets

_DENIED = HvStatus.ACCESS_DENIED
_CONFIG_BITS = DEFAULT_MASK | int(
    PartitionConfig.ENABLE_VTL_PROTECTION
    | PartitionConfig.ZERO_MEMORY_ON_RESET
    | PartitionConfig.DENY_LOWER_VTL_STARTUP
)


class Scope(NamedTuple):
    call: Call
    target: int


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


def _vp_status(scope: Scope) -> int:
    levels = scope.call.processor.vtl
    return levels.active | levels.enabled << 16


def _partition_status(scope: Scope) -> int:
    levels = scope.call.board.vtl
    return levels.enabled | HIGHEST_VTL << 16 | levels.mbec << 20


def _write_config(scope: Scope, value: int) -> HvStatus:
    """Protection cannot be turned off again, and the default mask is written once (openvmm)."""
    levels = scope.call.board.vtl
    changed = value ^ levels.config
    if value & ~_CONFIG_BITS or (levels.protections_enabled and changed & (DEFAULT_MASK | 1)):
        return HvStatus.INVALID_REGISTER_VALUE
    if value & 0b110 != 0b110:
        return HvStatus.INVALID_REGISTER_VALUE
    levels.config = value
    return HvStatus.SUCCESS


def _write_assist_page(scope: Scope, value: int) -> HvStatus:
    scope.call.processor.vtl.assist_page[scope.target] = value & 0xFFFF_FFFF_FFFF_FFFF
    return HvStatus.SUCCESS


_TABLE: dict[int, Row] = {
    HvRegister.VSM_CODE_PAGE_OFFSETS: Row(_needs_vsm, lambda _scope: code_page_offsets()),
    HvRegister.VSM_VP_STATUS: Row(_needs_vsm, _vp_status),
    HvRegister.VSM_PARTITION_STATUS: Row(_needs_vsm, _partition_status),
    HvRegister.VSM_CAPABILITIES: Row(_needs_vsm, lambda _scope: 0),
    HvRegister.VSM_PARTITION_CONFIG: Row(_vtl1_config, lambda scope: scope.call.board.vtl.config, _write_config),
    HvRegister.VSM_VP_SECURE_CONFIG_VTL0: Row(_from_above, lambda scope: scope.call.processor.vtl.secure_config),
    HvRegister.GUEST_OS_ID: Row(_anyone, lambda scope: scope.call.board.msrs.guest_os_id),
    HvRegister.VP_ASSIST_PAGE: Row(
        _anyone, lambda scope: scope.call.processor.vtl.assist_page[scope.target], _write_assist_page
    ),
}


def _find(scope: Scope, name: int) -> Row | HvStatus:
    row = _TABLE.get(name)
    if row is not None:
        return row.objection(scope) or row
    if name in REGISTERS or name in MSR_OF_REGISTER:
        return _DENIED  # of its own level, or of one above: only VTL0's, and only from VTL1
    return HvStatus.INVALID_PARAMETER


def get_vp_registers(call: Call) -> Reply:
    """Reads until the first name that is refused; `reps` tells how far it came."""
    header = VpHeader.decode(call.header)
    status = first_objection(call.profile.get_vp_registers, call.facts(), header)
    if status:
        return Reply(status)
    scope = Scope(call, register_vtl(call.facts(), header))
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
    status = first_objection(call.profile.set_vp_registers, call.facts(), header)
    if status:
        return Reply(status)
    scope = Scope(call, register_vtl(call.facts(), header))
    for done, element in enumerate(call.elements):
        name, value = RegisterAssociation.decode(element)
        row = _find(scope, name)
        if isinstance(row, HvStatus):
            return Reply(row, reps=done)
        status = row.write(scope, value) if row.write else HvStatus.INVALID_PARAMETER
        if status:
            return Reply(status, reps=done)
    return Reply(HvStatus.SUCCESS, reps=len(call.elements))
