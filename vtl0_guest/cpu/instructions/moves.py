"""Plain loads and stores that the core finishes itself: device registers in memory, and accesses answered elsewhere.

MOV, MOVZX, MOVSX and MOVSXD, and the bytes of STOS. What else names a device register, the engine executes on a copy
(device_memory.py); what else was answered elsewhere is an emulation failure (docs/limits.md).
"""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic, OpKind, RegisterExt

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import memory_size, operand_address, read_operand, write_register
from vtl0_guest.cpu.devices.bus import MmioDevice
from vtl0_guest.cpu.environment import Gpr
from vtl0_guest.cpu.faults import CannotEmulate
from vtl0_guest.cpu.guest_memory import PAGE

_LOADS = frozenset({Mnemonic.MOV, Mnemonic.MOVZX, Mnemonic.MOVSX, Mnemonic.MOVSXD})
_SIGNED = frozenset({Mnemonic.MOVSX, Mnemonic.MOVSXD})
_STOS = {Mnemonic.STOSB: 1, Mnemonic.STOSW: 2, Mnemonic.STOSD: 4, Mnemonic.STOSQ: 8}
_SIZES = frozenset({1, 2, 4, 8})


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


def device_access(context: Context, instruction: Instruction, device: MmioDevice, offset: int) -> bool:
    """A plain load or store within the page of a device. False, and nothing done, if it is something else."""
    if not is_plain(instruction):
        return False
    size = memory_size(instruction)
    writes = instruction.op0_kind == OpKind.MEMORY
    if not 0 < offset <= PAGE - 8:
        # Where an access crosses pages, the engine names a place that is not always the operand's.
        offset = operand_address(context.environment, instruction, size, writes) & PAGE - 1
        if offset + size > PAGE:
            return False
    if writes:
        device.mmio_write(offset, size, int.from_bytes(store_data(context, instruction), "little"))
    else:
        finish_load(context, instruction, device.mmio_read(offset, size))
    return True


def is_plain(instruction: Instruction) -> bool:
    """A move between memory and a general register, or of an immediate."""
    if instruction.mnemonic not in _LOADS or memory_size(instruction) not in _SIZES:
        return False
    kinds = ((instruction.op0_kind, instruction.op0_register), (instruction.op1_kind, instruction.op1_register))
    return all(kind != OpKind.REGISTER or RegisterExt.is_gpr(register) for kind, register in kinds)
