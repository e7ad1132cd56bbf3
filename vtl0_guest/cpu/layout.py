"""Where the processor's structure lies in the engine's memory, found once per engine and checked.

Unicorn keeps all processor state in QEMU's CPUX86State. Reading and writing it in place costs a tenth of a
microsecond where the API costs two per register. The address is found by magic register values, by following the
pointers of the engine's handle within its own readable memory; the offsets of the first part are the structure's
beginning (general registers, RIP, RFLAGS, hidden flags, segments, control registers), the others are found by magic
values as well. Anything that is not where it should be raises EngineUnsupported: nothing runs.
"""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_right
from dataclasses import dataclass

from unicorn import Uc
from unicorn.x86_const import (
    UC_X86_REG_R8,
    UC_X86_REG_R9,
    UC_X86_REG_R10,
    UC_X86_REG_R11,
    UC_X86_REG_R12,
    UC_X86_REG_R13,
    UC_X86_REG_R14,
    UC_X86_REG_R15,
)

from vtl0_guest.cpu.unicorn_library import EngineUnsupported, address_of
from vtlab.x86.registers import Msr

# Byte offsets in CPUX86State, in its order.
REGISTERS = 0  # 16 × u64: RAX RCX RDX RBX RSP RBP RSI RDI R8-R15
RIP = 128
RFLAGS = 136  # whole while the engine is stopped
HIDDEN_FLAGS = 176
SEGMENTS = 184  # 24 bytes each: selector u32, pad, base u64, limit u32, flags u32: ES CS SS DS FS GS LDT TR GDT IDT
SEGMENT_SIZE = 24
CR = 424  # CR0-CR8 × u64
EFER = 592
STRUCTURE_SIZE = 0x4000  # covers all that the core touches

_HANDLE_SIZE = 0x1000
_PROCESSOR_SIZE = 0xC000  # CPUState with its TLB comes before CPUX86State
_R8_TO_R15 = (
    UC_X86_REG_R8,
    UC_X86_REG_R9,
    UC_X86_REG_R10,
    UC_X86_REG_R11,
    UC_X86_REG_R12,
    UC_X86_REG_R13,
    UC_X86_REG_R14,
    UC_X86_REG_R15,
)
_MAGIC = tuple(0x5A17_0000_C0DE_0000 | number * 0x1111 for number in range(1, 9))

# MSRs whose place is found by a value; the engine stores each of these as a u64 (SYSENTER_CS: u32).
_MSR_MAGIC = {
    Msr.STAR: 0x0023_0010_5A17_0081,
    Msr.LSTAR: 0x0000_5A17_C0DE_0082,
    Msr.CSTAR: 0x0000_5A17_C0DE_0083,
    Msr.SFMASK: 0x5A17_0084,
    Msr.KERNEL_GS_BASE: 0x0000_5A17_C0DE_0102,
    Msr.SYSENTER_ESP: 0x0000_5A17_C0DE_0175,
    Msr.SYSENTER_EIP: 0x0000_5A17_C0DE_0176,
    Msr.PAT: 0x0606_0606_0601_0405,
}


@dataclass(frozen=True)
class Layout:
    """Addresses and offsets of one engine.

    Attributes:
        processor: address of QEMU's CPUState, the argument of its functions.
        environment: address of CPUX86State.
        msrs: MSR index -> byte offset in CPUX86State.
    """

    processor: int
    environment: int
    msrs: dict[int, int]


def _readable_ranges() -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    with open("/proc/self/maps", encoding="ascii") as maps:  # noqa: PTH123 - a pseudo-file, read once
        for line in maps:
            span, rights = line.split(None, 2)[:2]
            if rights.startswith("rw"):
                first, last = (int(part, 16) for part in span.split("-"))
                if ranges and ranges[-1][1] == first:
                    ranges[-1] = (ranges[-1][0], last)
                else:
                    ranges.append((first, last))
    return ranges


def handle_of(uc: Uc) -> int:
    """Address of the engine, `uc_engine *`."""
    handle = uc._uch
    return int((handle.value if handle is not None else 0) or 0)


@dataclass(frozen=True)
class _Places:
    """What is alike in all engines of a process: one library made them.

    Attributes:
        pointer: offset in the handle of the pointer to CPUState.
        environment: offset of CPUX86State in CPUState.
        msrs: as of Layout.
    """

    pointer: int
    environment: int
    msrs: dict[int, int]


# Of the first engine.
_known: _Places | None = None


def find(uc: Uc) -> Layout:
    """Finds the structures of a fresh engine, whose registers it uses. Raises EngineUnsupported if they are absent.

    The first engine of the process is searched, each later one is looked at where the first had them: its registers
    must be there too.
    """
    global _known
    for register, value in zip(_R8_TO_R15, _MAGIC, strict=True):
        uc.reg_write(register, value)
    wanted = struct.pack("<8Q", *_MAGIC)
    if _known is None:
        found, pointer = _search(uc, wanted)
        _known = _Places(pointer, found.environment - found.processor, found.msrs)
        return found
    processor = ctypes.c_uint64.from_address(handle_of(uc) + _known.pointer).value
    environment = processor + _known.environment
    if not processor or ctypes.string_at(environment + 64, len(wanted)) != wanted:
        raise EngineUnsupported("Unicorn engine: its processor is not where the first one's was")
    _check_both_ways(uc, environment)
    _check_msrs(uc, environment, _known.msrs)
    return Layout(processor, environment, _known.msrs)


def _search(uc: Uc, wanted: bytes) -> tuple[Layout, int]:
    """By R8 to R15, which hold the wanted bytes. Also the offset in the handle of the pointer to CPUState."""
    ranges = _readable_ranges()

    starts = [first for first, _ in ranges]

    def room(address: int) -> int:
        at = bisect_right(starts, address) - 1
        return max(ranges[at][1] - address, 0) if at >= 0 else 0

    handle = handle_of(uc)
    if not room(handle):
        raise EngineUnsupported("Unicorn engine: its handle is not in writable memory")
    pointers = struct.unpack(f"<{_HANDLE_SIZE // 8}Q", ctypes.string_at(handle, min(room(handle), _HANDLE_SIZE)))
    found: dict[int, int] = {}
    for pointer in pointers:
        size = room(pointer) if pointer % 8 == 0 else 0
        if size < 0x1000 or pointer in found:
            continue
        block = ctypes.string_at(pointer, min(size, _PROCESSOR_SIZE))
        at = block.find(wanted)
        if at >= 64 and _refers(block[: at - 64], pointer + at - 64) and _refers(block[: at - 64], handle):
            found[pointer] = pointer + at - 64
    # Pointers to other memory shortly before the object see it too, and the bytes searched for lie about in the heap.
    if len(set(found.values())) != 1:
        raise EngineUnsupported(f"Unicorn engine: {len(set(found.values()))} candidates for the processor's structure")
    processor, environment = max(found.items())
    _check_both_ways(uc, environment)
    return Layout(processor, environment, _find_msrs(uc, environment)), 8 * pointers.index(processor)


def _refers(block: bytes, address: int) -> bool:
    """CPUState holds its CPUX86State (env_ptr) and its engine (uc)."""
    at = block.find(struct.pack("<Q", address))
    while at >= 0 and at % 8:
        at = block.find(struct.pack("<Q", address), at + 1)
    return at >= 0


def _check_both_ways(uc: Uc, environment: int) -> None:
    r15 = ctypes.c_uint64.from_address(environment + REGISTERS + 15 * 8)
    r15.value = 0x1234_5678_9ABC_DEF0
    if uc.reg_read(UC_X86_REG_R15) != 0x1234_5678_9ABC_DEF0:
        raise EngineUnsupported("Unicorn engine: writing R15 in place has no effect")
    uc.reg_write(UC_X86_REG_R15, 1)
    if r15.value != 1:
        raise EngineUnsupported("Unicorn engine: R15 is not where it was found")


def _check_msrs(uc: Uc, environment: int, offsets: dict[int, int]) -> None:
    for msr, magic in _MSR_MAGIC.items():
        before, place = uc.msr_read(msr), ctypes.c_uint64.from_address(environment + offsets[msr])
        uc.msr_write(msr, magic)
        there = place.value == magic
        uc.msr_write(msr, before)
        if not there or place.value == magic:
            raise EngineUnsupported(f"Unicorn engine: {msr.name} is not where the first engine's was")


def _find_msrs(uc: Uc, environment: int) -> dict[int, int]:
    offsets: dict[int, int] = {}
    for msr, magic in _MSR_MAGIC.items():
        before = uc.msr_read(msr)
        uc.msr_write(msr, magic)
        block = ctypes.string_at(environment, STRUCTURE_SIZE)
        at = block.find(magic.to_bytes(8, "little"))
        uc.msr_write(msr, before)
        changed = ctypes.c_uint64.from_address(environment + at).value if at >= 0 else magic
        if changed == magic:
            raise EngineUnsupported(f"Unicorn engine: {msr.name} is not in the processor's structure")
        offsets[msr] = at
    # sysenter_cs (u32, padded) lies below sysenter_esp; the others follow one another from star.
    offsets[Msr.SYSENTER_CS] = offsets[Msr.SYSENTER_ESP] - 8
    star = offsets[Msr.STAR]
    expected = {Msr.SYSENTER_ESP: -16, Msr.SYSENTER_EIP: -8, Msr.LSTAR: 16, Msr.CSTAR: 24, Msr.SFMASK: 32}
    for msr, distance in expected.items():
        if offsets[msr] != star + distance:
            raise EngineUnsupported(f"Unicorn engine: {msr.name} is {offsets[msr] - star} bytes from STAR")
    offsets[Msr.TSC_AUX] = star + 72
    return offsets


def replace_tlb_fill(found: Layout, function: int) -> None:
    """Puts `function` before QEMU's tlb_fill: the pointer is in the class of the processor, inside its structure."""
    wanted = struct.pack("<Q", address_of("x86_cpu_tlb_fill_x86_64"))
    at = ctypes.string_at(found.environment, STRUCTURE_SIZE).find(wanted)
    if at < 0:
        raise EngineUnsupported("Unicorn engine: the processor's class is not in its structure")
    ctypes.c_uint64.from_address(found.environment + at).value = function


class InterruptLines:
    """The interrupt lines of one engine: AMD-V's intercepts of INTR and NMI turn them into exits.

    Each line is a byte of its own, so any thread may raise it; the word that breaks up chained blocks is set after it,
    as QEMU's cpu_interrupt does. Every exit lowers both (native_hooks.py), so what is asked for is remembered by the
    caller. Both places are read from the code of functions that use them.

    Attributes:
        address: of the two lines, for the native hooks.
    """

    _HARD, _NMI = 0x02, 0x02  # CPU_INTERRUPT_HARD in the first byte, CPU_INTERRUPT_NMI in the second

    def __init__(self, found: Layout) -> None:
        reset = ctypes.string_at(address_of("cpu_reset_interrupt"), 6)  # not esi; and [rdi + n], esi; ret
        if reset[:4] != b"\xf7\xd6\x21\x77" or reset[5] != 0xC3:
            raise EngineUnsupported("Unicorn library: cpu_reset_interrupt is not the expected one")
        self.address = found.processor + reset[4]
        self._lines = (ctypes.c_uint8 * 2).from_address(self.address)
        # mov r8, [rdi + n]; mov eax, [r8 + m]; test eax, eax
        check = ctypes.string_at(address_of("helper_check_exit_request_x86_64"), 16)
        distance = int.from_bytes(check[10:14], "little")
        if check[:3] != b"\x4c\x8b\x87" or check[7:10] != b"\x41\x8b\x80" or check[14:] != b"\x85\xc0":
            raise EngineUnsupported("Unicorn library: helper_check_exit_request is not the expected one")
        if not found.environment - 0x40 <= found.processor + distance < found.environment:
            raise EngineUnsupported("Unicorn engine: the exit request is not before the processor's state")
        self._exit_request = ctypes.c_uint16.from_address(found.processor + distance + 2)

    def raise_interrupt(self) -> None:
        """Taken as soon as RFLAGS.IF and the interrupt shadow let it."""
        self._lines[0] = self._HARD
        self._exit_request.value = 0xFFFF

    def lower_interrupt(self) -> None:
        self._lines[0] = 0

    def raise_nmi(self) -> None:
        """Taken at the next block."""
        self._lines[1] = self._NMI
        self._exit_request.value = 0xFFFF

    def lower_nmi(self) -> None:
        self._lines[1] = 0
