"""Virtual secure mode: page rights, the hypercall page, bits of the VSM registers (TLFS, "Virtual Secure Mode").

Where the sources disagree on a bit's place, these are the numbers that Linux and openvmm use.
"""

from __future__ import annotations

from enum import IntFlag


class MapGpaFlags(IntFlag):
    """HV_MAP_GPA_FLAGS of HvCallModifyVtlProtectionMask; also the default mask in VsmPartitionConfig[4:1]."""

    READABLE = 1 << 0
    WRITABLE = 1 << 1
    # Fetch below CPL3; without MBEC at every CPL.
    KERNEL_EXECUTABLE = 1 << 2
    # Fetch at CPL3; ignored without MBEC.
    USER_EXECUTABLE = 1 << 3
    SUPERVISOR_SHADOW_STACK = 1 << 4
    PAGING_WRITABILITY = 1 << 5
    VERIFY_PAGING_WRITABILITY = 1 << 6
    ADJUSTABLE = 1 << 15


FULL_ACCESS = MapGpaFlags.READABLE | MapGpaFlags.WRITABLE | MapGpaFlags.KERNEL_EXECUTABLE | MapGpaFlags.USER_EXECUTABLE


class EnablePartitionVtlFlags(IntFlag):
    """Flags of HvCallEnablePartitionVtl."""

    MBEC = 1 << 0
    SUPERVISOR_SHADOW_STACK = 1 << 1
    HARDWARE_HVPT = 1 << 2


class PartitionConfig(IntFlag):
    """HvRegisterVsmPartitionConfig; the default protection mask is [4:1]."""

    ENABLE_VTL_PROTECTION = 1 << 0
    ZERO_MEMORY_ON_RESET = 1 << 5
    DENY_LOWER_VTL_STARTUP = 1 << 6


DEFAULT_MASK_SHIFT = 1
DEFAULT_MASK = 0xF << DEFAULT_MASK_SHIFT


class SecureConfig(IntFlag):
    """HvRegisterVsmVpSecureConfigVtlN."""

    MBEC = 1 << 0
    TLB_LOCKED = 1 << 1
    SUPERVISOR_SHADOW_STACK = 1 << 2
    HARDWARE_HVPT = 1 << 3


class CrInterceptControl(IntFlag):
    """HvRegisterCrInterceptControl."""

    CR0_WRITE = 1 << 0
    CR4_WRITE = 1 << 1
    XCR0_WRITE = 1 << 2
    MISC_ENABLE_READ = 1 << 3
    MISC_ENABLE_WRITE = 1 << 4
    LSTAR_READ = 1 << 5
    LSTAR_WRITE = 1 << 6
    STAR_READ = 1 << 7
    STAR_WRITE = 1 << 8
    CSTAR_READ = 1 << 9
    CSTAR_WRITE = 1 << 10
    APIC_BASE_READ = 1 << 11
    APIC_BASE_WRITE = 1 << 12
    EFER_READ = 1 << 13
    EFER_WRITE = 1 << 14
    GDTR_WRITE = 1 << 15
    IDTR_WRITE = 1 << 16
    LDTR_WRITE = 1 << 17
    TR_WRITE = 1 << 18
    SYSENTER_CS_WRITE = 1 << 19
    SYSENTER_EIP_WRITE = 1 << 20
    SYSENTER_ESP_WRITE = 1 << 21
    SFMASK_WRITE = 1 << 22
    TSC_AUX_WRITE = 1 << 23


class Capabilities(IntFlag):
    """HvRegisterVsmCapabilities, counted from bit 0; the MBEC mask, one bit a VTL, is [16:1]."""

    DR6_SHARED = 1 << 0
    DENY_LOWER_VTL_STARTUP = 1 << 17


_MBEC_SHIFT = 1
# Counted from the top, as the TLFS has it: DR6 63, MBEC 62:47, deny 46.
_TOP_OF = {Capabilities.DR6_SHARED: 63, Capabilities.DENY_LOWER_VTL_STARTUP: 46}
_TOP_MBEC_SHIFT = 47


def capabilities(found: Capabilities, mbec: int, *, from_top: bool) -> int:
    """HvRegisterVsmCapabilities; `mbec` is the set of levels that can have MBEC."""
    if not from_top:
        return int(found) | mbec << _MBEC_SHIFT
    return sum(1 << place for bit, place in _TOP_OF.items() if found & bit) | mbec << _TOP_MBEC_SHIFT


# The hypercall page. Guests reach the VTL switches through the offsets that VsmCodePageOffsets gives: each copies its
# control input (RCX) to RAX and puts the bare code into RCX; the 32-bit versions use EAX and the other way round.
VTL_CALL_32_OFFSET = 0x04
VTL_CALL_OFFSET = 0x0F
VTL_RETURN_32_OFFSET = 0x1B
VTL_RETURN_OFFSET = 0x26
_VMMCALL_RET = bytes.fromhex("0f01d9 c3")
_PARTS = {
    0: _VMMCALL_RET,
    VTL_CALL_32_OFFSET: bytes.fromhex("89c1 b811000000") + _VMMCALL_RET,  # mov ecx, eax; mov eax, 0x11
    VTL_CALL_OFFSET: bytes.fromhex("4889c8 b911000000") + _VMMCALL_RET,  # mov rax, rcx; mov ecx, 0x11
    VTL_RETURN_32_OFFSET: bytes.fromhex("89c1 b812000000") + _VMMCALL_RET,
    VTL_RETURN_OFFSET: bytes.fromhex("4889c8 b912000000") + _VMMCALL_RET,
}


def hypercall_page() -> bytes:
    """The 4096 bytes that a guest sees where it enabled the hypercall page; INT3 between the entry points."""
    page = bytearray(b"\xcc" * 4096)
    for offset, code in _PARTS.items():
        page[offset : offset + len(code)] = code
    return bytes(page)


def code_page_offsets() -> int:
    """HvRegisterVsmCodePageOffsets for hypercall_page(): VTL call [11:0], VTL return [23:12]."""
    return VTL_CALL_OFFSET | VTL_RETURN_OFFSET << 12
