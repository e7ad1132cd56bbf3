"""What the processor accepts in its control registers. Pure: raises GuestFault (#GP) or gives the value to store.

Sources: Intel SDM volume 3, 2.5 and volume 2, MOV to control registers, XSETBV; AMD APM volume 2, 3.1 and 14.6. The
modelled processor has no LA57, PCID, VMX, SMX, CET, protection keys or AVX: their bits are reserved.
"""

from __future__ import annotations

from typing import NamedTuple

from vtl0_guest.cpu.faults import general_protection
from vtlab.x86.paging import PHYSICAL_BITS, is_canonical
from vtlab.x86.registers import Cr0, Cr4, Efer

CR0_DEFINED = int(Cr0.PE | Cr0.MP | Cr0.EM | Cr0.TS | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.NW | Cr0.CD | Cr0.PG)
CR4_DEFINED = int(
    Cr4.VME | Cr4.PVI | Cr4.TSD | Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.PCE | Cr4.OSFXSR
    | Cr4.OSXMMEXCPT | Cr4.UMIP | Cr4.FSGSBASE | Cr4.OSXSAVE | Cr4.SMEP | Cr4.SMAP
)  # fmt: skip
EFER_DEFINED = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE | Efer.FFXSR | Efer.AIBRSE)
XCR0_DEFINED = 0x3  # x87, SSE
_PE, _NW, _CD, _PG = int(Cr0.PE), int(Cr0.NW), int(Cr0.CD), int(Cr0.PG)
_PAE = int(Cr4.PAE)
_LME, _LMA = int(Efer.LME), int(Efer.LMA)


class ControlState(NamedTuple):
    """What the rules depend on."""

    cr0: int
    cr4: int
    efer: int
    cs_long: bool  # CS.L


def check_cr0(state: ControlState, value: int) -> int:
    """New CR0. ET is always one; the reserved low bits read as zero, the upper half must be zero."""
    if value >> 32:
        raise general_protection()
    value = value & CR0_DEFINED | int(Cr0.ET)
    if (value & _PG and not value & _PE) or (value & _NW and not value & _CD):
        raise general_protection()
    if value & _PG and not state.cr0 & _PG and state.efer & _LME and (not state.cr4 & _PAE or state.cs_long):
        raise general_protection()
    if not value & _PG and state.cr0 & _PG and state.cs_long and state.efer & _LMA:
        raise general_protection()
    return value


def efer_after_cr0(efer: int, cr0: int) -> int:
    """EFER with LMA as LME and CR0.PG say."""
    return efer | _LMA if efer & _LME and cr0 & _PG else efer & ~_LMA


def check_cr3(state: ControlState, value: int) -> int:
    """New CR3. Bits above the physical address width are reserved in long mode."""
    if state.efer & _LMA and value >> PHYSICAL_BITS:
        raise general_protection()
    return value


def check_cr4(state: ControlState, value: int) -> int:
    if value & ~CR4_DEFINED:
        raise general_protection()
    if state.efer & _LMA and not value & _PAE:
        raise general_protection()
    return value


def check_efer(state: ControlState, value: int) -> int:
    """New EFER. LMA is the processor's own; LME cannot change while paging is on."""
    if value & ~EFER_DEFINED:
        raise general_protection()
    if (value ^ state.efer) & _LME and state.cr0 & _PG:
        raise general_protection()
    return value & ~_LMA | state.efer & _LMA


def check_xcr0(index: int, value: int) -> int:
    """New XCR0: x87 always, nothing the processor lacks."""
    if index or not value & 1 or value & ~XCR0_DEFINED:
        raise general_protection()
    return value


def check_canonical(value: int) -> int:
    """A linear address for an MSR."""
    if not is_canonical(value):
        raise general_protection()
    return value
