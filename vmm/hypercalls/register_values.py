"""Which values HvCallSetVpRegisters takes for architectural registers: pure. Others are INVALID_REGISTER_VALUE.

Sources: Intel SDM volume 3, 2.5; AMD APM volume 2, 3.1; facts about the checks from openvmm. Reserved low bits of CR0
are dropped, not refused.
"""

from __future__ import annotations

from collections.abc import Callable

from vtlab.hyperv.msrs import PAGE_ENABLE, HvMsr
from vtlab.hyperv.synic import FIRST_VECTOR, SINT_COUNT, SintFlags
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import registers_pb2 as r
from vtlab.x86.paging import is_canonical
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr

_WORD = (1 << 64) - 1
_LOW = (1 << 32) - 1
_PE, _PG, _NW, _CD = int(Cr0.PE), int(Cr0.PG), int(Cr0.NW), int(Cr0.CD)
# What the modelled processor has (vtl0_guest.cpu.control).
_CR4 = int(
    Cr4.VME | Cr4.PVI | Cr4.TSD | Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.PCE | Cr4.OSFXSR
    | Cr4.OSXMMEXCPT | Cr4.UMIP | Cr4.FSGSBASE | Cr4.OSXSAVE | Cr4.SMEP | Cr4.SMAP
)  # fmt: skip
_EFER = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE | Efer.FFXSR)
_XCR0 = 0x3
_PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})

Check = Callable[[int], bool]


def _cr0(value: int) -> bool:
    return value <= _LOW and not (value & _PG and not value & _PE) and not (value & _NW and not value & _CD)


def _pat(value: int) -> bool:
    return all(value >> shift & 0xFF in _PAT_TYPES for shift in range(0, 64, 8))


def _low(value: int) -> bool:
    return value <= _LOW


REGISTERS: dict[int, Check] = {
    r.REGISTER_NAME_CR0: _cr0,
    r.REGISTER_NAME_CR3: lambda value: not value >> 52,
    r.REGISTER_NAME_CR4: lambda value: not value & ~_CR4,
    r.REGISTER_NAME_CR8: lambda value: value <= 15,
    r.REGISTER_NAME_EFER: lambda value: not value & ~_EFER,
    r.REGISTER_NAME_XFEM: lambda value: bool(value & 1) and not value & ~_XCR0,
    r.REGISTER_NAME_DR6: _low,
    r.REGISTER_NAME_DR7: _low,
}
MSRS: dict[int, Check] = {
    Msr.KERNEL_GS_BASE: is_canonical,
    Msr.SYSENTER_EIP: is_canonical,
    Msr.SYSENTER_ESP: is_canonical,
    Msr.LSTAR: is_canonical,
    Msr.CSTAR: is_canonical,
    Msr.SFMASK: _low,
    Msr.TSC_AUX: _low,
    Msr.PAT: _pat,
}

# Synthetic MSRs of the form enable [0], page number [63:12]: an enabled page must be one that the level can write.
PAGES = frozenset({HvMsr.VP_ASSIST_PAGE, HvMsr.SIEFP, HvMsr.SIMP})
SYNTHETIC_READ_ONLY = frozenset({HvMsr.SVERSION})


def _sint(value: int) -> bool:
    return value & 0xFF >= FIRST_VECTOR or bool(value & SintFlags.MASKED)


SYNTHETIC: dict[int, Check] = {HvMsr.SINT0 + sint: _sint for sint in range(SINT_COUNT)}


def legal_register(name: int, value: int) -> bool:
    """A 64-bit register by name; names without a row take every value."""
    check = REGISTERS.get(name)
    return value <= _WORD and (check is None or check(value))


def legal_msr(index: int, value: int) -> bool:
    check = MSRS.get(index)
    return value <= _WORD and (check is None or check(value))


def legal_synthetic(index: int, value: int, writable: Callable[[int], bool]) -> bool:
    """A synthetic MSR by its index; `writable` tells of a guest-physical address whether the level can write there."""
    if value > _WORD:
        return False
    if index in PAGES and value & PAGE_ENABLE:
        return writable(value & -PAGE_SIZE)
    check = SYNTHETIC.get(index)
    return check is None or check(value)
