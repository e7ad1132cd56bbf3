"""From CrInterceptControl, its masks and the intercepted ports to the filter that VTL0's core applies: a table."""

from __future__ import annotations

from vmm.intercept_filter import Watched
from vmm.processor import Processor
from vmm.vtl import VpVtl
from vtlab.hyperv.registers import HvRegister
from vtlab.hyperv.vsm import CrInterceptControl as Control
from vtlab.v1.vcpu_pb2 import IndexRange, InterceptFilter, MsrFilter, Update
from vtlab.x86.registers import Msr

_ALL = (1 << 64) - 1

# Control bit -> MSR whose writes exit. MISC_ENABLE has a mask of its own.
_MSR_WRITES: dict[Control, Msr] = {
    Control.MISC_ENABLE_WRITE: Msr.MISC_ENABLE,
    Control.LSTAR_WRITE: Msr.LSTAR,
    Control.STAR_WRITE: Msr.STAR,
    Control.CSTAR_WRITE: Msr.CSTAR,
    Control.APIC_BASE_WRITE: Msr.APIC_BASE,
    Control.SYSENTER_CS_WRITE: Msr.SYSENTER_CS,
    Control.SYSENTER_EIP_WRITE: Msr.SYSENTER_EIP,
    Control.SYSENTER_ESP_WRITE: Msr.SYSENTER_ESP,
    Control.SFMASK_WRITE: Msr.SFMASK,
    Control.TSC_AUX_WRITE: Msr.TSC_AUX,
}
_REGISTER_WRITES = (
    Control.CR0_WRITE,
    Control.CR4_WRITE,
    Control.XCR0_WRITE,
    Control.EFER_WRITE,
    Control.GDTR_WRITE,
    Control.IDTR_WRITE,
    Control.LDTR_WRITE,
    Control.TR_WRITE,
)
# Reads cannot be intercepted, as in openvmm.
CONTROL_BITS = sum(int(bit) for bit in (*_MSR_WRITES, *_REGISTER_WRITES))


def intercept_filter(levels: VpVtl) -> InterceptFilter:
    """What VTL1 wants to see of VTL0 on one VP. Registers without a mask: every access; a mask of 0: none.

    INIT and SIPI exit always (vmm.startups).
    """
    values = levels.cr_intercepts
    control = values.get(HvRegister.CR_INTERCEPT_CONTROL, 0)
    misc = values.get(HvRegister.CR_INTERCEPT_MISC_ENABLE_MASK, 0)
    masks = {Control.MISC_ENABLE_WRITE: misc}
    writes = [
        MsrFilter(index=msr, mask=masks.get(bit, _ALL))
        for bit, msr in _MSR_WRITES.items()
        if control & bit and masks.get(bit, _ALL)
    ]

    def mask(bit: Control, register: HvRegister | None) -> int:
        if not control & bit:
            return 0
        return _ALL if register is None else values.get(register, 0)

    return InterceptFilter(
        cr0_mask=mask(Control.CR0_WRITE, HvRegister.CR_INTERCEPT_CR0_MASK),
        cr4_mask=mask(Control.CR4_WRITE, HvRegister.CR_INTERCEPT_CR4_MASK),
        efer_mask=mask(Control.EFER_WRITE, None),
        xcr0_mask=mask(Control.XCR0_WRITE, None),
        gdtr_writes=bool(control & Control.GDTR_WRITE),
        idtr_writes=bool(control & Control.IDTR_WRITE),
        ldtr_writes=bool(control & Control.LDTR_WRITE),
        tr_writes=bool(control & Control.TR_WRITE),
        msr_writes=writes,
        ports=[IndexRange(first=port, count=1) for port in sorted(levels.ports)],
        unchanged_writes=bool(control),
        startups=True,
    )


def apply_intercepts(processor: Processor) -> None:
    """Has VTL0's core filter by what its VTL1 has set now."""
    filter_ = intercept_filter(processor.vtl)
    processor.watched = Watched(filter_)
    processor.post(Update(intercepts=filter_))
