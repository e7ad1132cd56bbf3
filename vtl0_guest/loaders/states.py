"""States that a vCPU starts in, with what they need in memory. What all loaders have in common is vtlab.x86.initial.

Long mode is our own convention: RAM below 4 GiB mapped one to one by 2 MiB pages, and a GDT with 64-bit code at 8,
data at 0x10.
"""

from __future__ import annotations

import struct

from vtl0_guest.loaders.target import ABOVE_4G, PAGE_SIZE, Target
from vtlab.v1 import registers_pb2
from vtlab.x86 import initial, segments
from vtlab.x86.registers import Cr0, Cr4, Efer

_DESCRIPTOR_64, _DESCRIPTOR_DATA = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
# GDT; top table; table of 1 GiB entries; four of 2 MiB entries.
_LONG_PAGES = 7
_TABLE_FLAGS = 0x3
_LARGE_PAGE_FLAGS = 0x83


def real_mode(target: Target, entry: int) -> registers_pb2.ProcessorState:
    """Starts at a physical address below 1 MiB: CS is 0 for the first 64 KiB, as for a boot sector, else entry / 16."""
    if not 0 <= entry < 0x10_0000:
        raise target.bad(f"entry {entry:#x}: real mode starts below 0x100000")
    selector, rip = (0, entry) if entry <= 0xFFFF else (entry >> 4, entry & 0xF)
    state = initial.state(segments.real_mode(selector, code=True), segments.real_mode(0), Cr0.ET.value)
    state.registers.rip = rip
    state.gdtr.limit = 0xFFFF
    return state


def protected_mode(target: Target, entry: int) -> registers_pb2.ProcessorState:
    """32-bit code and flat segments without paging; there is no GDT, so the guest must bring one."""
    if not 0 <= entry < ABOVE_4G:
        raise target.bad(f"entry {entry:#x}: 32-bit code starts below 4 GiB")
    return initial.protected_mode(entry)


def long_mode(
    target: Target, entry: int, *, limit: int = ABOVE_4G, code_selector: int = initial.CODE_SELECTOR
) -> registers_pb2.ProcessorState:
    """64-bit code with paging on; GDT and page tables take the 28 KiB that are highest in RAM below `limit`.

    The data selector follows the code selector.
    """
    if not 0 <= entry < ABOVE_4G:
        raise target.bad(f"entry {entry:#x}: long mode starts below 4 GiB, what the first page tables map")
    base = target.find_below(limit, _LONG_PAGES * PAGE_SIZE, "page tables")
    gdt = bytes(code_selector) + struct.pack("<QQ", _DESCRIPTOR_64, _DESCRIPTOR_DATA)
    top, directories = base + PAGE_SIZE, [base + (3 + number) * PAGE_SIZE for number in range(4)]
    pages = [
        gdt,
        struct.pack("<Q", top + PAGE_SIZE | _TABLE_FLAGS),
        struct.pack("<4Q", *(directory | _TABLE_FLAGS for directory in directories)),
        *(
            struct.pack("<512Q", *((number << 30 | index << 21) | _LARGE_PAGE_FLAGS for index in range(512)))
            for number in range(4)
        ),
    ]
    target.put(base, b"".join(page.ljust(PAGE_SIZE, b"\0") for page in pages), "page tables")
    code, data = segments.flat(code_selector, initial.CODE_64), segments.flat(code_selector + 8, initial.DATA)
    state = initial.state(code, data, Cr0.PE.value | Cr0.ET.value | Cr0.NE.value | Cr0.WP.value | Cr0.PG.value)
    registers = state.registers
    registers.cr3, registers.cr4 = top, Cr4.PAE.value
    registers.efer = Efer.LME.value | Efer.LMA.value
    registers.rip = entry
    state.gdtr.base, state.gdtr.limit = base, len(gdt) - 1
    return state
