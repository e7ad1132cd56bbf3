"""SMRAM: memory of its own at 0xA0000-0xBFFFF, in no RAM file.

Where it shows, its pages stand in the nested table instead of the RAM below, with all rights; where it does not, nobody
can name it: neither VTL0, nor the VMM for a client or a device, nor VTL1. Processors take turns, so one table serves
those that are in SMM and those that are not.
"""

from __future__ import annotations

import mmap

from vtl0_guest.cpu.nested import PAGE_SIZE, SMRAM_BASE, NestedTable
from vtlab.v1 import vcpu_pb2

START, SIZE = 0xA0000, 0x20000
_FIRST, _COUNT = START // PAGE_SIZE, SIZE // PAGE_SIZE
_ALL = vcpu_pb2.PageAccess(read=True, write=True, kernel_execute=True, user_execute=True)


class Smram:
    """Attributes: `buffer`: its bytes, which the engines map at SMRAM_BASE."""

    def __init__(self, nested: NestedTable) -> None:
        self.buffer = mmap.mmap(-1, SIZE)
        self._nested = nested
        self._below: list[tuple[int, int]] | None = None

    def show(self, visible: bool) -> None:
        """To be called before a processor runs, and before anybody programs the nested table (hidden)."""
        if visible == (self._below is not None):
            return
        nested = self._nested
        if visible:
            pages = range(_FIRST, _FIRST + _COUNT)
            self._below = [(nested.entry(page), nested.entry(page, user=True)) for page in pages]
            nested.map(_FIRST, _COUNT, SMRAM_BASE - START, _ALL)
            return
        below, self._below = self._below, None
        for page, entries in enumerate(below or (), _FIRST):
            nested.restore(page, entries)

    def gpa_of(self, system_physical: int) -> int:
        """Of a place in it."""
        return START + (system_physical - SMRAM_BASE)
