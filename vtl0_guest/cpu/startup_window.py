"""What a processor may execute between SIPI and the end of its window, by nested roots of its own.

The roots share the level's leaf tables, so rights of data are those of everybody; no-execute in the entries above them
takes execution away from all pages at once. Only the 2 MiB areas that hold pages of the window have leaf tables of
their own, copied from the level's whenever the engine takes up a change. The user root executes nothing, and the kernel
root all pages of the window: also one that nobody executes elsewhere, as the code that wakes from S3.
"""

from __future__ import annotations

from vtl0_guest.cpu.nested import NX, NestedTable
from vtlab.errors import BadArgument

_ENTRIES = 512
MAX_AREAS = 4
"""2 MiB areas in which the pages of one window may lie."""

Runs = tuple[tuple[int, int], ...]
"""(first guest page, number of pages)."""


def checked(flat: list[int], ram_pages: int) -> Runs:
    """Pairs from an update. Raises BadArgument."""
    runs = tuple(zip(flat[::2], flat[1::2], strict=False))
    if len(flat) % 2 or any(first + count > ram_pages for first, count in runs):
        raise BadArgument("StartupWindow.runs", f"not pairs within {ram_pages:#x} pages")
    if len(_areas(runs)) > MAX_AREAS:
        raise BadArgument("StartupWindow.runs", f"more than {MAX_AREAS} areas of 2 MiB")
    return runs


def contains(runs: Runs, page: int) -> bool:
    return any(first <= page < first + count for first, count in runs)


def _areas(runs: Runs) -> list[int]:
    areas: set[int] = set()
    for first, count in runs:
        if count:
            areas.update(range(first // _ENTRIES, (first + count - 1) // _ENTRIES + 1))
            if len(areas) > MAX_AREAS:
                break
    return sorted(areas)


def roots(nested: NestedTable, number: int, runs: Runs) -> tuple[int, int]:
    """Builds the tables of processor `number` from the level's as they are now; kernel and user root."""
    base, words = nested.window_base(number), nested.words
    kernel, user, pdpt, directories = base, base + 1, base + 2, base + 3
    leaves = directories + nested.directories
    words[kernel * _ENTRIES] = nested.table_entry(pdpt)
    words[user * _ENTRIES] = nested.table_entry(pdpt) | NX
    for index in range(nested.directories):
        words[pdpt * _ENTRIES + index] = nested.table_entry(directories + index)
    first_leaf = nested.first_leaf
    at = directories * _ENTRIES
    for index in range(nested.leaf_tables):
        words[at + index] = nested.table_entry(first_leaf + index) | NX
    for slot, area in enumerate(_areas(runs)):
        source = (first_leaf + area) * _ENTRIES
        for index in range(_ENTRIES):
            word = words[source + index]
            page = area * _ENTRIES + index
            words[(leaves + slot) * _ENTRIES + index] = word and (word & ~NX if contains(runs, page) else word | NX)
        words[at + area] = nested.table_entry(leaves + slot)
    return nested.table_address(kernel), nested.table_address(user)
