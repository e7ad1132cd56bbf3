"""From HV_MAP_GPA_FLAGS to rights and store of pages."""

from __future__ import annotations

from itertools import groupby

from vmm.hypercalls import observed
from vmm.hypercalls.table import Call
from vmm.memory import objection, rights_of
from vtlab.errors import VtlabError
from vtlab.hyperv.profiles import ExecuteBits
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import MapGpaFlags
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import PageAccess, ProtectionUpdate

_EXECUTE = MapGpaFlags.KERNEL_EXECUTABLE | MapGpaFlags.USER_EXECUTABLE


def page_access(flags: int, *, mbec: bool, execute_bits: ExecuteBits) -> PageAccess:
    """Rights by flags that are legal (vmm.hypercalls.rules.legal_map_flags)."""
    kernel, user = bool(flags & MapGpaFlags.KERNEL_EXECUTABLE), bool(flags & MapGpaFlags.USER_EXECUTABLE)
    if not mbec and execute_bits is ExecuteBits.EITHER:
        kernel = user = bool(flags & _EXECUTE)
    return PageAccess(
        read=bool(flags & MapGpaFlags.READABLE),
        write=bool(flags & MapGpaFlags.WRITABLE),
        kernel_execute=kernel,
        user_execute=user,
    )


def protect(call: Call, pages: list[int], flags: int) -> HvStatus:
    """Gives pages of RAM those rights. INVALID_PARAMETER if it cannot be done, ACCESS_DENIED if a policy forbids it."""
    return _protect(call, runs_of(pages), flags)


def protect_all(call: Call, flags: int) -> HvStatus:
    """The default mask: all of RAM has those rights."""
    if not call.board.guest_code:
        return HvStatus.SUCCESS  # a policy names its own default
    return _protect(call, [0, call.board.memory.pages], flags)


def _protect(call: Call, runs: list[int], flags: int) -> HvStatus:
    board = call.board
    access = page_access(flags, mbec=board.vtl.has_mbec, execute_bits=board.profile.execute_bits)
    if access.write:
        store = vcpu_pb2.PAGE_STORE_WRITABLE
    elif access.read:
        store = vcpu_pb2.PAGE_STORE_SEALED
    else:
        store = vcpu_pb2.PAGE_STORE_PRIVATE
    assert objection(0, rights_of(access)) is None
    update = ProtectionUpdate(runs=runs, access=access, store=store)
    if not observed.may_protect(call, update):
        return HvStatus.ACCESS_DENIED
    try:
        board.protect([update], reveal=True)
    except VtlabError:
        return HvStatus.INVALID_PARAMETER
    return HvStatus.SUCCESS


def runs_of(pages: list[int]) -> list[int]:
    """Pairs of first page and length, in the order given."""
    runs: list[int] = []
    for _, group in groupby(enumerate(pages), lambda item: item[1] - item[0]):
        members = [page for _, page in group]
        runs += [members[0], len(members)]
    return runs
