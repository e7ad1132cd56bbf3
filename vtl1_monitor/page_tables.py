"""VTL0's page tables: finding them, and what an entry may become once only VTL1 writes them. Pure over readers.

4-level paging, 8-byte entries (SDM volume 3, section 4.5). Levels count from 1, whose entries map 4 KiB pages, to 4,
the root. A table page in a recursive mapping has several levels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vtl1_monitor import rights
from vtl1_monitor.rights import Run
from vtlab.ram import PAGE_SIZE
from vtlab.x86.paging import PHYSICAL_BITS, EntryBit

ROOT_LEVEL = 4
MAX_TABLES = 8192
"""Table pages of one machine; more are refused, since VTL0 decides how long VTL1 reads them."""

ReadTable = Callable[[int], bytes]
"""Page number -> its 4096 bytes. May raise; that goes through unchanged."""

_P, _RW, _US, _PS = EntryBit.P.value, EntryBit.RW.value, EntryBit.US.value, EntryBit.PS.value
_A, _D, _NX = EntryBit.A.value, EntryBit.D.value, EntryBit.NX.value
_ADDRESS = 0x000F_FFFF_FFFF_F000
_BEYOND = ~((1 << PHYSICAL_BITS) - 1) & _ADDRESS
_ENTRIES = struct.Struct("<512Q")


class BadTables(Exception):
    """The tables or an entry are not acceptable; the text says which entry and why."""


class Child(NamedTuple):
    """A table page that an entry refers to."""

    gfn: int
    level: int


def entries(page: bytes) -> tuple[int, ...]:
    """The 512 entries of a table page."""
    return _ENTRIES.unpack(page)


def is_leaf(entry: int, level: int) -> bool:
    """True if a present entry maps memory rather than a table."""
    return level == 1 or (level in (2, 3) and bool(entry & _PS))


def child(entry: int, level: int) -> Child | None:
    """The table that an entry refers to; None if it is not present or maps memory."""
    if not entry & _P or is_leaf(entry, level):
        return None
    return Child((entry & _ADDRESS) >> 12, level - 1)


def mapped(entry: int, level: int) -> Run | None:
    """The pages that an entry maps by itself; None if it maps none."""
    if not entry & _P or not is_leaf(entry, level):
        return None
    pages = 512 ** (level - 1)
    return Run((entry & _ADDRESS) >> 12 & ~(pages - 1), pages)


def with_accessed(entry: int, level: int) -> int:
    """The entry with A, and D where it maps memory, so that no walk ever needs to write it."""
    if not entry & _P:
        return entry
    return entry | _A | (_D if is_leaf(entry, level) else 0)


def normalised(page: bytes, levels: frozenset[int]) -> bytes:
    """A table page with `with_accessed` applied to every entry."""
    result = []
    for entry in entries(page):
        for level in levels:
            entry = with_accessed(entry, level)  # noqa: PLW2901
        result.append(entry)
    return _ENTRIES.pack(*result)


def find(root: int, read: ReadTable, pages: int) -> dict[int, frozenset[int]]:
    """All table pages below a root, itself included.

    Args:
        root: page number of the root.
        pages: pages of RAM.

    Returns:
        page number -> its levels.

    Raises:
        BadTables: a table outside RAM, too many tables, an entry with reserved bits.
    """
    found: dict[int, set[int]] = {}
    pending = [Child(root, ROOT_LEVEL)]
    while pending:
        gfn, level = pending.pop()
        if level in found.get(gfn, ()):
            continue
        if gfn >= pages:
            raise BadTables(f"a level {level} table at {gfn * PAGE_SIZE:#x} is outside RAM")
        found.setdefault(gfn, set()).add(level)
        if len(found) > MAX_TABLES:
            raise BadTables(f"there are more than {MAX_TABLES} table pages")
        if level > 1:
            pending += _children(gfn, level, read(gfn))
    return {gfn: frozenset(levels) for gfn, levels in found.items()}


def _children(gfn: int, level: int, page: bytes) -> Iterator[Child]:
    for index, entry in enumerate(entries(page)):
        below = child(entry, level)
        if below is not None:
            if entry & _BEYOND or (level == ROOT_LEVEL and entry & _PS):
                raise BadTables(f"entry {index} of the level {level} table at {gfn * PAGE_SIZE:#x} has reserved bits")
            yield below


def check_format(entry: int, level: int) -> None:
    """Raises BadTables if a walk would take a reserved-bit fault."""
    if not entry & _P:
        return
    if entry & _BEYOND:
        raise BadTables(f"entry {entry:#x}: address beyond {PHYSICAL_BITS} bits")
    if level == ROOT_LEVEL and entry & _PS:
        raise BadTables(f"entry {entry:#x}: no page of 512 GiB exists")
    run = mapped(entry, level)
    low = (512 ** (level - 1) * PAGE_SIZE - 1) & _ADDRESS & ~0x1000
    if run is not None and level > 1 and entry & low:
        raise BadTables(f"entry {entry:#x}: a page of {run.pages * PAGE_SIZE:#x} bytes is not aligned")


def check_mapping(entry: int, codes: set[int] | None) -> None:
    """Judges an entry that maps memory: W^X, and nothing beyond the rights of the pages.

    R/W, U/S and NX of this entry alone count: what tables above it take away may be given back later.

    Args:
        codes: the different codes of the pages (vtl1_monitor.rights); None if some are not RAM.

    Raises:
        BadTables: it may not be.
    """
    write, user, execute = bool(entry & _RW), bool(entry & _US), not entry & _NX
    if write and execute:
        raise BadTables(f"entry {entry:#x}: writable and executable at once")
    if codes is None:
        if execute:
            raise BadTables(f"entry {entry:#x}: executable, but not RAM")
        return
    for code in codes:
        if code & rights.STORE_MASK == rights.PRIVATE:
            raise BadTables(f"entry {entry:#x}: maps memory of VTL1")
        if write and not code & rights.WRITE:
            raise BadTables(f"entry {entry:#x}: writable mapping of memory that is {rights.access_text(code)}")
        wanted = rights.USER_EXECUTE if user else rights.KERNEL_EXECUTE
        if execute and not code & wanted:
            raise BadTables(f"entry {entry:#x}: executable mapping of memory that is {rights.access_text(code)}")
