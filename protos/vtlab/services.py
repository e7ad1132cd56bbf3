"""Services that VTL1's policy personality offers to VTL0 by VTL call.

The kernel calls through the hypercall page with RDI = service, RSI, RDX, R8 = arguments; the result is a signed 64-bit
value in R8, negative for an errno, as in LVBS (litebox_platform_lvbs/src/mshv/vsm.rs, lvbs-linux hv_vsm.c). Numbers
from 0x1FFE0 are those of LVBS; those from 0x1FF00 are ours, for what LVBS has no service for.
"""

from enum import IntEnum


class Service(IntEnum):
    """Service number, as in RDI."""

    TAKE_POLICY = 0x1FF00
    """(pa, size): the policy text of the guest, in its own memory. Measures the kernel and applies the memory rules."""
    WRITE_PAGE_TABLE = 0x1FF01
    """(pa of the entry, value): one entry of a page table that only VTL1 may write."""
    WRITE_CONTROL_REGISTER = 0x1FF02
    """(0 or 4, value): for kernels whose own code for it was removed; judged like the write itself."""
    CHALLENGE = 0x1FF03
    """(pa of 32 bytes): VTL1 writes a fresh nonce there."""
    AUTHENTICATE = 0x1FF04
    """(pa of the request, size): proves, against the last nonce, the right to a named action after lock."""
    PING = 0x1FF05
    """(): no-op that returns 0; for measuring a VTL call."""

    LOCK_REGS = 0x1FFE2
    SIGNAL_END_OF_BOOT = 0x1FFE3
    PROTECT_MEMORY = 0x1FFE4
    LOAD_KDATA = 0x1FFE5
    VALIDATE_MODULE = 0x1FFE6
    FREE_MODULE_INIT = 0x1FFE7
    UNLOAD_MODULE = 0x1FFE8
    PATCH_TEXT = 0x1FFEB
