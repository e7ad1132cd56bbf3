"""KVM_HC_PROTECT_MEMORY of Heki v2: a chain of pages that list rights of other pages.

    struct heki_page_list { u64 next, next_pa, npages; struct { u64 pa, epa, permissions; } pages[]; }

The whole chain is read and checked before anything changes; next_pa 0 ends it. Source: Venkataraman, Salaün, v2
20231113022326.24388-{1..20}@digikod.net, patches 11 and 12. EPT knows pages that are executed but not read; here READ
is needed for the other rights.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from vmm.board import Board
from vmm.designs.kvm_abi import KvmErrno
from vmm.memory import Memory
from vtlab.errors import VtlabError
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exception as GuestException
from vtlab.v1.vcpu_pb2 import Exit, PageAccess, ProtectionUpdate
from vtlab.x86.registers import Vector

PROTECT_MEMORY = 14
READ, WRITE, EXEC, IMMUTABLE = 1, 2, 4, 8
_ALL = READ | WRITE | EXEC | IMMUTABLE
_HEADER = struct.Struct("<3Q")
_ENTRY = struct.Struct("<3Q")
MAX_ENTRIES = (PAGE_SIZE - _HEADER.size) // _ENTRY.size
MAX_LISTS = 1024


class ListError(Exception):
    """Attributes: `number`: why the hypercall fails."""

    def __init__(self, number: KvmErrno) -> None:
        super().__init__(number)
        self.number = number


class Range(NamedTuple):
    """Pages [first, end) and their permissions."""

    first: int
    end: int
    permissions: int


def read_lists(memory: Memory, gpa: int) -> Iterator[Range]:
    """All ranges of the chain, with the guest's own rights. Raises ListError."""
    for _ in range(MAX_LISTS):
        try:
            page = memory.read(gpa, PAGE_SIZE)
        except VtlabError:
            raise ListError(KvmErrno.FAULT) from None
        _, following, count = _HEADER.unpack_from(page)
        if count > MAX_ENTRIES:
            raise ListError(KvmErrno.E2BIG)
        for number in range(count):
            start, end, permissions = _ENTRY.unpack_from(page, _HEADER.size + number * _ENTRY.size)
            yield _range(start, end, permissions, memory.size)
        if not following:
            return
        gpa = following
    raise ListError(KvmErrno.E2BIG)


def _range(start: int, end: int, permissions: int, size: int) -> Range:
    bad_rights = not permissions or permissions & ~_ALL or (permissions & (WRITE | EXEC) and not permissions & READ)
    if bad_rights or start % PAGE_SIZE or end % PAGE_SIZE or not start < end <= size:
        raise ListError(KvmErrno.INVAL)
    return Range(start // PAGE_SIZE, end // PAGE_SIZE, permissions)


class PagePermissions:
    """Attributes: `immutable`: pages whose permissions stay."""

    def __init__(self, mbec: bool) -> None:
        self._mbec = mbec
        self.immutable: list[Range] = []

    def forget(self) -> None:
        self.immutable.clear()

    def protect(self, board: Board, gpa: int) -> int:
        """Serves the hypercall; 0 or a negative errno, with nothing changed."""
        try:
            wanted = list(read_lists(board.memory, gpa))
        except ListError as error:
            return -error.number
        if any(one.first < kept.end and kept.first < one.end for one in wanted for kept in self.immutable):
            return -KvmErrno.PERM
        board.protect([self._update(one) for one in wanted])
        self.immutable += [one for one in wanted if one.permissions & IMMUTABLE]
        return 0

    def _update(self, one: Range) -> ProtectionUpdate:
        write = bool(one.permissions & WRITE)
        execute = bool(one.permissions & EXEC) or not self._mbec
        return ProtectionUpdate(
            runs=[one.first, one.end - one.first],
            access=PageAccess(
                read=bool(one.permissions & READ), write=write, kernel_execute=execute, user_execute=True
            ),
            store=vcpu_pb2.PAGE_STORE_WRITABLE if write else vcpu_pb2.PAGE_STORE_SEALED,
        )


def page_fault(exit_: Exit) -> GuestException | None:
    """The #PF that the guest takes for a violation; None where the guest's own table walk broke the rule."""
    fault = exit_.memory_fault
    if not fault.HasField("gva"):
        return None
    error = 1  # present
    error |= (fault.access == vcpu_pb2.ACCESS_KIND_WRITE) << 1
    error |= (exit_.registers.cpl == 3) << 2
    error |= (fault.access == vcpu_pb2.ACCESS_KIND_EXECUTE) << 4
    return GuestException(vector=Vector.PF, error_code=error, address=fault.gva)
