"""Guest memory as its owner sees it: which file backs each page, what VTL0 may do with it, and moving pages about.

The per-page table has two bytes a page (store and rights), whatever is protected. The nested tables of both levels
follow it; this module alone changes it. Pages change files only while no vCPU of VTL0 runs (vmm.gate), and the caller
sends the same ProtectionUpdate to the guest before VTL0 runs again.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vtlab.errors import BadArgument, Refused
from vtlab.ram import PAGE_SIZE, Ram, RamFile, create_ram_files, zero_ram_files
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import PageAccess, ProtectionUpdate

# Rights of VTL0, one byte a page. The first four are those of HV_MAP_GPA_FLAGS.
READ = 1
WRITE = 2
KERNEL_EXECUTE = 4
USER_EXECUTE = 8
PAGE_TABLE = 16
EXECUTE = KERNEL_EXECUTE | USER_EXECUTE
ALL_RIGHTS = READ | WRITE | EXECUTE

# Stores, one byte a page.
WRITABLE = 0
SEALED = 1
PRIVATE = 2
STORES = {
    vcpu_pb2.PAGE_STORE_WRITABLE: WRITABLE,
    vcpu_pb2.PAGE_STORE_SEALED: SEALED,
    vcpu_pb2.PAGE_STORE_PRIVATE: PRIVATE,
}
_FILES = (RamFile.WRITABLE, RamFile.SEALED, RamFile.PRIVATE)

_SAME_STORE = re.compile(rb"\x00+|\x01+|\x02+")
# Pages whose stores and rights make one record of the journal.
RECORD_PAGES = 4096
# From so many pages on, giving the blocks back is cheaper than writing zeros.
_REMOVE_PAGES = 64
_ZEROS = memoryview(bytes(_REMOVE_PAGES * PAGE_SIZE))

RIGHT_NAMES = {READ: "read", WRITE: "write", EXECUTE: "execute"}


def rights_of(access: PageAccess) -> int:
    """The rights byte."""
    return (
        (READ if access.read else 0)
        | (WRITE if access.write else 0)
        | (KERNEL_EXECUTE if access.kernel_execute else 0)
        | (USER_EXECUTE if access.user_execute else 0)
        | (PAGE_TABLE if access.page_table else 0)
    )


def access_of(rights: int) -> PageAccess:
    """The inverse of rights_of."""
    return PageAccess(
        read=bool(rights & READ),
        write=bool(rights & WRITE),
        kernel_execute=bool(rights & KERNEL_EXECUTE),
        user_execute=bool(rights & USER_EXECUTE),
        page_table=bool(rights & PAGE_TABLE),
    )


def objection(store: int | None, rights: int) -> str | None:
    """Why a page cannot have that store with those rights, or None. A store of None is unknown."""
    if store is None:
        return "no store is named"
    if store == PRIVATE and rights:
        return "a private page can give VTL0 no rights"
    if store == SEALED and rights & WRITE:
        return "a sealed page cannot be writable"
    if rights & PAGE_TABLE and store != SEALED:
        return "a guarded page table must be sealed"
    if rights & (WRITE | EXECUTE | PAGE_TABLE) and not rights & READ:
        return "rights without read do not exist"
    return None


class Memory:
    """RAM of one machine. Thread-safe.

    Attributes:
        size: bytes.
        pages: number of 4 KiB pages.
    """

    def __init__(self, directory: Path, size: int, on_code_written: Callable[[list[int]], None]) -> None:
        """Creates the RAM files, every page writable with all rights.

        Args:
            on_code_written: gets the numbers of executable pages that write() changed.

        Raises:
            FileExistsError: the directory already holds a machine's memory.
        """
        create_ram_files(directory, size)
        self._map(directory, size, on_code_written)

    @classmethod
    def reopened(
        cls, directory: Path, size: int, on_code_written: Callable[[list[int]], None], records: Mapping[int, bytes]
    ) -> Memory:
        """The memory of a machine whose VMM died, as take_records() told of it.

        What a move had still to wipe is wiped.

        Raises:
            OSError, ValueError: a file is missing or has another size.
            BadArgument: a record is no record of this memory.
        """
        self = cls.__new__(cls)
        self._map(directory, size, on_code_written)
        for number, record in records.items():
            first = number * RECORD_PAGES
            count = min(RECORD_PAGES, self.pages - first)
            if count <= 0 or len(record) != 2 * count:
                raise BadArgument(f"record {number} of pages", f"has {len(record)} bytes")
            if max(record[:count]) > PRIVATE or max(record[count:]) > ALL_RIGHTS | PAGE_TABLE:
                raise BadArgument(f"record {number} of pages", "names a file or rights that there are not")
            self._store[first : first + count] = record[:count]
            self._rights[first : first + count] = record[count:]
        for span in _SAME_STORE.finditer(bytes(self._store)):
            kept = self._store[span.start()]
            for store in (WRITABLE, SEALED) if kept == PRIVATE else (PRIVATE,):
                self._wipes.append((store, span.start(), span.end() - span.start()))
        self.wipe()
        return self

    @property
    def counts(self) -> tuple[int, int, int]:
        """Pages by store."""
        return self._store.count(WRITABLE), self._store.count(SEALED), self._store.count(PRIVATE)

    def _map(self, directory: Path, size: int, on_code_written: Callable[[list[int]], None]) -> None:
        self.size = size
        self.pages = size // PAGE_SIZE
        self._directory = directory
        self._ram = Ram(directory, size, "vmm")
        self._maps = [self._ram.views[file] for file in _FILES]
        self._views = [memoryview(view) for view in self._maps]
        self._descriptors = [os.open(directory / file.value, os.O_RDWR | os.O_CLOEXEC) for file in _FILES]
        self._on_code_written = on_code_written
        self._lock = threading.RLock()
        self._store = bytearray(self.pages)
        self._rights = bytearray([ALL_RIGHTS]) * self.pages
        self._changed: set[int] = set()  # numbers of records
        self._wipes: list[tuple[int, int, int]] = []  # store, first page, number of pages
        self._renewed = False

    def close(self) -> None:
        """Unmaps the files. Reads and writes after it raise ValueError."""
        with self._lock:
            for view in self._views:
                view.release()
            self._ram.close()
            for descriptor in self._descriptors:
                os.close(descriptor)
            self._descriptors.clear()

    def reset(self, *, keep: bool = False) -> None:
        """Lifts every protection and zeroes memory. No vCPU may run.

        Args:
            keep: what VTL0 could read stays, as RAM that nobody clears; VTL1's pages are zeroed even so.
        """
        with self._lock:
            if keep:
                for span in _SAME_STORE.finditer(bytes(self._store)):
                    old = self._store[span.start()]
                    if old != WRITABLE:
                        self._move(span.start(), len(span[0]), old, WRITABLE, reveal=False)
                zero_ram_files(self._directory, self.size, (RamFile.SEALED, RamFile.PRIVATE))
            else:
                zero_ram_files(self._directory, self.size)
            self._store = bytearray(self.pages)
            self._rights = bytearray([ALL_RIGHTS]) * self.pages
            self._changed.clear()
            self._wipes.clear()
            self._renewed = True

    # ------------------------------------------------------------------------------------------------- protection

    def apply(self, update: ProtectionUpdate, *, reveal: bool = False, wipe: bool = True) -> int:
        """Gives pages a store and rights, and moves their contents there. All or nothing.

        Contents move with a page between WRITABLE and SEALED, and to PRIVATE, where the other copies are then zeroed.
        A page that leaves PRIVATE is zero and its private copy is wiped, unless `reveal`.

        Args:
            reveal: the contents of private pages become VTL0's: VTL1 itself gives them up (TLFS page rights).
            wipe: False keeps the copies that have to go until wipe(), so that a journal is written before.

        Returns:
            The number of pages that changed files.

        Raises:
            BadArgument: unknown store, a run beyond RAM, rights that the store cannot give. Nothing was changed.
        """
        runs = list(update.runs)
        store = STORES.get(update.store)
        rights = rights_of(update.access)
        firsts, counts = runs[0::2], runs[1::2]
        self._check(firsts, counts, store, rights)
        assert store is not None
        moved = 0
        with self._lock:
            stores, all_rights, move = self._store, self._rights, self._move
            store_byte, rights_byte = bytes([store]), bytes([rights])
            for first, count in zip(firsts, counts, strict=True):
                if count == 1:
                    old = stores[first]
                    if old != store:
                        move(first, 1, old, store, reveal)
                        stores[first] = store
                        moved += 1
                    elif all_rights[first] == rights:
                        continue
                    all_rights[first] = rights
                    self._changed.add(first // RECORD_PAGES)
                    continue
                end = first + count
                if stores.count(store, first, end) == all_rights.count(rights, first, end) == count:
                    continue
                for span in _SAME_STORE.finditer(bytes(stores[first:end])):
                    old = stores[first + span.start()]
                    length = span.end() - span.start()
                    if old != store:
                        move(first + span.start(), length, old, store, reveal)
                        moved += length
                stores[first:end] = store_byte * count
                all_rights[first:end] = rights_byte * count
                self._changed.update(range(first // RECORD_PAGES, (end - 1) // RECORD_PAGES + 1))
            if wipe:
                self.wipe()
        return moved

    def wipe(self) -> None:
        """Zeroes the copies that pages left behind where they must leave none."""
        with self._lock:
            wipes, self._wipes = self._wipes, []
            for store, first, count in wipes:
                self._zero(store, first, count)

    @property
    def changed(self) -> bool:
        """Stores or rights differ from what take_records() gave."""
        return bool(self._changed)

    def take_renewal(self) -> bool:
        """Whether reset() was called since the last call: earlier records are void."""
        renewed, self._renewed = self._renewed, False
        return renewed

    def take_records(self) -> dict[int, bytes]:
        """The records that changed since the last call: a byte a page with its store, then a byte each with its rights.

        Record n is of RECORD_PAGES pages from n * RECORD_PAGES on. What none tells of is writable with all rights.
        """
        with self._lock:
            changed, self._changed = self._changed, set()
            return {
                number: bytes(self._store[first : first + RECORD_PAGES] + self._rights[first : first + RECORD_PAGES])
                for number in changed
                for first in (number * RECORD_PAGES,)
            }

    def _check(self, firsts: list[int], counts: list[int], store: int | None, rights: int) -> None:
        if len(firsts) != len(counts):
            raise BadArgument("protection", "runs are pairs of first page and number of pages")
        problem = objection(store, rights)
        if problem:
            raise BadArgument(f"protection of page {firsts[0]:#x}" if firsts else "protection", problem)
        for first, count in zip(firsts, counts, strict=True):
            if not 0 < count <= self.pages - first:
                raise BadArgument(f"protection of page {first:#x}", f"{count} pages from there are not RAM")

    def _move(self, first: int, count: int, old: int, new: int, reveal: bool) -> None:
        start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
        if old == PRIVATE and not reveal:
            self._zero(new, first, count)
        else:
            self._copy(old, new, start, end)
        if old == PRIVATE:
            self._wipes.append((PRIVATE, first, count))
        if new == PRIVATE:
            self._wipes += [(WRITABLE, first, count), (SEALED, first, count)]

    def _copy(self, old: int, new: int, start: int, end: int) -> None:
        """Inside the kernel: neither file is mapped page by page for it, and what was never written stays unreal."""
        source, target = self._descriptors[old], self._descriptors[new]
        while start < end:
            done = os.copy_file_range(source, target, end - start, start, start)
            if not done:
                raise OSError(errno.EIO, "copy_file_range made no progress")
            start += done

    def _zero(self, store: int, first: int, count: int) -> None:
        start, size = first * PAGE_SIZE, count * PAGE_SIZE
        if count >= _REMOVE_PAGES:
            self._maps[store].madvise(mmap.MADV_REMOVE, start, size)
        else:
            self._views[store][start : start + size] = _ZEROS[:size]

    # ----------------------------------------------------------------------------------------------------- access

    def read(self, gpa: int, size: int, vtl: int = 0) -> bytes:
        """Bytes as that level may read them; VTL1 is not bound by the rights of VTL0.

        Raises:
            Refused: names the first page that VTL0 may not read.
            BadArgument: part of it is not RAM.
        """
        with self._lock:
            spans = list(self._spans(gpa, size, READ, vtl))
            return b"".join(bytes(self._views[store][start:end]) for store, start, end in spans)

    def write(self, gpa: int, data: bytes, vtl: int = 0) -> None:
        """Writes all of it or nothing, with that level's rights. Raises like read()."""
        with self._lock:
            spans = list(self._spans(gpa, len(data), WRITE, vtl))
            source = memoryview(data)
            for store, start, end in spans:
                self._views[store][start:end] = source[start - gpa : end - gpa]
            first, last = gpa // PAGE_SIZE, (gpa + len(data) + PAGE_SIZE - 1) // PAGE_SIZE
            code = [page for page in range(first, last) if self._rights[page] & EXECUTE]
        if code:
            self._on_code_written(code)

    def check(self, gpa: int, size: int, right: int, vtl: int = 0) -> None:
        """Raises like read() unless that level has READ or WRITE on the whole range."""
        with self._lock:
            for _ in self._spans(gpa, size, right, vtl):
                pass

    def read_entry(self, gpa: int, size: int) -> int:
        """A page-table entry, with VTL0's rights: what a walk of its tables reads (vtlab.x86.paging.ReadEntry)."""
        return int.from_bytes(self.read(gpa, size), "little")

    def access(self, gpa: int) -> PageAccess:
        """VTL0's rights on a page; none where there is no RAM."""
        page = gpa // PAGE_SIZE
        return access_of(self._rights[page]) if 0 <= page < self.pages else PageAccess()

    def store(self, page: int) -> int:
        """WRITABLE, SEALED or PRIVATE."""
        return self._store[page]

    def _spans(self, gpa: int, size: int, right: int, vtl: int) -> Iterator[tuple[int, int, int]]:
        """(store, start, end) of stretches in one file, in bytes; checks rights as it goes."""
        if gpa < 0 or size < 0 or gpa + size > self.size:
            raise BadArgument(f"address {gpa:#x}", f"{size} bytes from there are not in {self.size:#x} bytes of RAM")
        start, end = gpa, gpa + size
        while start < end:
            page = start // PAGE_SIZE
            store = self._store[page]
            stop = page
            while stop * PAGE_SIZE < end and self._store[stop] == store:
                if not vtl and not self._rights[stop] & right:
                    name = RIGHT_NAMES[right]
                    at = max(start, stop * PAGE_SIZE)
                    raise Refused(f"page {stop:#x}", f"VTL0 may not {name} it (address {at:#x})", gpa=at)
                stop += 1
            limit = min(end, stop * PAGE_SIZE)
            yield store, start, limit
            start = limit
