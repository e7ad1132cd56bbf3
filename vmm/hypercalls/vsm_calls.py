"""The VSM hypercalls: EnablePartitionVtl, EnableVpVtl, ModifyVtlProtectionMask (TLFS, "Virtual Secure Mode")."""

from __future__ import annotations

from itertools import groupby

from vmm.board import Board
from vmm.hypercalls.rules import first_objection, resolve_vp
from vmm.hypercalls.table import Call, Reply
from vmm.memory import objection, rights_of
from vmm.vtl import VTL1
from vmm.vtl1 import enable_vtl1
from vtlab.errors import VtlabError
from vtlab.hyperv.layouts import (
    INITIAL_VP_CONTEXT_SIZE,
    VP_HEADER_SIZE,
    EnablePartitionVtlInput,
    ModifyProtectionHeader,
    VpHeader,
    decode_initial_vp_context,
)
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import EnablePartitionVtlFlags, MapGpaFlags
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import PageAccess, ProtectionUpdate

ENABLE_VP_VTL_SIZE = VP_HEADER_SIZE + INITIAL_VP_CONTEXT_SIZE


def enable_partition_vtl(call: Call) -> Reply:
    """HvCallEnablePartitionVtl: VTL1 may be enabled on VPs from now on."""
    request = EnablePartitionVtlInput.decode(call.header)
    status = first_objection(call.profile.enable_partition_vtl, call.facts(), request)
    if status:
        return Reply(status)
    levels = call.board.vtl
    levels.enabled |= 1 << VTL1
    if request.flags & EnablePartitionVtlFlags.MBEC:
        levels.mbec |= 1 << VTL1
    call.board.log_vtl(call.processor, call.vtl, "enable-partition", request.vtl)
    return Reply(HvStatus.SUCCESS)


def enable_vp_vtl(call: Call) -> Reply:
    """HvCallEnableVpVtl: VTL1 comes to life on a VP; the monitor may refuse."""
    request = VpHeader.decode(call.header[:VP_HEADER_SIZE])
    facts = call.facts()
    status = first_objection(call.profile.enable_vp_vtl, facts, request)
    if status:
        return Reply(status)
    target = call.board.processors[resolve_vp(facts, request.vp_index)]
    registers, pat = decode_initial_vp_context(call.header[VP_HEADER_SIZE:])
    if not enable_vtl1(call.board, target, call.exit, registers, pat):
        return Reply(HvStatus.ACCESS_DENIED)
    return Reply(HvStatus.SUCCESS)


def modify_vtl_protection_mask(call: Call) -> Reply:
    """HvCallModifyVtlProtectionMask: what VTL0 may do with pages. From VTL0 itself it is always refused."""
    header = ModifyProtectionHeader.decode(call.header)
    status = first_objection(call.profile.modify_vtl_protection_mask, call.facts(), header)
    if status:
        return Reply(status)
    pages = [int.from_bytes(element, "little") for element in call.elements]
    good = next((count for count, page in enumerate(pages) if page >= call.board.memory.pages), len(pages))
    if good and not _protect(call.board, pages[:good], header.map_flags):
        return Reply(HvStatus.INVALID_PARAMETER)
    return Reply(HvStatus.SUCCESS if good == len(pages) else HvStatus.INVALID_PARAMETER, reps=good)


def _protect(board: Board, pages: list[int], flags: int) -> bool:
    access = PageAccess(
        read=bool(flags & MapGpaFlags.READABLE),
        write=bool(flags & MapGpaFlags.WRITABLE),
        kernel_execute=bool(flags & MapGpaFlags.KERNEL_EXECUTABLE),
        user_execute=bool(flags & MapGpaFlags.USER_EXECUTABLE),
    )
    if access.write:
        store = vcpu_pb2.PAGE_STORE_WRITABLE
    elif access.read:
        store = vcpu_pb2.PAGE_STORE_SEALED
    else:
        store = vcpu_pb2.PAGE_STORE_PRIVATE
    assert objection(0, rights_of(access)) is None
    update = ProtectionUpdate(runs=runs_of(pages), access=access, store=store)
    try:
        board.protect([update], reveal=True)
    except VtlabError:
        return False
    return True


def runs_of(pages: list[int]) -> list[int]:
    """Pairs of first page and length, in the order given."""
    runs: list[int] = []
    for _, group in groupby(enumerate(pages), lambda item: item[1] - item[0]):
        members = [page for _, page in group]
        runs += [members[0], len(members)]
    return runs
