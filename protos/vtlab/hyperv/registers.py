"""Names of virtual-processor registers for HvCallGetVpRegisters and HvCallSetVpRegisters (TLFS, HV_REGISTER_NAME).

Architectural registers up to EFER are named by vtlab.v1.RegisterName, which uses the same numbers; those that are MSRs
of the processor are in MSR_OF_REGISTER.
"""

from enum import IntEnum

from vtlab.hyperv.msrs import HvMsr
from vtlab.x86.registers import Msr


class HvRegister(IntEnum):
    """HV_REGISTER_NAME, without the architectural ones."""

    PENDING_INTERRUPTION = 0x0001_0002
    PENDING_EVENT0 = 0x0001_0004
    HYPERCALL = 0x0009_0001
    GUEST_OS_ID = 0x0009_0002
    VP_ASSIST_PAGE = 0x0009_0013
    VSM_CODE_PAGE_OFFSETS = 0x000D_0002
    VSM_VP_STATUS = 0x000D_0003
    VSM_PARTITION_STATUS = 0x000D_0004
    VSM_VINA = 0x000D_0005
    VSM_CAPABILITIES = 0x000D_0006
    VSM_PARTITION_CONFIG = 0x000D_0007
    GUEST_VSM_PARTITION_CONFIG = 0x000D_0008
    VSM_VP_SECURE_CONFIG_VTL0 = 0x000D_0010
    VSM_VP_WAIT_FOR_TLB_LOCK = 0x000D_0020
    CR_INTERCEPT_CONTROL = 0x000E_0000
    CR_INTERCEPT_CR0_MASK = 0x000E_0001
    CR_INTERCEPT_CR4_MASK = 0x000E_0002
    CR_INTERCEPT_MISC_ENABLE_MASK = 0x000E_0003


MSR_OF_REGISTER = {
    0x0008_0000: Msr.TSC,
    0x0008_0002: Msr.KERNEL_GS_BASE,
    0x0008_0003: Msr.APIC_BASE,
    0x0008_0004: Msr.PAT,
    0x0008_0005: Msr.SYSENTER_CS,
    0x0008_0006: Msr.SYSENTER_EIP,
    0x0008_0007: Msr.SYSENTER_ESP,
    0x0008_0008: Msr.STAR,
    0x0008_0009: Msr.LSTAR,
    0x0008_000A: Msr.CSTAR,
    0x0008_000B: Msr.SFMASK,
    0x0008_007B: Msr.TSC_AUX,
    0x0008_00A0: Msr.MISC_ENABLE,
}
"""HV_REGISTER_NAME -> index of the MSR that it names."""

SYNTHETIC_MSR_OF_REGISTER: dict[int, int] = {
    HvRegister.VP_ASSIST_PAGE: HvMsr.VP_ASSIST_PAGE,
    **{0x000A_0000 + number: HvMsr.SINT0 + number for number in range(16)},
    0x000A_0010: HvMsr.SCONTROL,
    0x000A_0011: HvMsr.SVERSION,
    0x000A_0012: HvMsr.SIEFP,
    0x000A_0013: HvMsr.SIMP,
    **{0x000B_0000 + number: HvMsr.STIMER0_CONFIG + number for number in range(8)},
}
"""HV_REGISTER_NAME -> index of the synthetic MSR that it names."""
