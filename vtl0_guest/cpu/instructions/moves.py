"""Plain loads and stores that the core finishes itself: device registers in memory, and accesses answered elsewhere.

MOV, MOVZX, MOVSX, MOVSXD and STOS without REP; AND, OR, XOR, ADD, SUB, TEST, CMP and XCHG on device registers.
Everything else is an emulation failure (docs/limits.md).
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic, OpKind, RegisterExt

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import memory_size, read_operand, read_register, write_register
from vtl0_guest.cpu.environment import Gpr
from vtl0_guest.cpu.faults import CannotEmulate
from vtlab.x86.registers import Rflags

_LOADS = frozenset({Mnemonic.MOV, Mnemonic.MOVZX, Mnemonic.MOVSX, Mnemonic.MOVSXD})
_SIGNED = frozenset({Mnemonic.MOVSX, Mnemonic.MOVSXD})
_STOS = {Mnemonic.STOSB: 1, Mnemonic.STOSW: 2, Mnemonic.STOSD: 4, Mnemonic.STOSQ: 8}
_LOGIC: dict[int, Callable[[int, int], int]] = {
    Mnemonic.AND: lambda a, b: a & b,
    Mnemonic.OR: lambda a, b: a | b,
    Mnemonic.XOR: lambda a, b: a ^ b,
    Mnemonic.TEST: lambda a, b: a & b,
}
_ARITHMETIC: dict[int, int] = {Mnemonic.ADD: 1, Mnemonic.SUB: -1, Mnemonic.CMP: -1}
_NO_RESULT = frozenset({Mnemonic.TEST, Mnemonic.CMP})
_STATUS = int(Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.OF)


def store_data(context: Context, instruction: Instruction) -> bytes:
    """The bytes of a plain store; empty if it is not one or the value is not known before the load."""
    environment = context.environment
    size = memory_size(instruction)
    if instruction.mnemonic in _STOS:
        size = _STOS[instruction.mnemonic]
        return (environment.gpr(Gpr.RAX) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if instruction.mnemonic != Mnemonic.MOV or instruction.op0_kind != OpKind.MEMORY or not 0 < size <= 8:
        return b""
    if instruction.op1_kind == OpKind.REGISTER and not RegisterExt.is_gpr(instruction.op1_register):
        return b""
    value = read_operand(environment, context.memory, instruction, 1, size)
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def finish_load(context: Context, instruction: Instruction, value: int) -> None:
    """Completes a load with `value`. Raises CannotEmulate for instructions that do more than load."""
    size = memory_size(instruction)
    if instruction.mnemonic not in _LOADS or instruction.op0_kind != OpKind.REGISTER or not 0 < size <= 8:
        raise CannotEmulate(f"cannot finish the load of {instruction}")
    register = instruction.op0_register
    if not RegisterExt.is_gpr(register):
        raise CannotEmulate(f"cannot finish the load of {instruction}")
    value &= (1 << 8 * size) - 1
    if instruction.mnemonic in _SIGNED and value >> 8 * size - 1:
        value |= -1 << 8 * size
    write_register(context.environment, register, value)


def device_access(
    context: Context, instruction: Instruction, read: Callable[[int], int], write: Callable[[int, int], None]
) -> None:
    """Does an instruction whose memory operand is a device register; `read` and `write` take the size in bytes."""
    data = store_data(context, instruction)
    if data:
        write(len(data), int.from_bytes(data, "little"))
        _step_stos(context, instruction, len(data))
        return
    size = memory_size(instruction)
    mnemonic = instruction.mnemonic
    if mnemonic in _LOADS:
        finish_load(context, instruction, read(size))
    elif mnemonic == Mnemonic.XCHG:
        register = instruction.op1_register if instruction.op0_kind == OpKind.MEMORY else instruction.op0_register
        old, new = read(size), read_register(context.environment, register)
        write(size, new)
        write_register(context.environment, register, old)
    elif mnemonic in _LOGIC or mnemonic in _ARITHMETIC:
        _compute(context, instruction, size, read, write)
    else:
        raise CannotEmulate(f"{instruction} on a device register")


def _step_stos(context: Context, instruction: Instruction, size: int) -> None:
    if instruction.mnemonic not in _STOS:
        return
    if instruction.has_rep_prefix:
        raise CannotEmulate(f"{instruction} on a device register")
    step = -size if context.environment.rflags & Rflags.DF else size
    context.environment.set_gpr(Gpr.RDI, context.environment.gpr(Gpr.RDI) + step)


def _compute(
    context: Context,
    instruction: Instruction,
    size: int,
    read: Callable[[int], int],
    write: Callable[[int, int], None],
) -> None:
    environment, mask = context.environment, (1 << 8 * size) - 1
    to_memory = instruction.op0_kind == OpKind.MEMORY

    def operand(number: int) -> int:
        if instruction.op_kind(number) == OpKind.MEMORY:
            return read(size) & mask
        return read_operand(environment, context.memory, instruction, number, size) & mask

    a, b = operand(0), operand(1)
    if instruction.mnemonic in _LOGIC:
        result, carry, overflow = _LOGIC[instruction.mnemonic](a, b), 0, 0
    else:
        sign = _ARITHMETIC[instruction.mnemonic]
        total = a + sign * b
        result, carry = total & mask, int(total != total & mask)
        signs = (a ^ result) & (b ^ result) if sign > 0 else (a ^ b) & (a ^ result)
        overflow = signs >> 8 * size - 1 & 1
    if instruction.mnemonic not in _NO_RESULT:
        if to_memory:
            write(size, result)
        else:
            write_register(environment, instruction.op0_register, result)
    flags = environment.rflags & ~_STATUS | carry | (overflow << 11)
    flags |= (int((result & 0xFF).bit_count() % 2 == 0) << 2) | ((a ^ b ^ result) & 0x10)
    flags |= (int(result == 0) << 6) | ((result >> 8 * size - 1 & 1) << 7)
    environment.rflags = flags
