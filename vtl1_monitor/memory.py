"""Guest memory as VTL1 knows it: which file holds a page, what VTL0 may do with it, which rule says so.

VTL1 has all three files open; what it does for VTL0 (arguments, results) goes through `read` and `write`, which obey
VTL0's rights, so that no service becomes a confused deputy. What it guards is read with `sealed`, never from `ram.rw`.
"""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from vtl1_monitor import rights
from vtl1_monitor.rights import Change, Run, Scattered
from vtlab.ram import PAGE_SIZE, Ram, RamFile
from vtlab.v1 import vcpu_pb2
from vtlab.x86 import paging

_FILE = {rights.WRITABLE: RamFile.WRITABLE, rights.SEALED: RamFile.SEALED, rights.PRIVATE: RamFile.PRIVATE}


_SAME = re.compile(rb"(.)\1*", re.DOTALL)
"""Bytes that are equal, as many as possible: finds runs of pages at C speed."""


_NOT_ZERO = re.compile(rb"[^\0]+", re.DOTALL)


def _difference(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    """Zero where two strings of the same length agree; costs nothing for each place where they do not."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


class GuestFault(Exception):
    """VTL0 may not do this access, or it is not RAM: the caller's argument is bad. `gpa` is the first bad byte."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"{gpa:#x} is not accessible to VTL0")
        self.gpa = gpa


class GuestMemory:
    """Pages of one machine.

    Attributes:
        size: bytes of RAM.
        codes: one byte a page (vtl1_monitor.rights).
        version: counts calls of record().
    """

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.size = ram.size
        self.pages = ram.size // PAGE_SIZE
        self.codes = bytearray([rights.INITIAL]) * self.pages
        self.version = 0
        self._owners = array("H", bytes(2 * self.pages))
        self._owner_names: list[str] = [""]
        self._owner_numbers: dict[str, int] = {"": 0}

    def owners(self) -> tuple[bytes, list[str]]:
        """Which rule owns each page, as numbers (u16 a page) and their names."""
        return self._owners.tobytes(), list(self._owner_names)

    def set_owners(self, owners: tuple[bytes, list[str]]) -> None:
        """The inverse of owners()."""
        numbers, names = owners
        self._owners = array("H", numbers)
        self._owner_names = list(names)
        self._owner_numbers = {name: number for number, name in enumerate(names)}

    def code(self, gfn: int) -> int | None:
        """Code of a page; None outside RAM."""
        return self.codes[gfn] if 0 <= gfn < self.pages else None

    def codes_in(self, run: Run) -> set[int] | None:
        """The different codes in a run; None if it leaves RAM."""
        if run.first < 0 or run.end > self.pages:
            return None
        return set(self.codes[run.first : run.end])

    def owner(self, gfn: int) -> str:
        """Name of the rule that gave the page its rights; "" if none did."""
        return self._owner_names[self._owners[gfn]] if 0 <= gfn < self.pages else ""

    def codes_of(self, pages: Iterable[int]) -> Iterator[int]:
        """The code of each of these pages, which are in RAM."""
        return map(self.codes.__getitem__, pages)

    def owners_of(self, pages: Iterable[int]) -> Iterator[str]:
        """The owner of each of these pages, which are in RAM."""
        return map(self._owner_names.__getitem__, map(self._owners.__getitem__, pages))

    def pieces(self, run: Run) -> Iterator[tuple[Run, int, str]]:
        """A run cut where code or owner changes."""
        if run.pages == 1:
            yield run, self.codes[run.first], self._owner_names[self._owners[run.first]]
            return
        for same_code in _SAME.finditer(self.codes, run.first, run.end):
            first, last = same_code.span()
            code = self.codes[first]
            while first < last:
                owner = self._owners[first]
                end = last
                if self._owners[first:last].count(owner) < last - first:
                    end = next(gfn for gfn in range(first, last) if self._owners[gfn] != owner)
                yield Run(first, end - first), code, self._owner_names[owner]
                first = end

    def protect_message(
        self, changes: Sequence[Change], scattered: Sequence[Scattered] = ()
    ) -> vcpu_pb2.Protect | None:
        """What to ask for so that the changes hold; a later change wins. None if all pages already are so."""
        spans = [(run.first, run.end) for run, _, _ in changes]
        spans += [(min(pages), max(pages) + 1) for pages, _, _ in scattered]
        low, high = min((first for first, _ in spans), default=0), max((end for _, end in spans), default=0)
        present = self.codes[low:high]
        wanted = bytearray(present)
        for (first, count), code, _ in changes:
            wanted[first - low : first - low + count] = bytes([code]) * count
        for pages, code, _ in scattered:
            for page in pages:
                wanted[page - low] = code
        by_code: dict[int, list[int]] = {}  # first page and number of pages, alternately
        for different in _NOT_ZERO.finditer(_difference(wanted, present)):
            first, end = different.span()
            if end - first == 1:
                by_code.setdefault(wanted[first], []).extend((low + first, 1))
                continue
            for same in _SAME.finditer(wanted, first, end):
                first, end = same.span()
                by_code.setdefault(wanted[first], []).extend((low + first, end - first))
        if not by_code:
            return None
        # Pages are closed before others are opened.
        order = sorted(by_code, key=lambda code: (code & rights.STORE_MASK == rights.WRITABLE, code))
        updates = [rights.flat_protection_update(code, by_code[code]) for code in order]
        return vcpu_pb2.Protect(protections=updates)

    def record(self, changes: Iterable[Change], scattered: Iterable[Scattered] = ()) -> None:
        """Notes that the changes hold on every vCPU."""
        self.version += 1
        for (first, count), code, owner in changes:
            self.codes[first : first + count] = bytes([code]) * count
            self._owners[first : first + count] = array("H", [self._owner_number(owner)]) * count
        codes, owners = self.codes, self._owners
        for pages, code, owner in scattered:
            number = self._owner_number(owner)
            for page in pages:
                codes[page] = code
                owners[page] = number

    def _owner_number(self, owner: str) -> int:
        number = self._owner_numbers.setdefault(owner, len(self._owner_names))
        if number == len(self._owner_names):
            self._owner_names.append(owner)
        return number

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of bytes that VTL0 can read. Raises GuestFault."""
        return b"".join(
            self.ram.views[_FILE[code & rights.STORE_MASK]][start : start + length]
            for start, length, code in self._checked(gpa, size, rights.READ)
        )

    def write(self, gpa: int, data: bytes) -> None:
        """Writes where VTL0 could have written. Raises GuestFault before anything is written."""
        parts = list(self._checked(gpa, len(data), rights.WRITE))
        for start, length, _ in parts:
            self.ram.views[RamFile.WRITABLE][start : start + length] = data[start - gpa : start - gpa + length]

    def _checked(self, gpa: int, size: int, right: int) -> Iterator[tuple[int, int, int]]:
        if gpa < 0 or gpa + size > self.size:
            raise GuestFault(gpa if not 0 <= gpa < self.size else self.size)
        end = gpa + size
        while gpa < end:
            code = self.codes[gpa // PAGE_SIZE]
            if not code & right:
                raise GuestFault(gpa)
            length = min(end, (gpa // PAGE_SIZE + 1) * PAGE_SIZE) - gpa
            yield gpa, length, code
            gpa += length

    def is_sealed(self, gpa: int, size: int) -> bool:
        """True if VTL0 can write none of the bytes and all are in `ram.ro`."""
        if size <= 0 or gpa < 0 or gpa + size > self.size:
            return False
        run = Run(gpa // PAGE_SIZE, (gpa + size - 1) // PAGE_SIZE - gpa // PAGE_SIZE + 1)
        return all(code & rights.STORE_MASK == rights.SEALED for code in self.codes_in(run) or {0})

    def sealed(self, gpa: int, size: int) -> bytes:
        """A copy of sealed bytes, readable by VTL0 or not. Raises GuestFault if one is not sealed."""
        if not self.is_sealed(gpa, size):
            raise GuestFault(gpa)
        return self.ram.views[RamFile.SEALED][gpa : gpa + size]

    def write_sealed(self, gpa: int, data: bytes) -> None:
        """Changes sealed bytes: VTL0 sees them at once as data, as code after InvalidateCode. Raises GuestFault."""
        if not self.is_sealed(gpa, len(data)):
            raise GuestFault(gpa)
        self.ram.views[RamFile.SEALED][gpa : gpa + len(data)] = data

    def table(self, gfn: int) -> bytes:
        """A page as the page walker sees it, from the file that backs it. Raises GuestFault for VTL1's own pages."""
        return self._walked(gfn)[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]

    def _walked(self, gfn: int) -> mmap.mmap:
        """The file that the walker reads this page from."""
        code = self.code(gfn)
        if code is None or code & rights.STORE_MASK == rights.PRIVATE:
            raise GuestFault(gfn * PAGE_SIZE)
        return self.ram.views[_FILE[code & rights.STORE_MASK]]

    def translator(self, *, cr0: int, cr3: int, cr4: int, efer: int) -> Callable[[int], int | None]:
        """Translation by VTL0's page tables: GVA -> GPA, None where nothing is mapped."""

        def read_entry(gpa: int, size: int) -> int:
            view = self._walked(gpa // PAGE_SIZE)
            return int.from_bytes(view[gpa : gpa + size], "little")

        def translate(gva: int) -> int | None:
            try:
                result = paging.walk(read_entry, cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, gva=gva, implicit=False, ac=True)
            except (GuestFault, paging.NonCanonicalAddress, paging.UnsupportedPaging):
                return None
            return result.gpa if isinstance(result, paging.Translation) else None

        return translate
