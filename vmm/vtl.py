"""State of the virtual trust levels of a partition and its processors (TLFS, "Virtual Secure Mode").

Levels are 0 and 1. Sets of levels are bit masks, as in the VSM status registers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vtlab.hyperv.vsm import FULL_ACCESS, PartitionConfig, SecureConfig

VTL0 = 0
VTL1 = 1
HIGHEST_VTL = 1


@dataclass(slots=True)
class VpVtl:
    """Virtual trust levels of one processor.

    Attributes:
        enabled: set of levels enabled here.
        active: level that runs.
        assist_page: VP_ASSIST_PAGE MSR of each level.
        secure_config: VsmVpSecureConfigVtl0.
        vina: VsmVina of VTL1.
        lower_waits: number of the enter of VTL0 after whose exit an interrupt for it waited, if one did.
        cr_intercepts: CrInterceptControl and its masks (CR0, CR4, MISC_ENABLE) by HV_REGISTER_NAME.
        ports: I/O ports that VTL1 intercepts.
        started: HvCallStartVirtualProcessor started it.
        starts_above: and it has VTL1, where it begins before it runs in VTL0.
    """

    enabled: int = 1 << VTL0
    active: int = VTL0
    assist_page: list[int] = field(default_factory=lambda: [0, 0])
    secure_config: int = 0
    vina: int = 0
    lower_waits: int = -1
    cr_intercepts: dict[int, int] = field(default_factory=dict)
    ports: set[int] = field(default_factory=set)
    started: bool = False
    starts_above: bool = False

    def has(self, vtl: int) -> bool:
        return bool(self.enabled >> vtl & 1)

    @property
    def tlb_locked(self) -> bool:
        """VTL1 holds back flushes that reach VTL0's translations here."""
        return bool(self.secure_config & SecureConfig.TLB_LOCKED)

    def release_tlb_lock(self) -> bool:
        """A return to VTL0 does. True if there was one."""
        held = self.tlb_locked
        self.secure_config &= ~int(SecureConfig.TLB_LOCKED)
        return held


@dataclass(slots=True)
class PartitionVtl:
    """Virtual trust levels of a partition.

    Attributes:
        offered: VTL1 may be enabled at all.
        enabled: set of levels enabled for the partition.
        mbec: set of levels for which MBEC was enabled.
        config: VsmPartitionConfig, as VTL1 wrote it; rights of pages without their own are bits [4:1].
    """

    offered: bool
    enabled: int = 1 << VTL0
    mbec: int = 0
    config: int = FULL_ACCESS << 1 | 1 << 5

    def has(self, vtl: int) -> bool:
        return bool(self.enabled >> vtl & 1)

    @property
    def has_mbec(self) -> bool:
        return bool(self.mbec >> VTL1 & 1)

    @property
    def zeroes_memory(self) -> bool:
        """VTL1 wants all RAM zeroed by a RESET (ZeroMemoryOnReset)."""
        return self.has(VTL1) and bool(self.config & PartitionConfig.ZERO_MEMORY_ON_RESET)

    @property
    def protections_enabled(self) -> bool:
        return bool(self.config & 1)


def may_call(vp: VpVtl, control: int) -> bool:
    """HvCallVtlCall is legal: from the level below an enabled one, with a control input of 0. Else #UD."""
    return control == 0 and vp.active < HIGHEST_VTL and vp.has(vp.active + 1)


def may_return(vp: VpVtl, control: int) -> bool:
    """HvCallVtlReturn is legal: not from the lowest level, with a control input of 0 or 1 (fast). Else #UD."""
    return control in (0, 1) and vp.active > VTL0
