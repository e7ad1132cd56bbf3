"""Walk of the guest's own page tables: a pure function of the registers and of the entries it reads.

Sources: Intel SDM volume 3, chapter 4 (4.3 32-bit paging, 4.4 PAE, 4.5 4-level, 4.6 access rights, 4.7 error code, 4.8
accessed and dirty flags); AMD APM volume 2, section 5. PAE takes AMD's rule: the four top entries are read by each walk
and not cached by MOV to CR3. Protection keys and 5-level paging are not in the processor that the core models.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntFlag
from typing import NamedTuple

from vtlab.v1 import vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer

# (guest-physical address, size 4 or 8) -> value. What it raises goes through `walk` unchanged.
ReadEntry = Callable[[int, int], int]

# MAXPHYADDR of the modelled processor, as in CPUID 8000_0008 EAX[7:0].
PHYSICAL_BITS = 40

_READ = vcpu_pb2.ACCESS_KIND_READ
_WRITE = vcpu_pb2.ACCESS_KIND_WRITE
_EXECUTE = vcpu_pb2.ACCESS_KIND_EXECUTE


class EntryBit(IntFlag):
    """Bits of a page-table entry. PAT of a 4 KiB page is not PS."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    G = 1 << 8
    NX = 1 << 63


class PageFaultError(IntFlag):
    """Error code of #PF (SDM volume 3, figure 4-12)."""

    P = 1 << 0
    WR = 1 << 1
    US = 1 << 2
    RSVD = 1 << 3
    ID = 1 << 4


# Plain integers: arithmetic with an IntFlag is slow and keeps a member for every value that it ever produced.
_A = EntryBit.A.value
_CR0_PG = Cr0.PG.value
_CR0_WP = Cr0.WP.value
_CR4_LA57 = Cr4.LA57.value
_CR4_PAE = Cr4.PAE.value
_CR4_PSE = Cr4.PSE.value
_CR4_SMAP = Cr4.SMAP.value
_CR4_SMEP = Cr4.SMEP.value
_D = EntryBit.D.value
_EFER_LMA = Efer.LMA.value
_EFER_NXE = Efer.NXE.value
_ERROR_ID = PageFaultError.ID.value
_ERROR_P = PageFaultError.P.value
_ERROR_RSVD = PageFaultError.RSVD.value
_ERROR_US = PageFaultError.US.value
_ERROR_WR = PageFaultError.WR.value
_NX = EntryBit.NX.value
_P = EntryBit.P.value
_PS = EntryBit.PS.value
_RW = EntryBit.RW.value
_US = EntryBit.US.value


class PagingMode(Enum):
    """The value is for people."""

    NONE = "no paging"
    BITS_32 = "32-bit paging"
    PAE = "PAE paging"
    LEVEL_4 = "4-level paging"
    LEVEL_5 = "5-level paging"


class Entry(NamedTuple):
    """An entry that the walk used. `level` counts from 1, the table whose entries map 4 KiB pages."""

    address: int
    size: int
    value: int
    level: int


class EntryUpdate(NamedTuple):
    """An entry that hardware would write to set A or D, by a locked compare-and-exchange of `old`."""

    address: int
    size: int
    old: int
    new: int


class Translation(NamedTuple):
    """The access is allowed.

    `writable`, `user` and `executable` are R/W, U/S and not-NX of all entries together, before CR0.WP, SMEP, SMAP.
    `page_size` is in bytes: 4 KiB, 2 MiB, 4 MiB or 1 GiB. Without paging there are no entries and all rights.
    """

    gpa: int
    page_size: int
    writable: bool
    user: bool
    executable: bool
    entries: tuple[Entry, ...]
    updates: tuple[EntryUpdate, ...]


class PageFault(NamedTuple):
    """The access takes #PF: `address` goes to CR2. `entries` are those read until then, the refused one last."""

    error_code: int
    address: int
    entries: tuple[Entry, ...]


class NonCanonicalAddress(ValueError):
    """Bits 63:47 of a 4-level linear address differ: #GP, or #SS for a stack access, and no walk."""

    def __init__(self, address: int) -> None:
        super().__init__(f"linear address {address:#x} is not canonical")
        self.address = address


class UnsupportedPaging(ValueError):
    """CR4.LA57 is set."""


class _Level(NamedTuple):
    shift: int
    index_bits: int
    # Entries with PS set map a page here (32-bit paging: only if CR4.PSE).
    large: bool
    # Always reserved while the entry points to a table, whatever the mode's own mask says.
    reserved: int


class _Shape(NamedTuple):
    entry_size: int
    base_mask: int
    linear_mask: int
    # Bits of every entry that are reserved besides those above MAXPHYADDR and NX without EFER.NXE.
    reserved: int
    levels: tuple[_Level, ...]


_TABLE = 0x000F_FFFF_FFFF_F000
_PT = _Level(12, 9, False, 0)
_PD = _Level(21, 9, True, 0)
_SHAPES = {
    PagingMode.BITS_32: _Shape(4, 0xFFFF_F000, 0xFFFF_FFFF, 0, (_Level(22, 10, True, 0), _Level(12, 10, False, 0))),
    # Bits 62:52 are reserved in PAE. Its top entries have no rights and no A: bits 2:1, 8:5 and 63 must be zero.
    PagingMode.PAE: _Shape(
        8, 0xFFFF_FFE0, 0xFFFF_FFFF, 0x7FF0_0000_0000_0000, (_Level(30, 2, False, _NX | 0x1E6), _PD, _PT)
    ),
    PagingMode.LEVEL_4: _Shape(
        8, _TABLE, (1 << 64) - 1, 0, (_Level(39, 9, False, _PS), _Level(30, 9, True, 0), _PD, _PT)
    ),
}


def paging_mode(cr0: int, cr4: int, efer: int) -> PagingMode:
    """Mode by SDM volume 3, table 4-1."""
    if not cr0 & _CR0_PG:
        return PagingMode.NONE
    if not cr4 & _CR4_PAE:
        return PagingMode.BITS_32
    if not efer & _EFER_LMA:
        return PagingMode.PAE
    return PagingMode.LEVEL_5 if cr4 & _CR4_LA57 else PagingMode.LEVEL_4


def is_canonical(address: int) -> bool:
    """True if bits 63:47 are equal."""
    return (address >> 47) in (0, 0x1FFFF)


def walk(
    read: ReadEntry,
    *,
    cr0: int,
    cr3: int,
    cr4: int,
    efer: int,
    gva: int,
    access: vcpu_pb2.AccessKind.ValueType = _READ,
    user: bool = False,
    implicit: bool = False,
    ac: bool = False,
    physical_bits: int = PHYSICAL_BITS,
) -> Translation | PageFault:
    """Translates a linear address for one access; writes nothing.

    Args:
        read: reads an entry by guest-physical address.
        user: the access is made at CPL3. Ignored if `implicit`.
        implicit: an access to a system table (GDT, IDT, TSS): supervisor at every CPL and never exempt from SMAP.
        ac: RFLAGS.AC.

    Raises:
        NonCanonicalAddress: instead of any walk.
        UnsupportedPaging: 5-level paging.
    """
    mode = paging_mode(cr0, cr4, efer)
    if mode is PagingMode.NONE:
        return Translation(gva & 0xFFFF_FFFF, 4096, True, True, True, (), ())
    if mode is PagingMode.LEVEL_5:
        raise UnsupportedPaging("CR4.LA57: 5-level paging is not supported")
    if mode is PagingMode.LEVEL_4 and not is_canonical(gva):
        raise NonCanonicalAddress(gva)
    user = user and not implicit
    error = _access_error(access, user, cr4, efer)
    shape = _SHAPES[mode]
    gva &= shape.linear_mask
    beyond = ~((1 << physical_bits) - 1) & _TABLE
    reserved = shape.reserved | (beyond if shape.entry_size == 8 else 0)
    if not efer & _EFER_NXE:
        reserved |= _NX
    table = cr3 & shape.base_mask & ~beyond
    entries: list[Entry] = []
    rights = _RW | _US
    nx = 0
    for number, level in enumerate(shape.levels):
        index = (gva >> level.shift) & ((1 << level.index_bits) - 1)
        address = table + index * shape.entry_size
        value = read(address, shape.entry_size)
        entries.append(Entry(address, shape.entry_size, value, len(shape.levels) - number))
        if not value & _P:
            return PageFault(error, gva, tuple(entries))
        leaf = level.shift == 12 or (
            level.large and bool(value & _PS) and (mode is not PagingMode.BITS_32 or bool(cr4 & _CR4_PSE))
        )
        mask = reserved | (_large_reserved(mode, level.shift, physical_bits) if leaf else level.reserved)
        if value & mask:
            return PageFault(error | _ERROR_P | _ERROR_RSVD, gva, tuple(entries))
        if not (mode is PagingMode.PAE and number == 0):
            rights &= value
            nx |= value & _NX if shape.entry_size == 8 else 0
        if leaf:
            break
        table = value & _TABLE
    writable, is_user, executable = bool(rights & _RW), bool(rights & _US), not nx
    if not _allowed(access, user, implicit, ac, cr0, cr4, writable, is_user, executable):
        return PageFault(error | _ERROR_P, gva, tuple(entries))
    page_size = 1 << level.shift
    gpa = _frame(mode, value, page_size) | (gva & (page_size - 1))
    return Translation(gpa, page_size, writable, is_user, executable, tuple(entries), _updates(mode, entries, access))


def _access_error(access: int, user: bool, cr4: int, efer: int) -> int:
    """Error-code bits that depend on the access alone."""
    error = _ERROR_US if user else 0
    if access == _WRITE:
        error |= _ERROR_WR
    reports_fetch = (cr4 & _CR4_PAE and efer & _EFER_NXE) or cr4 & _CR4_SMEP
    if access == _EXECUTE and reports_fetch:
        error |= _ERROR_ID
    return error


def _large_reserved(mode: PagingMode, shift: int, physical_bits: int) -> int:
    """Address bits of an entry that maps a page and must be zero: those below the page size, without PAT (bit 12)."""
    if shift == 12:
        return 0
    if mode is PagingMode.BITS_32:
        # PSE-36: bits 20:13 hold address bits 39:32, bit 21 is reserved.
        unused = max(0, 40 - max(physical_bits, 32))
        return 1 << 21 | (((1 << unused) - 1) << (21 - unused))
    return ((1 << shift) - 1) & ~0x1FFF


def _frame(mode: PagingMode, value: int, page_size: int) -> int:
    if mode is PagingMode.BITS_32 and page_size > 4096:
        return (value & 0xFFC0_0000) | ((value >> 13) & 0xFF) << 32
    return value & _TABLE & ~(page_size - 1)


def _allowed(
    access: int,
    user: bool,
    implicit: bool,
    ac: bool,
    cr0: int,
    cr4: int,
    writable: bool,
    is_user: bool,
    executable: bool,
) -> bool:
    """Access rights by SDM volume 3, section 4.6.1."""
    if user and not is_user:
        return False
    if access == _EXECUTE:
        return executable and (user or not (is_user and cr4 & _CR4_SMEP))
    if not user and is_user and cr4 & _CR4_SMAP and (implicit or not ac):
        return False
    return access != _WRITE or writable or (not user and not cr0 & _CR0_WP)


def _updates(mode: PagingMode, entries: list[Entry], access: int) -> tuple[EntryUpdate, ...]:
    """A in every entry, D in the last one of a write. PAE's top entries have neither."""
    changed = []
    for entry in entries[1 if mode is PagingMode.PAE else 0 :]:
        new = entry.value | _A
        if access == _WRITE and entry is entries[-1]:
            new |= _D
        if new != entry.value:
            changed.append(EntryUpdate(entry.address, entry.size, entry.value, new))
    return tuple(changed)
