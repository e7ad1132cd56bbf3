"""MOV to and from control and debug registers, LMSW, SMSW, CLTS, XSETBV (Intel SDM volume 2; volume 3, 2.5, 17.2)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic, OpKind, RegisterExt

from vtl0_guest.cpu import control
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import read_operand, read_register, write_operand, write_register
from vtl0_guest.cpu.environment import Gpr
from vtl0_guest.cpu.faults import general_protection, undefined_opcode
from vtl0_guest.cpu.operation import Operation
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr4

_UMIP, _DE = int(Cr4.UMIP), int(Cr4.DE)
_GD = 1 << 13


def require_kernel(context: Context) -> None:
    """#GP(0) above CPL0, also in virtual-8086 mode, which runs at CPL3."""
    if context.environment.cpl and context.environment.cr(0) & 1:
        raise general_protection()


def register_write(name: registers_pb2.RegisterName.ValueType, old: int, new: int) -> vcpu_pb2.Exit:
    return vcpu_pb2.Exit(register_write=vcpu_pb2.RegisterWrite(name=name, old_value=old, new_value=new))


def write_control(context: Context, instruction: Instruction) -> Operation | None:
    """MOV to CR0, CR3, CR4, CR8; LMSW; CLTS."""
    require_kernel(context)
    environment = context.environment
    if instruction.mnemonic == Mnemonic.CLTS:
        return _write_cr0(context, environment.cr(0) & ~0x8)
    if instruction.mnemonic == Mnemonic.LMSW:
        word = read_operand(environment, context.memory, instruction, 0, 2)
        old = environment.cr(0)
        # LMSW may set PE but not clear it.
        return _write_cr0(context, old & ~0xE | word & 0xF | old & 1)
    number = RegisterExt.number(instruction.op0_register)
    value = read_register(environment, instruction.op1_register)
    try:
        writer = _WRITERS[number]
    except KeyError:
        raise undefined_opcode() from None
    return writer(context, value)


def set_cr0(context: Context, value: int) -> None:
    """Stores a CR0 that was checked, with what follows for EFER.LMA."""
    environment = context.environment
    efer = control.efer_after_cr0(environment.efer, value)
    if efer != environment.efer:
        environment.set_efer(efer)
    environment.set_cr0(value)


def _write_cr0(context: Context, value: int) -> Operation | None:
    old, new = context.environment.cr(0), control.check_cr0(context.control_state(), value)

    def commit(judged: int) -> None:
        set_cr0(context, control.check_cr0(context.control_state(), judged))

    if context.intercepts.register_write(registers_pb2.REGISTER_NAME_CR0, old, new):
        return Operation(register_write(registers_pb2.REGISTER_NAME_CR0, old, new), commit, new)
    set_cr0(context, new)
    return None


def _write_cr3(context: Context, value: int) -> Operation | None:
    new = control.check_cr3(context.control_state(), value)

    def commit(judged: int) -> None:
        context.environment.set_cr3(control.check_cr3(context.control_state(), judged))

    if context.intercepts.cr3_write(new):
        old = context.environment.cr(3)
        return Operation(register_write(registers_pb2.REGISTER_NAME_CR3, old, new), commit, new)
    context.environment.set_cr3(new)
    return None


def _write_cr4(context: Context, value: int) -> Operation | None:
    old, new = context.environment.cr(4), control.check_cr4(context.control_state(), value)

    def commit(judged: int) -> None:
        context.environment.set_cr4(control.check_cr4(context.control_state(), judged))

    if context.intercepts.register_write(registers_pb2.REGISTER_NAME_CR4, old, new):
        return Operation(register_write(registers_pb2.REGISTER_NAME_CR4, old, new), commit, new)
    context.environment.set_cr4(new)
    return None


def _write_cr8(context: Context, value: int) -> Operation | None:
    if value >> 4:
        raise general_protection()
    context.local_apic.tpr = value << 4
    return None


_WRITERS = {0: _write_cr0, 3: _write_cr3, 4: _write_cr4, 8: _write_cr8}


def read_control(context: Context, instruction: Instruction) -> Operation | None:
    """MOV from CR0 and CR8; SMSW, which UMIP forbids above CPL0."""
    environment = context.environment
    if instruction.mnemonic == Mnemonic.SMSW:
        if environment.cpl and environment.cr(4) & _UMIP:
            raise general_protection()
        register = instruction.op0_kind == OpKind.REGISTER
        write_operand(
            environment,
            context.memory,
            instruction,
            0,
            2,
            environment.cr(0) if register else environment.cr(0) & 0xFFFF,
        )
        return None
    require_kernel(context)
    number = RegisterExt.number(instruction.op1_register)
    if number not in (0, 2, 3, 4, 8):
        raise undefined_opcode()
    write_register(environment, instruction.op0_register, context.cr8 if number == 8 else environment.cr(number))
    return None


def _debug_index(context: Context, number: int) -> int:
    """Index in Context.debug of DR`number`; DR4 and DR5 are DR6 and DR7 unless CR4.DE."""
    if number in (4, 5):
        if context.environment.cr(4) & _DE:
            raise undefined_opcode()
        number += 2
    if number > 7:
        raise undefined_opcode()
    return number if number < 4 else number - 2


def move_debug(context: Context, instruction: Instruction) -> Operation | None:
    """MOV to and from debug registers. DR7.GD is kept but does not trap; breakpoints never fire (docs/limits.md)."""
    require_kernel(context)
    environment = context.environment
    bits = 64 if environment.bitness == 64 else 32
    to_debug = RegisterExt.is_dr(instruction.op0_register)
    debug_register = instruction.op0_register if to_debug else instruction.op1_register
    index = _debug_index(context, RegisterExt.number(debug_register))
    if not to_debug:
        write_register(environment, instruction.op0_register, context.debug[index])
        return None
    value = read_register(environment, instruction.op1_register)
    if index >= 4:
        if bits == 64 and value >> 32:
            raise general_protection()
        value = value & 0xE00F | 0xFFFF0FF0 if index == 4 else value & 0xFFFF2FFF | 0x400
    context.debug[index] = value
    return None


def xsetbv(context: Context, _instruction: Instruction) -> Operation | None:
    """XSETBV, when the engine lets it through to the core."""
    environment = context.environment
    if not environment.cr(4) & Cr4.OSXSAVE:
        raise undefined_opcode()
    require_kernel(context)
    index = environment.gpr(Gpr.RCX) & 0xFFFF_FFFF
    value = environment.gpr(Gpr.RAX) & 0xFFFF_FFFF | (environment.gpr(Gpr.RDX) & 0xFFFF_FFFF) << 32
    new = control.check_xcr0(index, value)

    def commit(judged: int) -> None:
        context.engine.xcr0 = control.check_xcr0(0, judged)

    if context.intercepts.register_write(registers_pb2.REGISTER_NAME_XFEM, context.engine.xcr0, new):
        return Operation(register_write(registers_pb2.REGISTER_NAME_XFEM, context.engine.xcr0, new), commit, new)
    commit(new)
    return None
