"""Which memory an instruction accesses: linear address, size and direction of each explicit and implicit operand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from iced_x86 import (
    CodeSize,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    RegisterExt,
)

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import NO_REGISTER, SEGMENTS, read_register

_factory = InstructionInfoFactory()
_READS = frozenset({OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE})
_WRITES = frozenset({OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE})
_MASKS: dict[int, int] = {CodeSize.CODE16: 0xFFFF, CodeSize.CODE32: 0xFFFF_FFFF}
_MASK64 = (1 << 64) - 1
# Their register operand is an offset in bits from the memory operand, of any size and sign.
_BIT_TESTS = frozenset({Mnemonic.BT, Mnemonic.BTC, Mnemonic.BTR, Mnemonic.BTS})
# They leave bytes of the operand as they are.
_PARTIAL = frozenset({Mnemonic.MASKMOVDQU, Mnemonic.MASKMOVQ, Mnemonic.FXSAVE, Mnemonic.FXSAVE64})


class Operand(NamedTuple):
    """`size` in bytes; 0 if the instruction's form does not fix it."""

    linear: int
    size: int
    read: bool
    written: bool


def operands(context: Context, instruction: Instruction) -> Iterator[Operand]:
    """Those of one execution; of a string instruction with REP, of its next element."""
    environment = context.environment
    partial = instruction.mnemonic in _PARTIAL
    for used in _factory.info(instruction).used_memory():
        if used.access == OpAccess.NO_MEM_ACCESS:
            continue
        segment = SEGMENTS.get(used.segment)
        base = environment.segment(segment).base if segment is not None else 0
        offset = used.displacement + _bit_offset(context, instruction)
        parts: tuple[tuple[int, int], ...] = ((used.base, 1), (used.index, used.scale))
        for register, scale in parts:
            if register != NO_REGISTER:
                offset += read_register(environment, register) * scale
        offset &= _MASKS.get(used.address_size, _MASK64)
        if environment.bitness == 64:
            flat = segment is None or segment < 4
            linear = offset if flat else base + offset & _MASK64
        else:
            linear = base + (offset & 0xFFFF_FFFF) & 0xFFFF_FFFF
        written = used.access in _WRITES
        read = used.access in _READS or (written and partial)
        size = MemorySizeExt.size(used.memory_size) or MemorySizeExt.size(instruction.memory_size)
        yield Operand(linear, size, read, written)


def _bit_offset(context: Context, instruction: Instruction) -> int:
    """Bytes from the memory operand to the word that a bit test with a register means."""
    if instruction.mnemonic not in _BIT_TESTS or instruction.op1_kind != OpKind.REGISTER:
        return 0
    size = RegisterExt.size(instruction.op1_register)
    value = read_register(context.environment, instruction.op1_register)
    signed = value - (1 << 8 * size if value >> 8 * size - 1 else 0)
    return (signed >> {2: 4, 4: 5, 8: 6}[size]) * size
