"""Corrections of engine defects in its machine code, made in this process alone.

The library's code pages become private to this process; the file is not touched. A library whose bytes differ from
the known ones is refused.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import NamedTuple

from vtl0_guest.cpu.unicorn_library import EngineUnsupported, address_of


class Fix(NamedTuple):
    """One correction: `before` stands exactly once in `size` bytes from `offset` to an exported function."""

    name: str
    function: str
    offset: int
    size: int
    before: bytes
    after: bytes


FIXES = (
    # A page-table walk through a no-execute nested page ends the process. QEMU's nested walk (`get_hphys`) clears "may
    # execute" through a pointer that page-table accesses pass as NULL. A guest that keeps page tables in memory that
    # the nested table makes non-executable, which is where they belong, or a hostile one that points CR3 there, would
    # kill the emulator. The 18 bytes that hold the test have room for the missing check:
    #     before: test rdi,rdi; jns E; cmp r14d,2; je FAULT(near);              and dword [rcx],~4
    #     after:  test rdi,rdi; jns E; cmp r14d,2; je SHORT(to an equal je); jrcxz E; and dword [rcx],~4; nop
    # From "btc rdi,63" to the second "je FAULT": what follows the test must be what the short jump lands on.
    # get_hphys is static; it lies just below the exported function.
    Fix(
        "the nested page walk",
        "x86_cpu_tlb_fill_x86_64",
        -0x1000,
        0x1000,
        bytes.fromhex("4885ff790d4183fe020f84490300008321fb83e702750d4183fe010f84"),
        bytes.fromhex("4885ff790d4183fe027410e3058321fb669083e702750d4183fe010f84"),
    ),
    # PUSHF stores RF and VM, which the manual has clear in the pushed image (Intel SDM volume 2, PUSHF): the mask of
    # "and ebp,~(CC|DF)" gains both bits.
    Fix(
        "PUSHF",
        "helper_read_eflags_x86_64",
        0,
        0x40,
        bytes.fromhex("81e52af3ffff"),
        bytes.fromhex("81e52af3fcff"),
    ),
    # Unicorn looks for a stop request after every guest memory access and goes back to the start of that instruction,
    # so a read-modify-write whose store is done runs twice when another thread asks for a stop. The function that
    # emits these checks returns at once. Stops happen at the start of a block, where the state is exact; refused
    # accesses leave by the native hooks. Guest memory accesses become cheaper by a call each.
    Fix(
        "the stop request after a memory access",
        "check_exit_request_x86_64",
        0,
        16,
        bytes.fromhex("488bb77099000080bef20700000074"),
        bytes.fromhex("c38bb77099000080bef20700000074"),
    ),
)

_libc = ctypes.CDLL(None, use_errno=True)


def apply() -> None:
    """Makes all corrections in this process, once. Raises EngineUnsupported if the code is not the expected one."""
    for fix in FIXES:
        _apply(fix)


def _apply(fix: Fix) -> None:
    start = address_of(fix.function) + fix.offset
    code = ctypes.string_at(start, fix.size)
    if code.count(fix.after) == 1:
        return
    if code.count(fix.before) != 1:
        raise EngineUnsupported(f"Unicorn library: {fix.name} is not the one of unicorn 2.1.4 for x86-64 Linux")
    write_code(start + code.index(fix.before), fix.after)


def write_code(address: int, data: bytes) -> None:
    """Overwrites code of the library in this process. Raises EngineUnsupported if its pages cannot be made writable."""
    page = address & ~(mmap.PAGESIZE - 1)
    span = ctypes.c_size_t(address + len(data) - page)
    protect = _libc.mprotect
    if protect(ctypes.c_void_p(page), span, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        raise EngineUnsupported(f"Unicorn library: mprotect failed with errno {ctypes.get_errno()}")
    ctypes.memmove(address, data, len(data))
    protect(ctypes.c_void_p(page), span, mmap.PROT_READ | mmap.PROT_EXEC)
