"""The nested page table: which file backs each guest-physical page, and with what rights.

One table of 4 KiB entries serves every processor of a level. It lies in host memory that each engine maps at
NESTED_BASE in a part of its system-physical space that no entry points to, and is edited here as plain 64-bit
words, runs by slice.

User and kernel execution are told apart by two roots (mode-based execute control): the kernel root lets kernel-
executable pages run, the user root user-executable ones. They differ only in their last-level tables. The engine
keeps separate TLBs for user and kernel accesses, and a root serves only its own privilege level, so a swap needs no
full flush. Source of the entry format: AMD APM volume 2, 15.25.

With several processors the rights that a page has and those that the engines are shown differ: see Shown and
coherence.py.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache

from vtlab.v1 import vcpu_pb2

PAGE_SIZE = 4096
_ENTRIES = 512

# System-physical space (40 bits) in regions of 64 GiB. Nested entries never point into the hidden and nested ones. The
# regions that refuse stores lie where hardly any guest has code: the engine takes their addresses for virtual ones when
# it decides whether a store may have changed code.
REGION_SHIFT = 36
WRITABLE_BASE, HIDDEN_BASE, NESTED_BASE, PRIVATE_BASE, SMRAM_BASE, SCRATCH_BASE, EXTRA_BASE, SEALED_BASE = (
    number << REGION_SHIFT for number in (0, 1, 2, 3, 4, 5, 14, 15)
)
MAX_RAM = 1 << REGION_SHIFT
MAX_DETOURS = 4
"""Pages that a detour leads to scratch pages."""

P, RW, US, A, D = 1, 2, 4, 0x20, 0x40
NX = 1 << 63
_TABLE_RIGHTS = P | RW | US | A | D
ADDRESS = 0x000F_FFFF_FFFF_F000


def entry(frame: int, access: vcpu_pb2.PageAccess, execute: bool) -> int:
    """A last-level entry for the page at system-physical `frame`; 0 if no access is allowed.

    x86 has no write-only or execute-only mapping: without `read` there is no access at all.
    """
    if not access.read:
        return 0
    write = RW if access.write or access.page_table else 0
    return frame | P | US | A | D | write | (0 if execute else NX)


class Shown(IntEnum):
    """What the engines see of a page; all but the first only for pages that are writable and executable."""

    AS_IT_IS = 0
    WRITABLE = 1  # no engine holds code of it
    EXECUTABLE = 2
    ALL = 3


_NONE = (1 << 64) - 1
_REMEMBERED = 1 << 16  # pages
# Bits that an entry gains and those that it keeps.
_SHOWN = {
    Shown.AS_IT_IS: (0, _NONE),
    Shown.WRITABLE: (NX, _NONE),
    Shown.EXECUTABLE: (0, _NONE & ~RW),
    Shown.ALL: (0, _NONE),
}


def _entries(first: int, count: int) -> bytes:
    """Entries of consecutive pages, from the first one's."""
    return array("Q", range(first, first + count * PAGE_SIZE, PAGE_SIZE)).tobytes()


_known = lru_cache(maxsize=32)(_entries)


def _run(first: int, count: int) -> bytes:
    """The same; machines of one size map their RAM alike, so runs up to 256 MiB are remembered."""
    return (_known if count <= _REMEMBERED else _entries)(first, count)


class NestedTable:
    """Nested translation of one level of one machine.

    Attributes:
        generation: counts changes that an engine must answer with a TLB flush.
        split: whether any page differs between kernel and user execution, so that the roots matter.
    """

    def __init__(self, ram_size: int, window: int, processors: int = 1) -> None:
        """`window` is the number of guest-physical bytes that can ever be mapped (RAM, overlays and devices).

        `processors` may each have roots of their own for a while (startup_window.py).
        """
        if not 0 < ram_size <= MAX_RAM or ram_size % PAGE_SIZE:
            raise ValueError(f"RAM of {ram_size} bytes is not a number of pages up to {MAX_RAM} bytes")
        self.pages = (window + PAGE_SIZE - 1) // PAGE_SIZE
        self.ram_pages = ram_size // PAGE_SIZE
        self.generation = 0
        self.split = False
        leaves = -(-self.pages // _ENTRIES)
        directories = -(-leaves // _ENTRIES)
        self.leaf_tables, self.directories = leaves, directories
        # Per root: one top table, one PDPT, the directories. Then the leaves of the kernel root and of the user root.
        self._upper = 2 + directories
        self._windows = 2 * self._upper + 2 * leaves
        # Of each processor: two top tables, a PDPT, the directories, four leaf tables.
        self._window_size = 3 + directories + 4
        self._detour = self._windows + processors * self._window_size
        total = self._detour + 1 + 3 * MAX_DETOURS
        self.buffer = mmap.mmap(-1, total * PAGE_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.size = total * PAGE_SIZE
        self._words = self.words = memoryview(self.buffer).cast("Q")
        self._leaves = [2 * self._upper * _ENTRIES, (2 * self._upper + leaves) * _ENTRIES]
        # Per root, by page: the rights. The engines' own leaves until they are divided.
        self._rights = [self._words[leaf : leaf + self.pages] for leaf in self._leaves]
        self._shown: bytearray | None = None
        for root in (0, 1):
            self._build_root(root, directories)

    def _build_root(self, root: int, directories: int) -> None:
        words, table = self._words, root * self._upper
        words[table * _ENTRIES] = self._physical(table + 1) | _TABLE_RIGHTS
        for number in range(directories):
            words[(table + 1) * _ENTRIES + number] = self._physical(table + 2 + number) | _TABLE_RIGHTS
        first_leaf = self._leaves[root] // _ENTRIES
        for number in range(self.leaf_tables):
            words[(table + 2) * _ENTRIES + number] = self._physical(first_leaf + number) | _TABLE_RIGHTS

    @staticmethod
    def _physical(table: int) -> int:
        return NESTED_BASE + table * PAGE_SIZE

    def table_address(self, table: int) -> int:
        """System-physical address of a table, by its number."""
        return self._physical(table)

    def table_entry(self, table: int) -> int:
        """An entry of an upper level that points to a table, with all rights."""
        return self._physical(table) | _TABLE_RIGHTS

    @property
    def first_leaf(self) -> int:
        """Number of the first leaf table of the kernel root; they follow one another."""
        return self._leaves[0] // _ENTRIES

    def window_base(self, number: int) -> int:
        """Number of the first table that processor `number` has for itself."""
        return self._windows + number * self._window_size

    def detour(self, root: int, pages: Iterable[int]) -> int:
        """A root as `root` is now, except that up to MAX_DETOURS guest pages are scratch pages, in that order.

        Valid until the next detour, for one processor at a time. The pages may lie beyond the window.
        """
        words, free, copies = self._words, self._detour, dict[tuple[int, int], int]()

        def copy(source: int) -> int:
            """Number of a new table like the one that an entry points to; empty if it points nowhere."""
            nonlocal free
            at, free = free * _ENTRIES, free + 1
            if source:
                original = ((source & ADDRESS) - NESTED_BASE) // 8
                words[at : at + _ENTRIES] = words[original : original + _ENTRIES]
            else:
                words[at : at + _ENTRIES] = memoryview(bytes(PAGE_SIZE)).cast("Q")
            return free - 1

        top = copy(root)
        for slot, page in enumerate(pages):
            table = top
            for shift in (27, 18, 9):
                at = table * _ENTRIES + (page >> shift & _ENTRIES - 1)
                key = (shift, page >> shift)
                if key not in copies:
                    copies[key] = copy(words[at])
                    words[at] = self.table_entry(copies[key]) | words[at] & NX
                table = copies[key]
            frame = SCRATCH_BASE + slot * PAGE_SIZE
            words[table * _ENTRIES + (page & _ENTRIES - 1)] = frame | P | RW | US | A | D | NX
        return self._physical(top)

    def root(self, user: bool) -> int:
        """System-physical address of a top-level table, for the nested CR3."""
        return self._physical(self._upper if user else 0)

    def map(self, first: int, count: int, base: int, access: vcpu_pb2.PageAccess) -> None:
        """Maps guest pages first..first+count to system-physical `base` + page address, with these rights."""
        if first < 0 or count < 0 or first + count > self.pages:
            raise ValueError(f"pages {first:#x}+{count:#x} are outside the {self.pages:#x} pages of the machine")
        self.map_runs([(first, count)], base, access)

    def map_runs(self, runs: Iterable[tuple[int, int]], base: int, access: vcpu_pb2.PageAccess) -> None:
        """The same for many runs (first page, number of pages), which the caller has checked."""
        kernel = entry(0, access, access.kernel_execute)
        user = entry(0, access, access.user_execute)
        self.split = self.split or access.kernel_execute != access.user_execute
        state = Shown.WRITABLE if kernel & RW and not kernel & user & NX else Shown.AS_IT_IS
        kernel_rights, user_rights = self._rights
        for first, count in runs:
            frame = base + first * PAGE_SIZE
            if count == 1:
                kernel_rights[first] = frame | kernel if kernel else 0
                user_rights[first] = frame | user if user else 0
            else:
                for rights, template in ((kernel_rights, kernel), (user_rights, user)):
                    run = _run(frame | template, count) if template else bytes(8 * count)
                    rights[first : first + count] = memoryview(run).cast("Q")
            if self._shown is not None:
                self._show_run(self._shown, first, count, state)
        self.generation += 1

    def entry(self, page: int, user: bool = False) -> int:
        """The last-level entry that a root has for a page; 0 if the page is absent or beyond the table."""
        return self._rights[user][page] if 0 <= page < self.pages else 0

    def restore(self, page: int, entries: tuple[int, int]) -> None:
        """Puts back what `entry` gave for the kernel and the user root."""
        for rights, word in zip(self._rights, entries, strict=True):
            rights[page] = word
        if self._shown is not None:
            kernel, user = entries
            both = kernel & RW and not kernel & user & NX
            self._show_run(self._shown, page, 1, Shown.WRITABLE if both else Shown.AS_IT_IS)
        self.generation += 1

    # ------------------------------------------------------------------------------------- what engines are shown

    def divide(self) -> None:
        """From now on the engines are shown no page writable and executable at once. They hold no code when called."""
        self._rights = [memoryview(array("Q", rights)) for rights in self._rights]
        # 1 is Shown.WRITABLE.
        self._shown = shown = bytearray(
            kernel & RW != 0 and not kernel & user & NX for kernel, user in zip(*self._rights, strict=True)
        )
        for leaves, rights in zip(self._leaves, self._rights, strict=True):
            words = array("Q", [word | NX if both else word for word, both in zip(rights, shown, strict=True)])
            self._words[leaves : leaves + self.pages] = memoryview(words)
        self.generation += 1

    def shown(self, page: int) -> Shown:
        """What the engines see of a page."""
        if self._shown is None or not 0 <= page < self.pages:
            return Shown.AS_IT_IS
        return Shown(self._shown[page])

    def show(self, page: int, state: Shown) -> None:
        """Changes what the engines see of a page that is writable and executable."""
        assert self._shown is not None
        self._show_run(self._shown, page, 1, state)
        self.generation += 1

    def _show_run(self, states: bytearray, first: int, count: int, state: Shown) -> None:
        states[first : first + count] = bytes([state]) * count
        added, removed = _SHOWN[state]
        for leaves, rights in zip(self._leaves, self._rights, strict=True):
            words = rights[first : first + count]
            if added or removed != _NONE:
                words = memoryview(array("Q", [word & removed | added for word in words]))
            self._words[leaves + first : leaves + first + count] = words
