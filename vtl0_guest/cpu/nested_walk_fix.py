"""A correction of one engine defect: a page-table walk through a no-execute nested page ends the process.

QEMU's nested walk (`get_hphys`) clears "may execute" through a pointer that page-table accesses pass as NULL. A
guest that keeps page tables in memory that the nested table makes non-executable, which is where they belong, or a
hostile one that points CR3 there, would kill the emulator. The 18 bytes that hold the test have room for the
missing check:

    before: test rdi,rdi; jns E; cmp r14d,2; je FAULT(near);              and dword [rcx],~4
    after:  test rdi,rdi; jns E; cmp r14d,2; je SHORT(to an equal je); jrcxz E; and dword [rcx],~4; nop

The library's code page becomes private to this process; the file is not touched. A library whose bytes differ is
refused.
"""

from __future__ import annotations

import ctypes
import mmap

from vtl0_guest.cpu.unicorn_library import EngineUnsupported, address_of

# From "btc rdi,63" to the second "je FAULT": what follows the test must be what the short jump lands on.
_BEFORE = bytes.fromhex("4885ff790d4183fe020f84490300008321fb83e702750d4183fe010f84")
_AFTER = bytes.fromhex("4885ff790d4183fe027410e3058321fb669083e702750d4183fe010f84")
_SEARCH_BEFORE = 0x1000  # get_hphys is static; it lies just below the exported x86_cpu_tlb_fill

_libc = ctypes.CDLL(None, use_errno=True)


def apply() -> None:
    """Makes the correction in this process, once. Raises EngineUnsupported if the code is not the expected one."""
    start = address_of("x86_cpu_tlb_fill_x86_64") - _SEARCH_BEFORE
    code = ctypes.string_at(start, _SEARCH_BEFORE)
    if code.count(_AFTER) == 1:
        return
    if code.count(_BEFORE) != 1:
        raise EngineUnsupported(
            "Unicorn library: the nested page walk is not the one of unicorn 2.1.4 for x86-64 Linux"
        )
    address = start + code.index(_BEFORE)
    page = address & ~(mmap.PAGESIZE - 1)
    span = ctypes.c_size_t(address + len(_AFTER) - page)
    protect = _libc.mprotect
    if protect(ctypes.c_void_p(page), span, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        raise EngineUnsupported(f"Unicorn library: mprotect failed with errno {ctypes.get_errno()}")
    ctypes.memmove(address, _AFTER, len(_AFTER))
    protect(ctypes.c_void_p(page), span, mmap.PROT_READ | mmap.PROT_EXEC)
