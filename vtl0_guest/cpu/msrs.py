"""Model-specific registers: where each is kept and what it accepts. Others are the machine's business and always exit.

Sources: AMD APM volume 2, appendix A; Intel SDM volume 4.
"""

from __future__ import annotations

from vtl0_guest.cpu import control
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.devices.bus import GeneralProtection
from vtl0_guest.cpu.environment import Seg
from vtl0_guest.cpu.faults import general_protection
from vtl0_guest.cpu.hyperv import msrs as synthetic
from vtlab.x86.registers import Msr

_CANONICAL = frozenset(
    {
        Msr.SYSENTER_ESP,
        Msr.SYSENTER_EIP,
        Msr.LSTAR,
        Msr.CSTAR,
        Msr.KERNEL_GS_BASE,
        Msr.FS_BASE,
        Msr.GS_BASE,
    }
)
_SEGMENT_BASES = {Msr.FS_BASE: Seg.FS, Msr.GS_BASE: Seg.GS}
_LOCAL_APIC = frozenset({int(Msr.APIC_BASE), int(Msr.TSC_DEADLINE), *range(0x800, 0x900)})
_PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})
# Kept as written, without effect: index -> (value after RESET, writable bits).
_MICROCODE, _MTRR_CAP, _MTRR_DEF, _SYSCFG, _HWCR, _VM_CR = 0x8B, 0xFE, 0x2FF, 0xC0010010, 0xC0010015, Msr.VM_CR
MCG_CAP, MCG_STATUS, _NB_CFG = 0x179, 0x17A, 0xC001001F
MC0 = MC0_CTL, MC0_STATUS, MC0_ADDR, MC0_MISC = range(0x400, 0x404)
_MC_STATUS_WRITABLE = 1 << 18  # of HWCR
FIRST_COUNTER, COUNTERS = 0xC0010004, 4
_ALL = (1 << 64) - 1
SHADOWS: dict[int, tuple[int, int]] = {
    _MICROCODE: (0, 0),
    _MTRR_CAP: (0x508, 0),  # write-combining, fixed ranges, 8 variable ranges
    _MTRR_DEF: (0, 0xCFF),
    MCG_CAP: (1, 0),  # one machine-check bank
    MCG_STATUS: (0, 0x7),
    **dict.fromkeys(MC0, (0, _ALL)),
    **dict.fromkeys([0x250, 0x258, 0x259, *range(0x268, 0x270)], (0, _ALL)),
    **dict.fromkeys(range(0x200, 0x210), (0, 0xFF_FFFF_FFFF)),
    Msr.MISC_ENABLE: (1, _ALL),
    _SYSCFG: (0, 0x7C0000),
    _HWCR: (0, _ALL),
    _NB_CFG: (0, _ALL),
    # Performance event selects and counters: every AMD64 processor has four; these count nothing.
    **dict.fromkeys(range(0xC0010000, 0xC0010008), (0, _ALL)),
    # SVMDIS and LOCK: virtualization is switched off for good.
    _VM_CR: (0x18, 0),
}

READ_ONLY = frozenset({int(Msr.VM_CR), _MTRR_CAP, MCG_CAP})


def initial_shadows() -> dict[int, int]:
    """The values after RESET, to be owned by one processor."""
    return {int(index): value for index, (value, _) in SHADOWS.items()} | {int(Msr.TSC_AUX): 0}


def modelled(context: Context, index: int) -> bool:
    """Whether the core itself answers for the MSR."""
    return (
        index in context.shadows
        or index in _LOCAL_APIC
        or index in synthetic.TABLE
        or index in _SEGMENT_BASES
        or index in (Msr.EFER, Msr.TSC)
        or context.environment.has_msr(index)
    )


def read(context: Context, index: int) -> int:
    """Value of a modelled MSR. Raises #GP."""
    environment = context.environment
    if index == Msr.EFER:
        return environment.efer
    if index in _SEGMENT_BASES:
        return environment.segment(_SEGMENT_BASES[Msr(index)]).base
    if index == Msr.TSC:
        return context.platform.clock.tsc() + context.engine.tsc_offset & _ALL
    if index in _LOCAL_APIC:
        try:
            return context.local_apic.msr_read(index)
        except GeneralProtection:
            raise general_protection() from None
    if index in synthetic.TABLE:
        try:
            return synthetic.read(context.hyperv, index)
        except GeneralProtection:
            raise general_protection() from None
    if index in context.shadows:
        return context.shadows[index]
    value = environment.msr(index)
    return value & 0xFFFF_FFFF if index in (Msr.SYSENTER_CS, Msr.SFMASK) else value


def check(context: Context, index: int, value: int) -> int:
    """The value that a write would leave in a modelled MSR. Raises #GP.

    The local APIC and the synthetic MSRs check as they are written.
    """
    if index == Msr.EFER:
        return control.check_efer(context.control_state(), value)
    if index in _CANONICAL:
        return control.check_canonical(value)
    if index == Msr.PAT and any(value >> shift & 0xFF not in _PAT_TYPES for shift in range(0, 64, 8)):
        raise general_protection()
    if index == Msr.SFMASK:
        return value & 0xFFFF_FFFF
    if index == Msr.SYSENTER_CS:
        return value & 0xFFFF
    if index in READ_ONLY or not _machine_check_takes(context, index, value):
        raise general_protection()
    if index in SHADOWS:
        writable = SHADOWS[index][1]
        return value & writable | context.shadows[index] & ~writable
    return value


def _machine_check_takes(context: Context, index: int, value: int) -> bool:
    """Errors are all reported or none (Intel SDM volume 3, IA32_MCi_CTL).

    A status is only cleared, unless HWCR.McStatusWrEn is set (AMD APM volume 2, MCi_STATUS).
    """
    if index == MC0_CTL:
        return value in (0, _ALL)
    return index != MC0_STATUS or not value or bool(context.shadows[_HWCR] & _MC_STATUS_WRITABLE)


def write(context: Context, index: int, value: int) -> None:
    """Stores a value that `check` gave. Raises #GP from the local APIC and the synthetic MSRs."""
    environment = context.environment
    if index == Msr.EFER:
        environment.set_efer(value)
    elif index in _SEGMENT_BASES:
        segment = _SEGMENT_BASES[Msr(index)]
        environment.set_segment(segment, environment.segment(segment)._replace(base=value))
    elif index == Msr.TSC:
        offset = value - context.platform.clock.tsc() & _ALL
        context.engine.tsc_offset = offset
        context.hyperv.partition.tsc_page.set_tsc_offset(context.vp_index, offset)
    elif index in _LOCAL_APIC:
        try:
            context.local_apic.msr_write(index, value)
        except GeneralProtection:
            raise general_protection() from None
    elif index in synthetic.TABLE:
        try:
            synthetic.write(context.hyperv, index, value)
        except GeneralProtection:
            raise general_protection() from None
    elif index in context.shadows:
        context.shadows[index] = value
        if index == Msr.TSC_AUX:
            context.engine.set_tsc_aux(value)
    else:
        environment.set_msr(index, value)


def every(context: Context) -> dict[int, int]:
    """All modelled MSRs outside the local APIC's x2APIC range, by ascending index."""
    indices = {
        *context.shadows,
        *context.engine.layout.msrs,
        *_SEGMENT_BASES,
        *synthetic.PLAIN,
        int(Msr.EFER),
        int(Msr.TSC),
        int(Msr.APIC_BASE),
    }
    return {int(index): read(context, index) for index in sorted(indices)}
