"""What CPUID says: an AMD processor with what the engine really executes. SVM is hidden, a hypervisor is shown.

Sources: AMD APM volume 3, appendix E; Intel SDM volume 2, CPUID (leaf 0xB).
"""

from __future__ import annotations

import struct

from vtlab.x86.paging import PHYSICAL_BITS

Leaf = tuple[int, int, int, int]

HYPERVISOR_FIRST, HYPERVISOR_LAST = 0x40000000, 0x400000FF
_MAX_BASIC, _MAX_EXTENDED = 0xD, 0x80000021
SIGNATURE = 0x00800F12  # family 17h, model 1, stepping 2
_VENDOR = struct.unpack("<3I", b"AuthenticAMD")
_BRAND = struct.unpack("<12I", b"vtlab virtual processor".ljust(48, b"\0"))

_LEAF1_EDX = sum(1 << bit for bit in (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26))
_LEAF1_EDX_APIC = 1 << 9
_LEAF1_ECX = sum(1 << bit for bit in (0, 1, 9, 13, 19, 20, 21, 22, 23, 24, 25, 26, 30, 31))
_LEAF1_ECX_OSXSAVE = 1 << 27
_LEAF7_EBX = sum(1 << bit for bit in (0, 3, 7, 8, 9, 19, 20, 23))  # FSGSBASE BMI1 SMEP BMI2 ERMS ADX SMAP CLFLUSHOPT
_LEAF7_ECX = 1 << 2  # UMIP
_EXTENDED_EDX_OWN = sum(1 << bit for bit in (11, 20, 25, 26, 27, 29))  # SYSCALL NX FFXSR 1G RDTSCP LM
_EXTENDED_EDX_SHARED = 0x0183F3FF  # bits that repeat leaf 1
_EXTENDED_ECX = sum(1 << bit for bit in (0, 4, 5, 6, 8))  # LAHF CR8-by-LOCK ABM SSE4A PREFETCH
# Nothing is speculated here, and a guest that knows it does without costly defences: branch type confusion (BTC_NO),
# LFENCE serializes, automatic IBRS (EFER.AIBRSE), return stack overflow (SRSO_NO).
_EXTENDED8_EBX = 1 << 29
_EXTENDED21_EAX = 1 << 2 | 1 << 8 | 1 << 29
_CR4_OSXSAVE = 1 << 18


def cpuid(leaf: int, subleaf: int, vp_index: int, vp_count: int, cr4: int, apic_enabled: bool) -> Leaf:
    """EAX, EBX, ECX, EDX. Leaves beyond the last are zero, as on AMD."""
    if HYPERVISOR_FIRST <= leaf <= HYPERVISOR_LAST:
        return 0, 0, 0, 0
    edx1 = _LEAF1_EDX | (_LEAF1_EDX_APIC if apic_enabled else 0)
    if leaf == 1:
        ecx = _LEAF1_ECX | (_LEAF1_ECX_OSXSAVE if cr4 & _CR4_OSXSAVE else 0)
        threads = 1 << 28 if vp_count > 1 else 0
        return SIGNATURE, vp_index << 24 | vp_count << 16 | 8 << 8, ecx, edx1 | threads
    if leaf == 0xB:
        return _topology(subleaf, vp_index, vp_count)
    if leaf == 0xD:
        return {0: (0x3, 0x240, 0x240, 0)}.get(subleaf, (0, 0, 0, 0))
    if leaf == 7:
        return (0, _LEAF7_EBX, _LEAF7_ECX, 0) if subleaf == 0 else (0, 0, 0, 0)
    if leaf == 0x80000001:
        return SIGNATURE, 0, _EXTENDED_ECX, _EXTENDED_EDX_OWN | (edx1 & _EXTENDED_EDX_SHARED)
    if leaf == 0x80000008:
        return 48 << 8 | PHYSICAL_BITS, _EXTENDED8_EBX, vp_count - 1, 0
    return _FIXED.get(leaf, (0, 0, 0, 0))


_FIXED: dict[int, Leaf] = {
    0: (_MAX_BASIC, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    0x80000000: (_MAX_EXTENDED, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    0x80000002: (_BRAND[0], _BRAND[1], _BRAND[2], _BRAND[3]),
    0x80000003: (_BRAND[4], _BRAND[5], _BRAND[6], _BRAND[7]),
    0x80000004: (_BRAND[8], _BRAND[9], _BRAND[10], _BRAND[11]),
    0x80000007: (0, 0, 0, 1 << 8),  # invariant TSC
    0x80000021: (_EXTENDED21_EAX, 0, 0, 0),
}


def _topology(subleaf: int, vp_index: int, vp_count: int) -> Leaf:
    bits = (vp_count - 1).bit_length()
    levels = {0: (0, 1, 1), 1: (bits, vp_count, 2)}
    shift, count, kind = levels.get(subleaf, (0, 0, 0))
    return shift, count, kind << 8 | subleaf & 0xFF, vp_index
