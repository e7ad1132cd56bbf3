"""Which handler serves which SVM exit, and the instructions that may stand there.

An instruction that does not belong to its exit means that the engine ran other bytes than memory holds now (a stale
translation): the processor flushes and runs it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from iced_x86 import Instruction, Mnemonic

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.instructions import control_registers, msr, system, tables
from vtl0_guest.cpu.operation import Operation
from vtl0_guest.cpu.vmcb import ExitCode

Handler = Callable[[Context, Instruction], Operation | None]


class Row(NamedTuple):
    """`mnemonics` empty: the decoder need not know the instruction."""

    handler: Handler
    mnemonics: frozenset[int]


def _row(handler: Handler, *mnemonics: int) -> Row:
    return Row(handler, frozenset(mnemonics))


_WRITE_CR = _row(control_registers.write_control, Mnemonic.MOV, Mnemonic.LMSW, Mnemonic.CLTS)
_READ_CR = _row(control_registers.read_control, Mnemonic.MOV, Mnemonic.SMSW)
_MOVE_DR = _row(control_registers.move_debug, Mnemonic.MOV)

TABLE: dict[int, Row] = {
    **dict.fromkeys(range(ExitCode.CR0_READ, ExitCode.CR0_READ + 16), _READ_CR),
    **dict.fromkeys(range(ExitCode.CR0_WRITE, ExitCode.CR0_WRITE + 16), _WRITE_CR),
    **dict.fromkeys(range(ExitCode.DR0_READ, ExitCode.DR0_READ + 32), _MOVE_DR),
    ExitCode.IDTR_READ: _row(tables.store_table, Mnemonic.SIDT),
    ExitCode.GDTR_READ: _row(tables.store_table, Mnemonic.SGDT),
    ExitCode.LDTR_READ: _row(tables.store_selector, Mnemonic.SLDT),
    ExitCode.TR_READ: _row(tables.store_selector, Mnemonic.STR),
    ExitCode.IDTR_WRITE: _row(tables.load_table, Mnemonic.LIDT),
    ExitCode.GDTR_WRITE: _row(tables.load_table, Mnemonic.LGDT),
    ExitCode.LDTR_WRITE: _row(tables.load_ldtr, Mnemonic.LLDT),
    ExitCode.TR_WRITE: _row(tables.load_tr, Mnemonic.LTR),
    ExitCode.RDTSC: _row(system.rdtsc, Mnemonic.RDTSC, Mnemonic.RDTSCP),
    ExitCode.RDPMC: _row(system.rdpmc, Mnemonic.RDPMC),
    ExitCode.CPUID: _row(system.cpuid, Mnemonic.CPUID),
    ExitCode.INVD: _row(system.nothing, Mnemonic.INVD, Mnemonic.WBINVD),
    ExitCode.HLT: _row(system.hlt, Mnemonic.HLT),
    ExitCode.INVLPG: _row(system.invlpg, Mnemonic.INVLPG),
    ExitCode.MSR: _row(msr.access, Mnemonic.RDMSR, Mnemonic.WRMSR),
    ExitCode.VMMCALL: _row(system.hypercall, Mnemonic.VMMCALL),
    **dict.fromkeys(
        (
            ExitCode.INVLPGA,
            ExitCode.VMRUN,
            ExitCode.VMLOAD,
            ExitCode.VMSAVE,
            ExitCode.STGI,
            ExitCode.CLGI,
            ExitCode.SKINIT,
            ExitCode.MONITOR,
            ExitCode.MWAIT,
        ),
        _row(system.undefined),
    ),
}
