"""Rights and store of one guest page as a byte, so that a million pages are a megabyte and compare at C speed.

Bits 0-3: read, write, kernel execute, user execute; bit 4: page-table page (contract: PageAccess.page_table); bits 7:5:
number of the PageStore.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vtlab.v1 import vcpu_pb2

READ = 1
WRITE = 2
KERNEL_EXECUTE = 4
USER_EXECUTE = 8
PAGE_TABLE = 16
RIGHTS = READ | WRITE | KERNEL_EXECUTE | USER_EXECUTE
STORE_SHIFT = 5

WRITABLE = int(vcpu_pb2.PAGE_STORE_WRITABLE) << STORE_SHIFT
SEALED = int(vcpu_pb2.PAGE_STORE_SEALED) << STORE_SHIFT
PRIVATE = int(vcpu_pb2.PAGE_STORE_PRIVATE) << STORE_SHIFT
STORE_MASK = 7 << STORE_SHIFT

INITIAL = READ | WRITE | KERNEL_EXECUTE | USER_EXECUTE | WRITABLE
"""Every page before a policy."""
GUARDED_TABLE = READ | PAGE_TABLE | SEALED
"""A page-table page that only VTL1 writes."""
PRIVATE_PAGE = PRIVATE


class Run(NamedTuple):
    """Adjacent guest pages: number of the first, how many."""

    first: int
    pages: int

    @property
    def end(self) -> int:
        return self.first + self.pages


class Change(NamedTuple):
    """What pages are to become, and the rule that says so."""

    run: Run
    code: int
    owner: str


class Scattered(NamedTuple):
    """The same for single pages by their numbers, of which there may be thousands."""

    pages: list[int]
    code: int
    owner: str


def page_code(*, read: bool, write: bool, kernel_execute: bool, user_execute: bool, private: bool = False) -> int:
    """Code of a page. Without write it is sealed; private pages have no rights at VTL0."""
    rights = READ * read | WRITE * write | KERNEL_EXECUTE * kernel_execute | USER_EXECUTE * user_execute
    if private:
        return PRIVATE_PAGE
    return rights | (WRITABLE if write else SEALED)


def access_text(code: int) -> str:
    """Code for people: "r-x kernel", "--- private"."""
    text = ("r" if code & READ else "-") + ("w" if code & WRITE else "-")
    text += "x" if code & (KERNEL_EXECUTE | USER_EXECUTE) else "-"
    who = {KERNEL_EXECUTE: " kernel", USER_EXECUTE: " user"}.get(code & (KERNEL_EXECUTE | USER_EXECUTE), "")
    if code & STORE_MASK == PRIVATE:
        who = " private"
    return text + who + (" page table" if code & PAGE_TABLE else "")


def page_access(code: int) -> vcpu_pb2.PageAccess:
    """Rights as the contract has them."""
    return vcpu_pb2.PageAccess(
        read=bool(code & READ),
        write=bool(code & WRITE),
        kernel_execute=bool(code & KERNEL_EXECUTE),
        user_execute=bool(code & USER_EXECUTE),
        page_table=bool(code & PAGE_TABLE),
    )


def protection_update(code: int, runs: Iterable[Run]) -> vcpu_pb2.ProtectionUpdate:
    """The update that gives pages this code."""
    return flat_protection_update(code, [number for run in runs for number in run])


def flat_protection_update(code: int, numbers: Sequence[int]) -> vcpu_pb2.ProtectionUpdate:
    """The same for many runs: first page and number of pages, alternately."""
    store = vcpu_pb2.PageStore.ValueType((code & STORE_MASK) >> STORE_SHIFT)
    return vcpu_pb2.ProtectionUpdate(runs=numbers, access=page_access(code), store=store)


def merge(runs: Iterable[Run]) -> list[Run]:
    """Sorted, with adjacent and overlapping runs joined."""
    merged: list[Run] = []
    for run in sorted(runs):
        if merged and run.first <= merged[-1].end:
            last = merged[-1]
            merged[-1] = Run(last.first, max(last.end, run.end) - last.first)
        else:
            merged.append(run)
    return merged


def runs_of(pages: Iterable[int]) -> list[Run]:
    """The pages as runs."""
    return merge(Run(page, 1) for page in pages)
