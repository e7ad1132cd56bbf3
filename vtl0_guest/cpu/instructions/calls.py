"""SYSCALL and SYSENTER, which the engine leaves to the core; SYSRET and SYSEXIT it does itself.

Sources: AMD APM volume 3, SYSCALL and SYSENTER; volume 2, 6.1.
"""

from __future__ import annotations

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.environment import Gpr, Seg, SegmentState
from vtl0_guest.cpu.faults import general_protection, undefined_opcode
from vtlab.x86.registers import Efer, Msr, Rflags

_CODE_64, _CODE_32, _DATA = 0xA09B, 0xC09B, 0xC093  # flat, DPL 0
_FLAT = 0xFFFF_FFFF
_LOW = 0xFFFF_FFFF
_RF, _IF, _VM = int(Rflags.RF), int(Rflags.IF), int(Rflags.VM)


def _load_flat(context: Context, cs: int, ss: int, code_attributes: int) -> None:
    environment = context.environment
    environment.set_cpl(0)
    environment.set_segment(Seg.SS, SegmentState(ss, _DATA, _FLAT, 0))
    environment.set_segment(Seg.CS, SegmentState(cs, code_attributes, _FLAT, 0))


def syscall(context: Context, length: int) -> None:
    """Enters the kernel at LSTAR, CSTAR or STAR. Raises #UD without EFER.SCE."""
    environment = context.environment
    if not environment.efer & Efer.SCE or not environment.cr(0) & 1:
        raise undefined_opcode()
    star, flags, after = environment.msr(Msr.STAR), environment.rflags, environment.rip + length
    selector = star >> 32 & 0xFFFC
    if environment.long_mode:
        target = environment.msr(Msr.LSTAR if environment.bitness == 64 else Msr.CSTAR)
        environment.set_gpr(Gpr.RCX, after)
        environment.set_gpr(Gpr.R11, flags & ~_RF)
        environment.rflags = flags & ~environment.msr(Msr.SFMASK) & ~_RF
        _load_flat(context, selector, selector + 8, _CODE_64)
        environment.rip = target
    else:
        environment.set_gpr(Gpr.RCX, after & _LOW)
        environment.rflags = flags & ~(_IF | _RF | _VM)
        _load_flat(context, selector, selector + 8, _CODE_32)
        environment.rip = star & _LOW
    environment.set_interrupt_shadow(False)


def sysenter(context: Context) -> None:
    """Enters the kernel at SYSENTER_EIP. AMD has it in legacy mode only: #UD in long mode."""
    environment = context.environment
    if environment.long_mode:
        raise undefined_opcode()
    selector = environment.msr(Msr.SYSENTER_CS) & 0xFFFC
    if not environment.cr(0) & 1 or not selector:
        raise general_protection()
    environment.rflags = environment.rflags & ~(_IF | _VM | _RF)
    _load_flat(context, selector, selector + 8, _CODE_32)
    environment.set_gpr(Gpr.RSP, environment.msr(Msr.SYSENTER_ESP) & _LOW)
    environment.rip = environment.msr(Msr.SYSENTER_EIP) & _LOW
    environment.set_interrupt_shadow(False)
