"""The page tables that only VTL1 writes: which pages, at which level, referred to how often. One owner: the machine.

Methods that need protections changed are generators: they yield Protect and get its status (see services.call).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable

from vtl1_monitor import page_tables, rights
from vtl1_monitor.memory import GuestFault, GuestMemory
from vtl1_monitor.page_tables import ROOT_LEVEL, BadTables
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.steps import Protect, protect
from vtlab.ram import PAGE_SIZE

OWNER = "page_tables"
MODULES = "modules"
"""Owner of the memory of validated modules."""


class Busy(Exception):
    """The table page is still in use."""


class TableGuard:
    """Attributes: `levels`: guarded page -> its levels; `roots`: page numbers that may be loaded into CR3.

    Args:
        by_rules: the change that makes a page what the policy has for it, for pages that are no tables any more.
    """

    def __init__(self, memory: GuestMemory, by_rules: Callable[[int], Change]) -> None:
        self.levels: dict[int, frozenset[int]] = {}
        self.roots: set[int] = set()
        self._memory = memory
        self._by_rules = by_rules
        self._references: Counter[int] = Counter()

    @property
    def root_bases(self) -> frozenset[int]:
        """Roots as in CR3."""
        return frozenset(root * PAGE_SIZE for root in self.roots)

    def recount(self) -> None:
        """References as the tables in memory have them: a monitor that died may have written one it did not count."""
        self._references.clear()
        for gfn, levels in self.levels.items():
            for entry in page_tables.entries(self._sealed(gfn)):
                self._count(entry, levels, 1)

    def forget(self, gfn: int) -> None:
        """The page was given back to VTL0 by a monitor that died before it could say so."""
        if self.levels.pop(gfn, None) is not None:
            self.roots.discard(gfn)
            self.recount()

    def add_first_root(self, root: int) -> Generator[Protect, int, None]:
        """Guards the tables that VTL0 runs on while it still is trusted: their form is checked, not what they map.

        Raises:
            BadTables: a table is outside RAM, in VTL1's memory, or the tables changed while they were sealed.
        """
        found = page_tables.find(root, self._readable, self._memory.pages)
        yield from self._seal(found)
        if page_tables.find(root, self._sealed, self._memory.pages) != found:
            raise BadTables("the tables changed while they were sealed")
        self._adopt(found)
        self.roots.add(root)

    def add_root(self, root: int) -> Generator[Protect, int, None]:
        """Guards a new address space. Raises BadTables, after everything is as before."""
        if root in self.roots:
            return
        yield from self._guard_new(root, ROOT_LEVEL)
        try:
            self._check_root(root)
        except BadTables:
            yield from self._unguard_unreferenced(root)
            raise
        self.roots.add(root)

    def write(self, gpa: int, value: int) -> Generator[Protect, int, None]:
        """Writes one entry. Raises BadTables, or KeyError if the page is not guarded."""
        gfn = gpa // PAGE_SIZE
        levels = self.levels[gfn]
        old = int.from_bytes(self._memory.sealed(gpa, 8), "little")
        new = value
        for level in levels:
            new = page_tables.with_accessed(new, level)
        if new == old:
            return
        for level in levels:
            if self._maps_protected(old, level):
                raise BadTables(f"entry {old:#x} maps protected memory and stays as it is")
            self._check_entry(value, level)
        added: list[int] = []
        for level in levels:
            below = page_tables.child(value, level)
            if below is not None and below.gfn not in self.levels:
                yield from self._guard_new(below.gfn, below.level)
                added.append(below.gfn)
        self._memory.write_sealed(gpa, new.to_bytes(8, "little"))
        self._count(old, levels, -1)
        self._count(new, levels, 1)

    def release(self, gfn: int, loaded: int, *, only_processor: bool) -> Generator[Protect, int, None]:
        """Gives a table page back to VTL0. Raises Busy, or KeyError if the page is not guarded.

        Args:
            loaded: page number of the root in the caller's CR3.
            only_processor: no other vCPU can have it loaded.
        """
        levels = self.levels[gfn]
        if self._references[gfn]:
            raise Busy(f"{self._references[gfn]} entries refer to {gfn * PAGE_SIZE:#x}")
        if gfn in self.roots and (gfn == loaded or not only_processor):
            raise Busy(f"root {gfn * PAGE_SIZE:#x} may be loaded")
        for entry in page_tables.entries(self._sealed(gfn)):
            self._count(entry, levels, -1)
        del self.levels[gfn]
        self.roots.discard(gfn)
        yield from self._open([gfn])

    def _readable(self, gfn: int) -> bytes:
        try:
            return self._memory.table(gfn)
        except GuestFault:
            raise BadTables(f"table at {gfn * PAGE_SIZE:#x} is memory of VTL1") from None

    def _sealed(self, gfn: int) -> bytes:
        try:
            return self._memory.sealed(gfn * PAGE_SIZE, PAGE_SIZE)
        except GuestFault:
            raise BadTables(f"table at {gfn * PAGE_SIZE:#x} is not sealed") from None

    def _seal(self, pages: Iterable[int]) -> Generator[Protect, int, None]:
        changes = [Change(run, rights.GUARDED_TABLE, OWNER) for run in rights.runs_of(pages)]
        yield from protect(self._memory, changes)

    def _open(self, pages: Iterable[int]) -> Generator[Protect, int, None]:
        yield from protect(self._memory, [self._by_rules(gfn) for gfn in pages])

    def _adopt(self, found: dict[int, frozenset[int]]) -> None:
        for gfn, levels in found.items():
            page = page_tables.normalised(self._sealed(gfn), levels)
            self._memory.write_sealed(gfn * PAGE_SIZE, page)
            self.levels[gfn] = levels
            for entry in page_tables.entries(page):
                self._count(entry, levels, 1)

    def _count(self, entry: int, levels: Iterable[int], step: int) -> None:
        for level in levels:
            below = page_tables.child(entry, level)
            if below is not None:
                self._references[below.gfn] += step

    def _guard_new(self, gfn: int, level: int) -> Generator[Protect, int, None]:
        """Seals a table page and the new ones below it, level by level, and judges every entry in sealed memory."""
        sealed: dict[int, frozenset[int]] = {}
        layer = {gfn}
        try:
            while layer:
                self._check_ordinary(layer)
                yield from self._seal(layer)
                sealed.update(dict.fromkeys(layer, frozenset({level})))
                layer = self._new_children(layer, level, sealed)
                level -= 1
        except BadTables:
            yield from self._open(sealed)
            raise
        self._adopt(sealed)

    def _check_ordinary(self, pages: Iterable[int]) -> None:
        for gfn in pages:
            code = self._memory.code(gfn)
            if code is None or code & rights.STORE_MASK != rights.WRITABLE:
                raise BadTables(f"table at {gfn * PAGE_SIZE:#x} is not ordinary memory")

    def _new_children(self, layer: Iterable[int], level: int, sealed: dict[int, frozenset[int]]) -> set[int]:
        result = set()
        for gfn in layer:
            for entry in page_tables.entries(self._sealed(gfn)):
                self._check_entry(entry, level, sealed)
                below = page_tables.child(entry, level)
                if below is not None and below.gfn not in self.levels:
                    result.add(below.gfn)
        if len(self.levels) + len(sealed) + len(result) > page_tables.MAX_TABLES:
            raise BadTables(f"there are more than {page_tables.MAX_TABLES} table pages")
        return result

    def _check_entry(self, entry: int, level: int, new: dict[int, frozenset[int]] | None = None) -> None:
        page_tables.check_format(entry, level)
        run = page_tables.mapped(entry, level)
        if run is not None:
            page_tables.check_mapping(entry, self._memory.codes_in(run))
            return
        below = page_tables.child(entry, level)
        if below is None:
            return
        known = self.levels.get(below.gfn) or (new or {}).get(below.gfn)
        if known is not None and known != frozenset({below.level}):
            raise BadTables(f"entry {entry:#x}: {below.gfn * PAGE_SIZE:#x} is no table of level {below.level}")

    def _maps_protected(self, entry: int, level: int) -> bool:
        run = page_tables.mapped(entry, level)
        if run is not None:
            return self._is_protected(run)
        below = page_tables.child(entry, level)
        if below is None or below.gfn not in self.levels:
            return False
        if len(self.levels[below.gfn]) > 1:
            return True  # a recursive mapping leads everywhere
        return any(self._maps_protected(one, below.level) for one in page_tables.entries(self._sealed(below.gfn)))

    def _is_protected(self, run: Run) -> bool:
        """True if mappings of a page among them stay as they are. A module's may go, as the module may."""
        codes = self._memory.codes_in(run)
        if codes is None or all(code & rights.STORE_MASK == rights.WRITABLE for code in codes):
            return False
        return any(
            code & rights.STORE_MASK != rights.WRITABLE and owner != MODULES
            for _, code, owner in self._memory.pieces(run)
        )

    def _check_root(self, root: int) -> None:
        """Where a known root maps protected memory, a new one has the same entry."""
        known = page_tables.entries(self._sealed(min(self.roots))) if self.roots else ()
        for index, (old, new) in enumerate(zip(known, page_tables.entries(self._sealed(root)), strict=False)):
            if old != new and self._maps_protected(old, ROOT_LEVEL):
                raise BadTables(f"root {root * PAGE_SIZE:#x}: entry {index} maps protected memory otherwise")

    def _unguard_unreferenced(self, root: int) -> Generator[Protect, int, None]:
        """Undoes `_guard_new` of a root."""
        pending, freed = [root], []
        while pending:
            gfn = pending.pop()
            if self._references[gfn] or gfn in self.roots or gfn not in self.levels:
                continue
            levels = self.levels.pop(gfn)
            freed.append(gfn)
            for entry in page_tables.entries(self._sealed(gfn)):
                self._count(entry, levels, -1)
                pending += [below.gfn for level in levels if (below := page_tables.child(entry, level)) is not None]
        yield from self._open(freed)
