"""The virtual machine control block that one VMRUN loads. Source: AMD APM volume 2, appendix B.

Everything that the core decides about is intercepted. Guest state in the block is only a neutral start: after VMRUN
the core writes the real state in place.
"""

from __future__ import annotations

import struct
from enum import IntEnum

SIZE = 0x1000
EXITINFO2 = 0x80


class ExitCode(IntEnum):
    """SVM exit codes (AMD APM volume 2, appendix C); the engine reports 0x100 + code."""

    CR0_READ = 0x00
    CR8_READ = 0x08
    CR0_WRITE = 0x10
    CR8_WRITE = 0x18
    DR0_READ = 0x20
    DR0_WRITE = 0x30
    EXCEPTION = 0x40
    LAST_EXCEPTION = 0x5F
    INTERRUPT = 0x60
    NMI = 0x61
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SOFTWARE_INTERRUPT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    MSR = 0x7C
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    ICEBP = 0x88
    MONITOR = 0x8A
    MWAIT = 0x8B
    NESTED_PAGE_FAULT = 0x400


_CR_READS = 1 << 0 | 1 << 8  # CR0 for SMSW and UMIP, CR8 for the local APIC
_CR_WRITES = 0xFFFF & ~(1 << 2)  # CR2 is the guest's own
_ALWAYS = (
    ExitCode.INTERRUPT,
    ExitCode.NMI,
    ExitCode.IDTR_READ,
    ExitCode.GDTR_READ,
    ExitCode.LDTR_READ,
    ExitCode.TR_READ,
    ExitCode.IDTR_WRITE,
    ExitCode.GDTR_WRITE,
    ExitCode.LDTR_WRITE,
    ExitCode.TR_WRITE,
    ExitCode.RDPMC,
    ExitCode.CPUID,
    ExitCode.RSM,
    ExitCode.SOFTWARE_INTERRUPT,
    ExitCode.INVD,
    ExitCode.HLT,
    ExitCode.INVLPGA,
    ExitCode.MSR,
    ExitCode.SHUTDOWN,
    ExitCode.VMRUN,
    ExitCode.VMMCALL,
    ExitCode.VMLOAD,
    ExitCode.VMSAVE,
    ExitCode.STGI,
    ExitCode.CLGI,
    ExitCode.SKINIT,
    ExitCode.ICEBP,
    ExitCode.MONITOR,
    ExitCode.MWAIT,
)
INTERCEPTS = sum(1 << (code - 0x60) for code in _ALWAYS)


def build(io_map: int, msr_map: int, nested_root: int, rip: int, rax: int) -> bytes:
    """A block for 32-bit protected mode without paging at `rip`; addresses are system-physical."""
    block = bytearray(SIZE)

    def put(offset: int, layout: str, *values: int) -> None:
        struct.pack_into("<" + layout, block, offset, *values)

    put(0x000, "HHHH", _CR_READS, _CR_WRITES, 0xFFFF, 0xFFFF)
    put(0x008, "I", 0xFFFF_FFFF)  # every exception
    put(0x00C, "Q", INTERCEPTS)
    put(0x040, "QQ", io_map, msr_map)
    put(0x058, "I", 1)  # ASID
    put(0x090, "Q", 1)  # nested paging
    put(0x0B0, "Q", nested_root)
    for offset, attributes in ((0x00, 0xC93), (0x10, 0xC9B), (0x20, 0xC93), (0x30, 0xC93)):  # ES CS SS DS
        put(0x400 + offset, "HHIQ", 8, attributes, 0xFFFFFFFF, 0)
    put(0x4D0, "Q", 1 << 12)  # EFER.SVME, or the engine refuses
    put(0x558, "Q", 0x11)  # CR0: PE, ET
    put(0x560, "Q", 0x400)  # DR7
    put(0x568, "Q", 0xFFFF0FF0)  # DR6
    put(0x570, "Q", 2)
    put(0x578, "Q", rip)
    put(0x5F8, "Q", rax)
    return bytes(block)
