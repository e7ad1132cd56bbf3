"""Instructions on device registers that the engine executes, on a copy of them.

The core finishes plain loads and stores itself (instructions/moves.py). Whatever else names a device register, the
engine executes: for one instruction, by a root of its own, the nested table shows a scratch page in the place of the
registers. What the instruction reads is read from the device before, once, and what it writes is written to the device
after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from iced_x86 import Instruction, Mnemonic, OpKind, Register

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.devices.bus import MmioDevice
from vtl0_guest.cpu.devices.mmio import load, store
from vtl0_guest.cpu.faults import CannotEmulate, NestedFault
from vtl0_guest.cpu.guest_memory import PAGE, READ, WRITE
from vtl0_guest.cpu.nested import MAX_DETOURS, NestedTable
from vtl0_guest.cpu.operands import Operand, operands

# They show or change RFLAGS.TF, by which the engine stops behind the instruction.
_NO_STEP = frozenset(
    {
        *(Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ, Mnemonic.POPF, Mnemonic.POPFD, Mnemonic.POPFQ),
        *(Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ),
    }
)


def loads_stack_segment(instruction: Instruction) -> bool:
    """It puts off the trap of RFLAGS.TF."""
    return instruction.op0_kind == OpKind.REGISTER and instruction.op0_register == Register.SS


class Elsewhere:
    """A device whose registers somebody else has: what was read there is known, what is written is kept.

    Attributes:
        stores: guest-physical address and bytes.
    """

    def __init__(self, value: int) -> None:
        """`value` is what each aligned quadword reads as."""
        self._value = value
        self.stores: list[tuple[int, bytes]] = []

    def mmio_read(self, _offset: int, size: int) -> int:
        return self._value & (1 << 8 * size) - 1

    def mmio_write(self, _offset: int, _size: int, _value: int) -> None:
        raise AssertionError("stores are kept whole")


class _Piece(NamedTuple):
    """The part of an operand that lies in one page of a device."""

    device: MmioDevice | Elsewhere
    page: int
    offset: int
    size: int
    read: bool
    written: bool


def reads(context: Context, instruction: Instruction, page: int) -> bool:
    """Whether an instruction reads from a guest page; nothing is checked."""
    return any(
        operand.read and (found := context.memory.code_gpa(linear)) is not None and found >> 12 == page
        for operand in operands(context, instruction)
        for linear, _ in _pages(operand)
    )


def _pieces(context: Context, instruction: Instruction, elsewhere: Elsewhere | None, ram: int) -> Iterator[_Piece]:
    """Raises GuestFault or NestedFault for what the instruction may not access in ordinary memory."""
    for operand in operands(context, instruction):
        for linear, size in _pages(operand):
            access = WRITE if operand.written else READ
            gpa = context.memory.translate(linear, access)
            device = context.device_at(gpa) or (elsewhere if gpa >= ram else None)
            if device is not None:
                yield _Piece(device, gpa >> 12, gpa & 0xFFF, size, operand.read, operand.written)
                continue
            try:
                context.memory.physical.check(gpa, access)
            except NestedFault as fault:
                fault.gva = linear
                raise


def _pages(operand: Operand) -> Iterator[tuple[int, int]]:
    linear, left = operand.linear, operand.size
    while left:
        size = min(left, PAGE - (linear & 0xFFF))
        yield linear, size
        linear, left = linear + size, left - size


def execute(
    context: Context,
    nested: NestedTable,
    scratch: memoryview,
    instruction: Instruction,
    elsewhere: Elsewhere | None = None,
) -> bool:
    """Lets the engine do an instruction on device registers, or one element of a string instruction.

    Args:
        elsewhere: answers where neither RAM nor a device of the core is.

    Returns:
        Whether it was done. If not, it faulted or exited, and the engine says why as after `run`.

    Raises:
        GuestFault, NestedFault: it may not access other memory that it names; nothing was done.
        CannotEmulate: it cannot be done this way.
    """
    if instruction.is_invalid or instruction.mnemonic in _NO_STEP:
        raise CannotEmulate(f"{instruction} on a device register")
    pieces = list(_pieces(context, instruction, elsewhere, nested.ram_pages * PAGE))
    slots = {page: slot for slot, page in enumerate(dict.fromkeys(piece.page for piece in pieces))}
    if not 0 < len(slots) <= MAX_DETOURS:
        raise CannotEmulate(f"{instruction} on device registers of {len(slots)} pages")
    places = [slots[piece.page] * PAGE + piece.offset for piece in pieces]
    for piece, place in zip(pieces, places, strict=True):
        if piece.read:
            scratch[place : place + piece.size] = load(piece.device, piece.offset, piece.size)
    engine = context.engine
    roots = engine.roots
    detour = nested.detour(roots[context.environment.cpl == 3], list(slots))
    engine.set_roots(detour, detour)
    engine.flush_translations()
    try:
        done = engine.step(trap=not loads_stack_segment(instruction))
    finally:
        engine.set_roots(*roots)
        engine.flush_translations()
    if done:
        for piece, place in zip(pieces, places, strict=True):
            if not piece.written:
                continue
            data = bytes(scratch[place : place + piece.size])
            if isinstance(piece.device, Elsewhere):
                piece.device.stores.append((piece.page << 12 | piece.offset, data))
            else:
                store(piece.device, piece.offset, data)
    return done
