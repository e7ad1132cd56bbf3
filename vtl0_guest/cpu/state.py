"""A processor's whole state as messages, and register writes from outside.

What comes from outside is made harmless, not judged: bits that this processor lacks are dropped and TR always holds
a busy TSS, because the engine aborts on a gate through any other.
"""

from __future__ import annotations

from vtl0_guest.cpu import control, descriptors, exits, msrs
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.environment import Gpr, Seg, SegmentState
from vtl0_guest.cpu.faults import GuestFault
from vtl0_guest.cpu.hyperv import msrs as synthetic
from vtl0_guest.cpu.instructions.control_registers import set_cr0
from vtlab import errors
from vtlab.v1 import registers_pb2
from vtlab.x86.registers import Cr0, Rflags

_GPR_NAMES = {registers_pb2.REGISTER_NAME_RAX + int(number): number for number in Gpr}
_SEGMENT_NAMES = {
    registers_pb2.REGISTER_NAME_ES: Seg.ES,
    registers_pb2.REGISTER_NAME_CS: Seg.CS,
    registers_pb2.REGISTER_NAME_SS: Seg.SS,
    registers_pb2.REGISTER_NAME_DS: Seg.DS,
    registers_pb2.REGISTER_NAME_FS: Seg.FS,
    registers_pb2.REGISTER_NAME_GS: Seg.GS,
    registers_pb2.REGISTER_NAME_LDTR: Seg.LDTR,
    registers_pb2.REGISTER_NAME_TR: Seg.TR,
}
_TABLE_NAMES = {registers_pb2.REGISTER_NAME_IDTR: Seg.IDTR, registers_pb2.REGISTER_NAME_GDTR: Seg.GDTR}
_DEBUG_NAMES = {
    registers_pb2.REGISTER_NAME_DR0: 0,
    registers_pb2.REGISTER_NAME_DR1: 1,
    registers_pb2.REGISTER_NAME_DR2: 2,
    registers_pb2.REGISTER_NAME_DR3: 3,
    registers_pb2.REGISTER_NAME_DR6: 4,
    registers_pb2.REGISTER_NAME_DR7: 5,
}
_VECTOR_NAMES = range(registers_pb2.REGISTER_NAME_XMM0, registers_pb2.REGISTER_NAME_XMM0 + 16)
_VM, _PE = int(Rflags.VM), int(Cr0.PE)


def read(context: Context) -> registers_pb2.ProcessorState:
    """Everything the processor holds."""
    environment = context.environment
    state = registers_pb2.ProcessorState(xcr0=context.engine.xcr0, debug=context.debug)
    state.registers.MergeFromString(exits.registers_bytes(environment, context.cr8))
    for message, number in (
        (state.es, Seg.ES),
        (state.fs, Seg.FS),
        (state.gs, Seg.GS),
        (state.ldtr, Seg.LDTR),
        (state.tr, Seg.TR),
    ):
        message.CopyFrom(exits.segment_message(environment.segment(number)))
    for table, number in ((state.gdtr, Seg.GDTR), (state.idtr, Seg.IDTR)):
        table.base, table.limit = environment.table(number)
    state.msrs.extend(registers_pb2.MsrValue(index=index, value=value) for index, value in msrs.every(context).items())
    return state


def load(context: Context, state: registers_pb2.ProcessorState) -> None:
    """Replaces everything. MSRs that are not listed keep their values."""
    environment, registers = context.environment, state.registers
    _load_general(context, registers)
    for number, message in (
        (Seg.ES, state.es),
        (Seg.CS, registers.cs),
        (Seg.SS, registers.ss),
        (Seg.DS, registers.ds),
        (Seg.FS, state.fs),
        (Seg.GS, state.gs),
        (Seg.LDTR, state.ldtr),
        (Seg.TR, state.tr),
    ):
        set_segment(context, number, message)
    environment.set_table(Seg.GDTR, state.gdtr.base, state.gdtr.limit)
    environment.set_table(Seg.IDTR, state.idtr.base, state.idtr.limit)
    environment.set_cr4(registers.cr4 & control.CR4_DEFINED)
    environment.set_efer(registers.efer & control.EFER_DEFINED)
    environment.set_cr2(registers.cr2)
    environment.set_cr3(registers.cr3)
    set_cr0(context, registers.cr0 & control.CR0_DEFINED | Cr0.ET)
    context.local_apic.tpr = (registers.cr8 & 0xF) << 4
    environment.set_cpl(_consistent_cpl(context, registers.cpl))
    environment.refresh()
    environment.set_interrupt_shadow(registers.interrupt_shadow)
    context.engine.xcr0 = (state.xcr0 & control.XCR0_DEFINED) | 1
    for index, value in enumerate(state.debug[:6]):
        context.debug[index] = value
    for entry in state.msrs:
        set_msr(context, entry.index, entry.value)
    context.halted = context.waits_for_startup = False


def _load_general(context: Context, registers: registers_pb2.Registers) -> None:
    environment = context.environment
    for number in Gpr:
        environment.set_gpr(number, getattr(registers, number.name.lower()))
    environment.rip = registers.rip
    environment.rflags = registers.rflags


def _consistent_cpl(context: Context, cpl: int) -> int:
    if not context.environment.cr(0) & _PE:
        return 0
    return 3 if context.environment.rflags & _VM else cpl & 3


def set_segment(context: Context, number: Seg, message: registers_pb2.Segment) -> None:
    """Loads the hidden part as it is; TR is made a busy TSS."""
    segment = SegmentState(message.selector & 0xFFFF, message.attributes & 0xF0FF, message.limit, message.base)
    if number == Seg.TR and segment.attributes & 0x9F not in (
        0x80 | descriptors.TSS16_BUSY,
        0x80 | descriptors.TSS_BUSY,
    ):
        segment = segment._replace(attributes=0x80 | descriptors.TSS_BUSY)
    context.environment.set_segment(number, segment)


def set_msr(context: Context, index: int, value: int) -> None:
    """Writes a modelled MSR from outside. Raises BadArgument for one that is not, or a value it refuses.

    A value that a synthetic MSR refuses is dropped: a guest can ask for any, by HvCallSetVpRegisters.
    """
    if not msrs.modelled(context, index):
        raise errors.BadArgument(f"MSR {index:#x}", "is not one that the processor models")
    if index in msrs.READ_ONLY:
        return
    try:
        msrs.write(context, index, msrs.check(context, index, value))
    except GuestFault:
        if index in synthetic.TABLE:
            return
        raise errors.BadArgument(f"MSR {index:#x}", f"refuses the value {value:#x}") from None


def set_register(context: Context, update: registers_pb2.RegisterValue) -> None:
    """One register of an update. Raises BadArgument for a name without a register."""
    environment, name, value = context.environment, update.name, update.value
    if name in _GPR_NAMES:
        environment.set_gpr(_GPR_NAMES[name], value)
    elif name in _SEGMENT_NAMES:
        number = _SEGMENT_NAMES[name]
        set_segment(context, number, update.segment)
        if number == Seg.SS and environment.protected:
            environment.set_cpl(update.segment.attributes >> 5 & 3)
    elif name in _TABLE_NAMES:
        environment.set_table(_TABLE_NAMES[name], update.table.base, update.table.limit)
    elif name in _DEBUG_NAMES:
        context.debug[_DEBUG_NAMES[name]] = value
    elif name in _SETTERS:
        _SETTERS[name](context, value)
    elif name in _VECTOR_NAMES and len(update.vector) == 16:
        context.engine.vectors.set_vector(name - registers_pb2.REGISTER_NAME_XMM0, update.vector)
    else:
        raise errors.BadArgument(f"register {name:#x}", "is not one that the processor has")


def _set_rip(context: Context, value: int) -> None:
    """Who says where to go on means that it goes on: HLT ends."""
    context.environment.rip = value
    context.halted = False


def _set_rflags(context: Context, value: int) -> None:
    context.environment.rflags = value


def _set_cr0(context: Context, value: int) -> None:
    set_cr0(context, value & control.CR0_DEFINED | Cr0.ET)


def _set_cr4(context: Context, value: int) -> None:
    context.environment.set_cr4(value & control.CR4_DEFINED)


def _set_cr8(context: Context, value: int) -> None:
    context.local_apic.tpr = (value & 0xF) << 4


def _set_efer(context: Context, value: int) -> None:
    environment = context.environment
    environment.set_efer(control.efer_after_cr0(value & control.EFER_DEFINED, environment.cr(0)))


def _set_xcr0(context: Context, value: int) -> None:
    context.engine.xcr0 = value & control.XCR0_DEFINED | 1


_SETTERS = {
    registers_pb2.REGISTER_NAME_RIP: _set_rip,
    registers_pb2.REGISTER_NAME_RFLAGS: _set_rflags,
    registers_pb2.REGISTER_NAME_CR0: _set_cr0,
    registers_pb2.REGISTER_NAME_CR2: lambda context, value: context.environment.set_cr2(value),
    registers_pb2.REGISTER_NAME_CR3: lambda context, value: context.environment.set_cr3(value),
    registers_pb2.REGISTER_NAME_CR4: _set_cr4,
    registers_pb2.REGISTER_NAME_CR8: _set_cr8,
    registers_pb2.REGISTER_NAME_EFER: _set_efer,
    registers_pb2.REGISTER_NAME_XFEM: _set_xcr0,
}
