"""Engine functions replaced by machine code: loads of page-table entries, and stores to pages that may hold code.

- QEMU walks guest tables through the nested table by general physical loads, twenty for each translation that its TLB
  misses. The loads of this file find the host memory of the known regions at once.
- QEMU keeps a page's stores slow (TLB_NOTDIRTY) while code was translated from it, whatever address they go through.
  Unicorn lost the bitmap that this needs: it makes the stores of a page fast when no code runs at *their* address, so
  code that is written through another mapping goes on running in its old form (an operating system writes programs
  through its direct map); and it keeps stores to every executable page slow. Here a byte for each page tells whether
  code was translated from it: set before the first block of a page, when all TLB entries that lead there become slow
  again, and cleared when the last block has gone.

The functions are the process's, the memory each engine's: a record describes an engine, and `translate` of
native_hooks.py names the one that runs. Where another engine is named, which happens only if several machines share a
process, the slow way is taken. Calling convention: System V x86-64.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from vtl0_guest.cpu.engine_fixes import write_code
from vtl0_guest.cpu.unicorn_library import EngineUnsupported, address_of

_REGIONS = 6
_MOST_ENGINES = 511
_PAGE = 4096


class Piece(NamedTuple):
    """A region of system-physical memory: host address, bytes, and QEMU's own number of its first byte (ram_addr_t)."""

    host: int
    size: int
    first: int


class _Record(ctypes.Structure):
    """One engine. Never freed, only emptied, so that a late reader finds nothing instead of something else."""

    _fields_ = (
        ("processor", ctypes.c_uint64),  # QEMU's CPUState
        ("engine", ctypes.c_uint64),  # uc_struct
        ("pages", ctypes.c_uint64),
        ("code_map", ctypes.c_uint64),  # a byte for each of `pages`
        ("regions", ctypes.c_uint64 * (4 * _REGIONS)),  # host, size, first, unused
    )


# uc in rdi, ram_addr_t in rsi. Every record of the zero-ended list at r10 is asked; then:
#   map[page] = 1; host address of the page by its region; tail call of tlb_reset_dirty(processor, host, 4096)
_PROTECT = (
    "49ba{records}4d8b1a4983c2084d85db743f493b7b0875ee4889f048c1e80c493b4310732c49034318c600014881e600f0ffff4d8d5320"
    "b9060000004889f0492b4210493b420872094983c220ffc975ebc34903024889c6498b3bba0010000048b8{reset_dirty}ffe0"
)
# The same list; map[page] = 0.
_UNPROTECT = "49ba{records}4d8b1a4983c2084d85db7417493b7b0875ee48c1ee0c493b7310730749037318c60600c3"
# (rdi processor, rsi address, edx size, rcx ram_addr_t - address, r8, r9 TLB entry). If the running engine is this one
# and map[page] is 0: and qword [r9 + 8], ~TLB_NOTDIRTY; ret. Else the old function.
_NOT_DIRTY = (
    "48b8{running}488b00483b3875214c8d140e49c1ea0c4c3b501073134c03501841803a00750949816108fffbffffc3"
    "{before}49bb{rest}41ffe3"
)
# (rdi processor, rsi system-physical address). If the running engine is this one and the address lies in a region, the
# quadword there. Else the old function.
_LOAD = (
    "49ba{running}4d8b12493b3a75304889f048c1e82483f8067324c1e0054d8d5402204889f048c1e01c48c1e81c488d5008493b5208770749"
    "0302488b00c3{before}49bb{rest}41ffe3"
)


class _Replaced(NamedTuple):
    """A function: `before` stands at its start, which lies in `size` bytes from an exported one on."""

    code: str
    function: str
    size: int
    before: bytes


_FUNCTIONS = (
    _Replaced(_PROTECT, "tlb_protect_code_x86_64", 0, bytes.fromhex("4889f7ba01000000be00100000")),
    _Replaced(_UNPROTECT, "tlb_unprotect_code_x86_64", 0, bytes.fromhex("c3")),
    _Replaced(_LOAD, "x86_ldq_phys_x86_64", 0, bytes.fromhex("41554989f541544531e455488b87b0810000")),
    # notdirty_write is static; it lies behind tlb_set_dirty.
    _Replaced(_NOT_DIRTY, "tlb_set_dirty_x86_64", 0x400, bytes.fromhex("41574989ff41564189d64155")),
)
# In notdirty_write: "if no code runs at this address, set dirty" becomes never.
_SETS_DIRTY = bytes.fromhex("48837d10ff747c4883c428")
_NEVER_SETS_DIRTY = bytes.fromhex("48837d10ff90904883c428")
_NOT_DIRTY_SIZE = 0x100
_JUMP_SIZE = 12


def _quad(value: int) -> str:
    return struct.pack("<Q", value).hex()


class _Process:
    """The replaced functions of this process.

    Attributes:
        running: address of the word that holds the running engine's record.
    """

    def __init__(self) -> None:
        self._code = mmap.mmap(-1, 2 * _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        # First page: the list of records. Second: the word, and code.
        self._list = (ctypes.c_uint64 * (_MOST_ENGINES + 1)).from_address(start)
        self._word = ctypes.c_uint64.from_address(start + _PAGE)
        self.running = start + _PAGE
        self._records: list[_Record] = []
        self._free: list[_Record] = []
        self._lock = threading.RLock()  # an engine may be collected, and give its record back, while one is taken
        self._nobody = _Record()
        self._word.value = ctypes.addressof(self._nobody)
        at = _PAGE + 64
        for function in _FUNCTIONS:
            place = _find(function)
            code = bytes.fromhex(
                function.code.format(
                    records=_quad(start),
                    running=_quad(self.running),
                    reset_dirty=_quad(address_of("tlb_reset_dirty_x86_64")),
                    before=function.before.hex(),
                    rest=_quad(place + len(function.before)),
                )
            )
            self._code[at : at + len(code)] = code
            write_code(place, b"\x48\xb8" + struct.pack("<Q", start + at) + b"\xff\xe0")  # mov rax, code; jmp rax
            if function.code is _NOT_DIRTY:
                inside = ctypes.string_at(place, _NOT_DIRTY_SIZE).find(_SETS_DIRTY)
                write_code(place + inside, _NEVER_SETS_DIRTY)
            at += (len(code) + 15) & ~15

    def take(self) -> _Record:
        """A record of the list."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if len(self._records) == _MOST_ENGINES:
                raise EngineUnsupported(f"native memory: more than {_MOST_ENGINES} engines in one process")
            record = _Record()
            self._records.append(record)
            self._list[len(self._records) - 1] = ctypes.addressof(record)
            return record

    def give(self, record: _Record) -> None:
        """Empties a record; its engine never runs again."""
        with self._lock:
            record.processor = record.engine = record.pages = 0
            if self._word.value == ctypes.addressof(record):
                self._word.value = ctypes.addressof(self._nobody)
            self._free.append(record)


def _find(function: _Replaced) -> int:
    """Where the function starts. Raises EngineUnsupported if this library has another one."""
    start = address_of(function.function)
    code = ctypes.string_at(start, (function.size or len(function.before)) + _NOT_DIRTY_SIZE)
    at = code.find(function.before, 0, function.size or len(function.before))
    known = at >= 0
    if function.code is _NOT_DIRTY:
        known = known and code[at : at + _NOT_DIRTY_SIZE].count(_SETS_DIRTY) == 1
    elif function.code is _UNPROTECT:
        # A single instruction; what follows up to the next function is padding, and the jump goes there.
        known = known and address_of("tlb_reset_dirty_x86_64") - start >= _JUMP_SIZE
    if not known:
        raise EngineUnsupported(
            f"Unicorn library: {function.function} is not the one of unicorn 2.1.4 for x86-64 Linux"
        )
    return start + at


_process: _Process | None = None
_creation = threading.Lock()


def _this_process() -> _Process:
    global _process
    with _creation:
        if _process is None:
            _process = _Process()
        return _process


class NativeMemory:
    """The memory of one engine, known to the replaced functions until it is closed.

    Attributes:
        record: address of the engine's record.
        running: address of the word that must hold it while the engine translates addresses.
    """

    def __init__(self, owner: object, processor: int, engine: int, pieces: Mapping[int, Piece]) -> None:
        """Takes addresses of QEMU's CPUState and of Unicorn's structure, and the memory by number of region.

        Args:
            owner: what frees the engine when it goes. A record that named a freed engine would be taken for that of the
                next one at the same address, and its map is gone.
        """
        process = _this_process()
        record = process.take()
        self.record, self.running = ctypes.addressof(record), process.running
        pages = max(piece.first + piece.size for piece in pieces.values()) // _PAGE
        self._map = mmap.mmap(-1, pages)
        for number in range(_REGIONS):
            piece = pieces.get(number, Piece(0, 0, 0))
            record.regions[4 * number : 4 * number + 3] = list(piece)
        record.code_map = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        record.pages = pages
        record.engine, record.processor = engine, processor
        # Callbacks run from the newest to the oldest: this one before that which frees the engine.
        self._release = weakref.finalize(owner, process.give, record)

    def holds_code(self, first: int, count: int) -> bool:
        """Code was translated from one of `count` pages from that ram_addr_t on."""
        page = first // _PAGE
        return self._map.find(b"\1", page, page + count) >= 0

    def close(self) -> None:
        """To be called when the engine runs no more."""
        self._release()
