"""Decoded instructions and their operands: AMD-V says which kind of instruction exited, not what it names."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, cast

from iced_x86 import Decoder, Instruction, MemorySizeExt, OpKind, Register, RegisterExt

from vtl0_guest.cpu.environment import Environment, Seg
from vtl0_guest.cpu.faults import CannotEmulate, GuestFault, general_protection
from vtl0_guest.cpu.guest_memory import GuestMemory
from vtlab.x86.paging import is_canonical
from vtlab.x86.registers import Vector

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterType

_MASKS = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: (1 << 64) - 1}
# The decoder's numbers are plain integers; its type stubs know an enumeration of one member.
SEGMENTS: dict[int, Seg] = {
    Register.ES: Seg.ES,
    Register.CS: Seg.CS,
    Register.SS: Seg.SS,
    Register.DS: Seg.DS,
    Register.FS: Seg.FS,
    Register.GS: Seg.GS,
}
NO_REGISTER: int = Register.NONE
_INSTRUCTION_POINTERS: frozenset[int] = frozenset({Register.RIP, Register.EIP})
_HIGH_BYTES: dict[int, int] = {Register.AH: 0, Register.CH: 1, Register.DH: 2, Register.BH: 3}
_STRING_16 = frozenset({OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_DI, OpKind.MEMORY_ESDI})
_STRING_32 = frozenset({OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_EDI, OpKind.MEMORY_ESEDI})
_IMMEDIATES = frozenset(
    {
        OpKind.IMMEDIATE8,
        OpKind.IMMEDIATE16,
        OpKind.IMMEDIATE32,
        OpKind.IMMEDIATE64,
        OpKind.IMMEDIATE8TO16,
        OpKind.IMMEDIATE8TO32,
        OpKind.IMMEDIATE8TO64,
        OpKind.IMMEDIATE32TO64,
    }
)


@lru_cache(maxsize=4096)
def decode(bitness: int, code: bytes) -> Instruction:
    """The first instruction of `code`, as if at address 0. Not valid: `is_invalid`. The result is shared: read only."""
    return Decoder(bitness, code, ip=0).decode()


@lru_cache(maxsize=256)
def _number_and_size(register: int) -> tuple[int, int]:
    """Encoding of the whole register and bytes of this part; the decoder numbers SPL to R15L by themselves."""
    known = cast("RegisterType", register)
    return RegisterExt.number(RegisterExt.full_register(known)), RegisterExt.size(known)


def read_register(environment: Environment, register: int) -> int:
    """A general register of any size."""
    high = _HIGH_BYTES.get(register)
    if high is not None:
        return environment.gpr(high) >> 8 & 0xFF
    number, size = _number_and_size(register)
    return environment.gpr(number) & _MASKS[size]


def write_register(environment: Environment, register: int, value: int) -> None:
    """As the processor does: 32-bit writes clear the upper half, 8- and 16-bit ones keep the rest."""
    high = _HIGH_BYTES.get(register)
    if high is not None:
        environment.set_gpr(high, environment.gpr(high) & ~0xFF00 | (value & 0xFF) << 8)
        return
    number, size = _number_and_size(register)
    value &= _MASKS[size]
    if size < 4:
        value |= environment.gpr(number) & ~_MASKS[size]
    environment.set_gpr(number, value)


def _register_or_zero(environment: Environment, register: int) -> int:
    return 0 if register == NO_REGISTER else read_register(environment, register)


def effective_offset(environment: Environment, instruction: Instruction) -> int:
    """Offset of the memory operand within its segment."""
    base: int = instruction.memory_base
    displacement = instruction.memory_displacement
    if base in _INSTRUCTION_POINTERS:
        # Decoded as if at address 0.
        offset = environment.rip + displacement
        return offset & (_MASKS[8] if base == Register.RIP else _MASKS[4])
    index = _register_or_zero(environment, instruction.memory_index) * instruction.memory_index_scale
    offset = _register_or_zero(environment, base) + index + displacement
    return offset & _MASKS[address_size(environment, instruction)]


def address_size(environment: Environment, instruction: Instruction) -> int:
    """Bytes of an effective address."""
    registers: tuple[int, int] = (instruction.memory_base, instruction.memory_index)
    for register in registers:
        if register != NO_REGISTER:
            return max(_number_and_size(register)[1], 2)
    return instruction.memory_displ_size or (8 if environment.bitness == 64 else 4)


def address_mask(environment: Environment, instruction: Instruction) -> int:
    """Mask of the pointer and count registers of a string instruction: its address size."""
    kinds = {instruction.op_kind(number) for number in range(instruction.op_count)}
    if kinds & _STRING_16:
        return 0xFFFF
    return 0xFFFF_FFFF if kinds & _STRING_32 else (1 << 64) - 1 if environment.bitness == 64 else 0xFFFF_FFFF


def linear_address(environment: Environment, segment: int, offset: int, size: int, write: bool) -> int:
    """Checks a segmented access of `size` bytes and gives its linear address. Raises GuestFault."""
    stack = segment == Seg.SS
    if environment.bitness == 64:
        base = environment.segment(segment).base if segment in (Seg.FS, Seg.GS) else 0
        linear = base + offset & _MASKS[8]
        if not (is_canonical(linear) and is_canonical(linear + size - 1 & _MASKS[8])):
            raise GuestFault(Vector.SS if stack else Vector.GP, 0)
        return linear
    state = environment.segment(segment)
    if environment.protected:
        code = state.attributes & 8
        if not state.attributes & 0x80 or (write and (code or not state.attributes & 2)):
            raise general_protection()
        if code and not write and not state.attributes & 2:
            raise general_protection()
    last = offset + size - 1
    expand_down = state.attributes & 0x1C == 0x14
    top = 0xFFFF_FFFF if state.attributes & 1 << 14 else 0xFFFF
    inside = offset > state.limit and last <= top if expand_down else last <= state.limit
    if not inside:
        raise GuestFault(Vector.SS if stack else Vector.GP, 0)
    return state.base + offset & 0xFFFF_FFFF


def operand_address(environment: Environment, instruction: Instruction, size: int, write: bool) -> int:
    """Linear address of the memory operand."""
    segment = SEGMENTS[instruction.memory_segment]
    return linear_address(environment, segment, effective_offset(environment, instruction), size, write)


def memory_size(instruction: Instruction) -> int:
    """Bytes of the memory operand; 0 if the instruction has none or its size is not fixed."""
    return MemorySizeExt.size(instruction.memory_size)


def read_operand(
    environment: Environment, memory: GuestMemory, instruction: Instruction, number: int, size: int
) -> int:
    """Value of a register, immediate or memory operand; `size` is for memory."""
    kind = instruction.op_kind(number)
    if kind == OpKind.REGISTER:
        return read_register(environment, instruction.op_register(number))
    if kind == OpKind.MEMORY:
        stack = instruction.memory_segment == Register.SS
        return memory.read_int(operand_address(environment, instruction, size, False), size, stack=stack)
    if kind in _IMMEDIATES:
        return instruction.immediate(number)
    raise CannotEmulate(f"operand {number} of {instruction} is of kind {kind}")


def write_operand(
    environment: Environment, memory: GuestMemory, instruction: Instruction, number: int, size: int, value: int
) -> None:
    """Writes `size` bytes to memory, or the register operand whole."""
    if instruction.op_kind(number) == OpKind.REGISTER:
        write_register(environment, instruction.op_register(number), value)
        return
    data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    stack = instruction.memory_segment == Register.SS
    memory.write(operand_address(environment, instruction, size, True), data, stack=stack)
