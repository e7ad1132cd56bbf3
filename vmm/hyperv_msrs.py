"""Synthetic MSRs of a level as a table: index -> what reads and writes of it do (TLFS; vtlab.hyperv.msrs).

Those of a processor are the core's (vtl0_guest.cpu.hyperv.msrs) and do not come here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.memory import WRITE, Memory
from vmm.vtl import VTL0, VpVtl
from vtlab.errors import VtlabError
from vtlab.hyperv.msrs import HYPERCALL_LOCKED, PAGE_ENABLE, PAGE_NUMBER_SHIFT, RESET_REQUEST, HvMsr
from vtlab.ram import PAGE_SIZE
from vtlab.v1.vcpu_pb2 import HypercallPage, Update


class GeneralProtectionError(Exception):
    """The access takes #GP(0)."""


class ResetRequestError(Exception):
    """The guest asked for a reset of the machine."""


@dataclass(slots=True)
class SyntheticMsrs:
    """Those of one level of a partition; what each VP has of its own is in VpVtl.

    Attributes:
        vtl: the level, with whose rights a page is placed.
        guest_os_id, hypercall: as the guest wrote them.
    """

    memory: Memory
    guest_os_id: int = 0
    hypercall: int = 0
    vtl: int = VTL0

    def read(self, index: int, vp_index: int, vp: VpVtl) -> int:
        """Raises GeneralProtectionError for an index that is not implemented."""
        row = _TABLE.get(index)
        if row is None:
            raise GeneralProtectionError
        return row[0](self, vp_index, vp)

    def write(self, index: int, value: int, vp: VpVtl) -> list[Update]:
        """What the guest must be told before it goes on.

        Raises:
            GeneralProtectionError: not implemented, read-only, or a value that is not legal.
            ResetRequestError: by the RESET MSR.
        """
        row = _TABLE.get(index)
        if row is None or row[1] is None:
            raise GeneralProtectionError
        return row[1](self, value, vp)


def _write_guest_os_id(msrs: SyntheticMsrs, value: int, _vp: VpVtl) -> list[Update]:
    msrs.guest_os_id = value
    if value or not msrs.hypercall & PAGE_ENABLE:
        return []
    msrs.hypercall &= ~PAGE_ENABLE
    return [Update(hypercall_page=HypercallPage(enabled=False, gfn=msrs.hypercall >> PAGE_NUMBER_SHIFT))]


def _write_hypercall(msrs: SyntheticMsrs, value: int, _vp: VpVtl) -> list[Update]:
    """The page covers what lies there, so it may only be put where VTL0 could have written."""
    if msrs.hypercall & HYPERCALL_LOCKED:
        raise GeneralProtectionError
    if not msrs.guest_os_id:
        value &= ~PAGE_ENABLE
    gfn = value >> PAGE_NUMBER_SHIFT
    if value & PAGE_ENABLE:
        try:
            msrs.memory.check(gfn * PAGE_SIZE, PAGE_SIZE, WRITE, msrs.vtl)
        except VtlabError:
            raise GeneralProtectionError from None
    msrs.hypercall = value
    return [Update(hypercall_page=HypercallPage(enabled=bool(value & PAGE_ENABLE), gfn=gfn))]


def _write_reset(_msrs: SyntheticMsrs, value: int, _vp: VpVtl) -> list[Update]:
    if value & RESET_REQUEST:
        raise ResetRequestError
    return []


_Read = Callable[[SyntheticMsrs, int, VpVtl], int]
_Write = Callable[[SyntheticMsrs, int, VpVtl], list[Update]]

# index -> (read, write); None: #GP.
_TABLE: dict[int, tuple[_Read, _Write | None]] = {
    HvMsr.GUEST_OS_ID: (lambda msrs, _index, _vp: msrs.guest_os_id, _write_guest_os_id),
    HvMsr.HYPERCALL: (lambda msrs, _index, _vp: msrs.hypercall, _write_hypercall),
    HvMsr.RESET: (lambda _msrs, _index, _vp: 0, _write_reset),
}
IMPLEMENTED = frozenset(_TABLE)
