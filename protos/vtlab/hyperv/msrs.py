"""Synthetic MSRs (TLFS, "Hypercall Interface", "Timers", "Virtual Interrupts")."""

from enum import IntEnum

# RDMSR and WRMSR of these indices exit unless the core models them (vtl0_guest.cpu.hyperv.msrs).
SYNTHETIC_MSRS = range(0x4000_0000, 0x4000_0200)

# HYPERCALL, VP_ASSIST_PAGE, REFERENCE_TSC and the like: enable [0], page number [63:12].
PAGE_ENABLE = 1
PAGE_NUMBER_SHIFT = 12
# HYPERCALL: no more writes until the next reset.
HYPERCALL_LOCKED = 1 << 1
# HYPERCALL [11:2] are preserved as written.
RESET_REQUEST = 1


class HvMsr(IntEnum):
    """Index as in ECX."""

    GUEST_OS_ID = 0x4000_0000
    HYPERCALL = 0x4000_0001
    VP_INDEX = 0x4000_0002
    RESET = 0x4000_0003
    VP_RUNTIME = 0x4000_0010
    TIME_REF_COUNT = 0x4000_0020
    REFERENCE_TSC = 0x4000_0021
    TSC_FREQUENCY = 0x4000_0022
    APIC_FREQUENCY = 0x4000_0023
    EOI = 0x4000_0070
    ICR = 0x4000_0071
    TPR = 0x4000_0072
    VP_ASSIST_PAGE = 0x4000_0073
    SCONTROL = 0x4000_0080
    SVERSION = 0x4000_0081
    SIEFP = 0x4000_0082
    SIMP = 0x4000_0083
    EOM = 0x4000_0084
    SINT0 = 0x4000_0090
    STIMER0_CONFIG = 0x4000_00B0
    STIMER0_COUNT = 0x4000_00B1
    GUEST_IDLE = 0x4000_00F0
    CRASH_P0 = 0x4000_0100
    CRASH_CTL = 0x4000_0105
