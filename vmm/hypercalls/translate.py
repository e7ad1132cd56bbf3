"""HvCallTranslateVirtualAddress and its extended form: a walk of a level's own page tables.

The rights that VTL1 left VTL0 come on top. A walk that fails is a success of the call with a result code (TLFS,
"Hypercall Reference").
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from vmm.hypercalls import architectural
from vmm.hypercalls.rules import first_objection, translate_vtl
from vmm.hypercalls.table import Call, Reply
from vmm.memory import READ
from vmm.vtl import VTL0
from vtlab.errors import VtlabError
from vtlab.hyperv.layouts import TranslateInput
from vtlab.hyperv.msrs import PAGE_ENABLE, PAGE_NUMBER_SHIFT
from vtlab.hyperv.status import HvStatus
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2
from vtlab.x86.paging import NonCanonicalAddress, PageFault, PageFaultError, UnsupportedPaging, walk

_OUTPUT = struct.Struct("<IIQ")
OUTPUT_SIZE = _OUTPUT.size
EX_OUTPUT_SIZE = 64
_CACHE_WRITEBACK = 6
_OVERLAY = 1 << 8


class Flags(IntFlag):
    """HV_TRANSLATE_GVA_CONTROL_FLAGS, as far as they matter to a walk."""

    READ = 1 << 0
    WRITE = 1 << 1
    EXECUTE = 1 << 2
    PRIVILEGE_EXEMPT = 1 << 3
    SET_PAGE_TABLE_BITS = 1 << 4
    SUPERVISOR = 1 << 6
    USER = 1 << 7


class Result(IntEnum):
    """HV_TRANSLATE_GVA_RESULT_CODE."""

    SUCCESS = 0
    NOT_PRESENT = 1
    PRIVILEGE_VIOLATION = 2
    INVALID_FLAGS = 3
    GPA_UNMAPPED = 4
    GPA_NO_READ = 5
    GPA_NO_WRITE = 6


_ACCESSES = {
    Flags.READ: vcpu_pb2.ACCESS_KIND_READ,
    Flags.WRITE: vcpu_pb2.ACCESS_KIND_WRITE,
    Flags.EXECUTE: vcpu_pb2.ACCESS_KIND_EXECUTE,
}


class _Unreadable(Exception):
    """A page-table entry lies where the level may not read, or where no memory is."""


def _translate(call: Call) -> tuple[HvStatus, int, int, int]:
    """Status, result code, word of cache type and overlay, page."""
    request = TranslateInput.decode(call.header)
    facts = call.facts()
    status = first_objection(call.rules.translate_virtual_address, facts, request)
    if status:
        return status, 0, 0, 0
    target = translate_vtl(facts, request)
    result, page = _walk(call, request, target)
    if result:
        return HvStatus.SUCCESS, result, 0, 0
    word = _CACHE_WRITEBACK | (_OVERLAY if is_overlay(call, target, page) else 0)
    return HvStatus.SUCCESS, 0, word, page


def is_overlay(call: Call, target: int, page: int) -> bool:
    """The hypercall page of that level lies there."""
    value = call.board.msrs_of(target).hypercall
    return bool(value & PAGE_ENABLE) and value >> PAGE_NUMBER_SHIFT == page


def _walk(call: Call, request: TranslateInput, target: int) -> tuple[int, int]:
    registers = architectural.state_of(call, call.processor, target).registers
    memory, flags = call.board.memory, request.flags

    def read_entry(gpa: int, size: int) -> int:
        try:
            return int.from_bytes(memory.read(gpa, size, target), "little")
        except VtlabError:
            raise _Unreadable from None

    user = registers.cpl == 3 if not flags & (Flags.USER | Flags.SUPERVISOR) else bool(flags & Flags.USER)
    wanted = [kind for flag, kind in _ACCESSES.items() if flags & flag] or [vcpu_pb2.ACCESS_KIND_READ]
    if flags & Flags.PRIVILEGE_EXEMPT:
        wanted = [vcpu_pb2.ACCESS_KIND_READ]
    gpa = 0
    for access in wanted:
        try:
            found = walk(
                read_entry,
                cr0=registers.cr0,
                cr3=registers.cr3,
                cr4=registers.cr4,
                efer=registers.efer,
                gva=request.page * PAGE_SIZE & (1 << 64) - 1,
                access=access,
                user=user and not flags & Flags.PRIVILEGE_EXEMPT,
                ac=True,
            )
        except _Unreadable:
            return Result.GPA_UNMAPPED, 0
        except (NonCanonicalAddress, UnsupportedPaging):
            return Result.NOT_PRESENT, 0
        if isinstance(found, PageFault):
            return _failure(found.error_code), 0
        gpa = found.gpa
    page = gpa // PAGE_SIZE
    if page >= memory.pages:
        return Result.GPA_UNMAPPED, 0
    if target == VTL0 and not flags & Flags.PRIVILEGE_EXEMPT:
        try:
            memory.check(page * PAGE_SIZE, PAGE_SIZE, READ)
        except VtlabError:
            return Result.GPA_NO_READ, 0
        if flags & Flags.WRITE and not memory.access(page * PAGE_SIZE).write:
            return Result.GPA_NO_WRITE, 0
    return Result.SUCCESS, page


def _failure(error_code: int) -> Result:
    if error_code & PageFaultError.RSVD:
        return Result.INVALID_FLAGS
    return Result.PRIVILEGE_VIOLATION if error_code & PageFaultError.P else Result.NOT_PRESENT


def translate_virtual_address(call: Call) -> Reply:
    """Result u32@0, cache type u8@4, overlay bit 0 of u8@5, page u64@8."""
    status, result, word, page = _translate(call)
    return Reply(status, b"" if status else _OUTPUT.pack(result, word, page))


def translate_virtual_address_ex(call: Call) -> Reply:
    """Result word as above @0, reserved, pending event 32 bytes @16 (none), page u64@48, reserved."""
    status, result, word, page = _translate(call)
    if status:
        return Reply(status)
    return Reply(status, struct.pack("<IIQ32xQQ", result, word, 0, page, 0))
