"""Guest memory as one processor of one level sees it: physical by the nested table, virtual by the guest's tables too.

Every access that the core makes for the guest (frames, operands, descriptors) comes through here, so the core can
do nothing that the guest itself could not. A refusal by the nested table raises NestedFault, one by the guest's own
tables GuestFault (#PF, or #GP and #SS for addresses that are not canonical).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vtl0_guest.cpu import layout
from vtl0_guest.cpu.devices.bus import MmioDevice
from vtl0_guest.cpu.devices.mmio import load, store
from vtl0_guest.cpu.environment import Environment
from vtl0_guest.cpu.faults import CannotEmulate, GuestFault, NestedFault
from vtl0_guest.cpu.nested import ADDRESS, REGION_SHIFT, RW, NestedTable, P
from vtlab.v1 import vcpu_pb2
from vtlab.x86 import paging
from vtlab.x86.registers import Efer, Rflags, Vector

READ, WRITE, EXECUTE = vcpu_pb2.ACCESS_KIND_READ, vcpu_pb2.ACCESS_KIND_WRITE, vcpu_pb2.ACCESS_KIND_EXECUTE
PAGE = 4096
_Q, _I = struct.Struct("<Q"), struct.Struct("<I")
_AC = int(Rflags.AC)
_CR, _EFER = layout.CR // 8, layout.EFER // 8
_LMA = int(Efer.LMA)
# Accessed and dirty bits change without a change of the mapping.
_IGNORE_ACCESSED = ~0x60 & (1 << 64) - 1
_MAX_MAPPINGS = 4096
_LARGE_MASKS = {39: 0, 30: (1 << 30) - 1, 21: (1 << 21) - 1, 12: 0xFFF}


class _Mapping(NamedTuple):
    """A page of a 4-level address space: where it is, if it may be read, and the entries that led to it."""

    frame: int
    view: memoryview | None
    offset: int
    entries: tuple[tuple[memoryview, int, int], ...]
    generation: int


class PhysicalMemory:
    """Physical access of a level, shared by its processors."""

    def __init__(self, nested: NestedTable, views: Sequence[memoryview | None], stored: Callable[[int], None]) -> None:
        """`views` is indexed by region (nested.py); `stored` is told the page of each store made here."""
        self.nested = nested
        self._views = views
        self._stored = stored
        self._words = [None if view is None else view.cast("Q") for view in views]

    def close(self) -> None:
        """Lets go of the views, which else would keep the files mapped."""
        for words in self._words:
            if words is not None:
                words.release()

    def _place(self, gpa: int, need: int, access: vcpu_pb2.AccessKind.ValueType) -> tuple[memoryview, int]:
        entry = self.nested.entry(gpa >> 12)
        view = self._views[(entry & ADDRESS) >> REGION_SHIFT] if entry & P else None
        if view is None or entry & need != need or (access == WRITE and view.readonly):
            raise NestedFault(gpa, access)
        return view, (entry & ADDRESS & (1 << REGION_SHIFT) - 1) + (gpa & 0xFFF)

    def place(self, gpa: int) -> tuple[memoryview | None, int]:
        """The file and the offset that back a page that may be read; None if there is none."""
        try:
            return self._place(gpa, P, READ)
        except NestedFault:
            return None, 0

    def read(self, gpa: int, size: int, access: vcpu_pb2.AccessKind.ValueType = READ) -> bytes:
        """Bytes within one page. Raises NestedFault."""
        view, at = self._place(gpa, P, access)
        return bytes(view[at : at + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Writes within one page. Raises NestedFault, with nothing written."""
        view, at = self._place(gpa, P | RW, WRITE)
        view[at : at + len(data)] = data
        self._stored(gpa >> 12)

    def read_entry(self, gpa: int, size: int) -> int:
        """A guest page-table entry, for a walk. Walks count as writes (AMD APM volume 2, 15.25.5)."""
        try:
            view, at = self._place(gpa, P | RW, READ)
        except NestedFault as fault:
            fault.page_walk = True
            raise
        value: int = (_Q if size == 8 else _I).unpack_from(view, at)[0]
        return value

    def quadword(self, gpa: int) -> tuple[memoryview, int]:
        """An aligned guest page-table entry as (64-bit words, index). Raises NestedFault."""
        entry = self.nested.entry(gpa >> 12)
        words = self._words[(entry & ADDRESS) >> REGION_SHIFT] if entry & P else None
        if words is None:
            raise NestedFault(gpa, READ)
        return words, ((entry & ADDRESS & (1 << REGION_SHIFT) - 1) + (gpa & 0xFF8)) // 8

    def update_entry(self, update: paging.EntryUpdate) -> None:
        """Sets A and D. A table whose entries VTL1 keeps read-only has them set: nothing is written to it."""
        view, at = self._place(update.address, P | RW, READ)
        if not view.readonly:
            (_Q if update.size == 8 else _I).pack_into(view, at, update.new)

    def store_judged(self, gpa: int, data: bytes) -> None:
        """A store that was refused and then allowed once, whatever the nested rights.

        A page whose file this process cannot write was written by whoever allowed the store: its bytes are compared.

        Raises:
            CannotEmulate: the bytes are not there, or no file backs the page.
        """
        for at, piece in _pieces(gpa, data):
            entry = self.nested.entry(at >> 12)
            view = self._views[(entry & ADDRESS) >> REGION_SHIFT] if entry & P else None
            offset = (entry & ADDRESS & (1 << REGION_SHIFT) - 1) + (at & 0xFFF)
            if view is not None and not view.readonly:
                view[offset : offset + len(piece)] = piece
                self._stored(at >> 12)
            elif view is None or view[offset : offset + len(piece)] != piece:
                raise CannotEmulate(f"the store to {gpa:#x} was committed but its bytes are not in memory")

    def check(self, gpa: int, access: vcpu_pb2.AccessKind.ValueType) -> None:
        """Raises NestedFault if the access would be refused."""
        self._place(gpa, P | RW if access == WRITE else P, access)


def _pieces(address: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Splits at page boundaries."""
    while data:
        part = min(len(data), PAGE - (address & 0xFFF))
        yield address, data[:part]
        address, data = address + part, data[part:]


class GuestMemory:
    """Virtual access of one processor."""

    def __init__(
        self, physical: PhysicalMemory, environment: Environment, device_at: Callable[[int], MmioDevice | None]
    ) -> None:
        """`device_at` names the device that answers at a guest-physical address in place of memory."""
        self.physical = physical
        self._device_at = device_at
        self._environment = environment
        self._mappings: dict[tuple[int, int], _Mapping] = {}

    def translate(
        self,
        gva: int,
        access: vcpu_pb2.AccessKind.ValueType,
        *,
        implicit: bool = False,
        user: bool | None = None,
        stack: bool = False,
    ) -> int:
        """Guest-physical address of one access; sets A and D. Raises GuestFault or NestedFault."""
        environment = self._environment
        words = environment.words
        if not words[_CR] & 0x8000_0000:
            return gva & 0xFFFF_FFFF
        try:
            result = paging.walk(
                self.physical.read_entry,
                cr0=words[_CR],
                cr3=words[_CR + 3],
                cr4=words[_CR + 4],
                efer=environment.efer,
                gva=gva,
                access=access,
                user=environment.cpl == 3 if user is None else user,
                implicit=implicit,
                ac=bool(environment.rflags & _AC),
            )
        except paging.NonCanonicalAddress:
            raise GuestFault(Vector.SS if stack else Vector.GP, 0) from None
        except NestedFault as fault:
            fault.gva = gva
            raise
        if isinstance(result, paging.PageFault):
            raise GuestFault(Vector.PF, result.error_code, result.address)
        for update in result.updates:
            self.physical.update_entry(update)
        return result.gpa

    def read(self, gva: int, size: int, *, implicit: bool = False, stack: bool = False) -> bytes:
        """Reads across pages. Raises GuestFault or NestedFault."""
        out = b""
        while size:
            part = min(size, PAGE - (gva & 0xFFF))
            gpa = self.translate(gva, READ, implicit=implicit, stack=stack)
            try:
                out += self.physical.read(gpa, part)
            except NestedFault as fault:
                device = self._device_at(gpa)
                if device is None:
                    fault.gva = gva
                    raise
                out += load(device, gpa & 0xFFF, part)
            gva += part
            size -= part
        return out

    def read_int(self, gva: int, size: int, *, implicit: bool = False, stack: bool = False) -> int:
        return int.from_bytes(self.read(gva, size, implicit=implicit, stack=stack), "little")

    def write(
        self, gva: int, data: bytes, *, implicit: bool = False, user: bool | None = None, stack: bool = False
    ) -> None:
        """Writes across pages; nothing is written unless all of it may be. Raises GuestFault or NestedFault."""
        pieces = []
        at = 0
        while at < len(data):
            part = min(len(data) - at, PAGE - (gva + at & 0xFFF))
            gpa = self.translate(gva + at, WRITE, implicit=implicit, user=user, stack=stack)
            device = None
            try:
                self.physical.check(gpa, WRITE)
            except NestedFault as fault:
                device = self._device_at(gpa)
                if device is None:
                    fault.gva, fault.data = gva + at, data[at : at + part]
                    raise
            pieces.append((gpa, data[at : at + part], device))
            at += part
        for gpa, piece, device in pieces:
            if device is None:
                self.physical.write(gpa, piece)
            else:
                store(device, gpa & 0xFFF, piece)

    def probe_write(self, gva: int, size: int) -> None:
        """Raises what a write would raise, and writes nothing."""
        for at in {gva, gva + size - 1}:
            gpa = self.translate(at, WRITE)
            try:
                self.physical.check(gpa, WRITE)
            except NestedFault as fault:
                if self._device_at(gpa) is None:
                    fault.gva = at
                    raise

    def code_gpa(self, gva: int) -> int | None:
        """Where an address lies, without checks of rights: for what the engine has just accessed. None if nowhere."""
        words = self._environment.words
        if not words[_CR] & 0x8000_0000:
            return gva & 0xFFFF_FFFF
        if not self._environment.long_mode:
            try:
                return self.translate(gva, EXECUTE, implicit=True)
            except (GuestFault, NestedFault):
                return None
        found = self._mapping(words[_CR + 3], gva)
        return None if found is None else found.frame | gva & 0xFFF

    def _mapping(self, cr3: int, gva: int) -> _Mapping | None:
        """4-level walk, remembered: each use compares the entries with those that were walked."""
        key = (cr3, gva >> 12)
        known = self._mappings.get(key)
        if known is not None and self._holds(known):
            return known
        found = self._walk_mapping(cr3, gva)
        if found is not None:
            if len(self._mappings) >= _MAX_MAPPINGS:
                self._mappings.clear()
            self._mappings[key] = found
        return found

    def _holds(self, known: _Mapping) -> bool:
        """The guest's entries and the nested table are as they were, and paging is what it was for."""
        if known.generation != self.physical.nested.generation or not self._environment.words[_EFER] & _LMA:
            return False
        for view, index, value in known.entries:  # noqa: SIM110 - a generator takes twice as long
            if view[index] & _IGNORE_ACCESSED != value:
                return False
        return True

    def _walk_mapping(self, cr3: int, gva: int) -> _Mapping | None:
        table, entries = cr3 & ADDRESS, []
        try:
            for shift, large in _LARGE_MASKS.items():
                words, at = self.physical.quadword(table + (gva >> shift & 0x1FF) * 8)
                value = words[at] & _IGNORE_ACCESSED
                entries.append((words, at, value))
                if not value & 1:
                    return None
                if shift == 12 or (value & 0x80 and large):
                    frame = (value & ADDRESS & ~large) | (gva & large & ~0xFFF)
                    view, offset = self.physical.place(frame)
                    return _Mapping(frame, view, offset, tuple(entries), self.physical.nested.generation)
                table = value & ADDRESS
        except NestedFault:
            pass
        return None

    def code(self, gva: int, size: int = 15) -> bytes:
        """Up to `size` instruction bytes; fewer where the next page cannot be read."""
        known = self._mappings.get((self._environment.words[_CR + 3], gva >> 12))
        at = gva & 0xFFF
        if known is not None and known.view is not None and at <= PAGE - size and self._holds(known):
            return bytes(known.view[known.offset + at : known.offset + at + size])
        out = b""
        while len(out) < size:
            gpa = self.code_gpa(gva + len(out))
            if gpa is None:
                break
            try:
                out += self.physical.read(gpa, min(size - len(out), PAGE - (gpa & 0xFFF)))
            except NestedFault:
                break
        return out
