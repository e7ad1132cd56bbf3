"""What a refusal by the nested table means: which access, at which addresses, with what data.

AMD-V gives the guest-physical address and whether it was a read, write or fetch (EXITINFO2, low half of EXITINFO1).
The guest-virtual address comes from the decoded operands: the one whose walk meets the physical page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from iced_x86 import Instruction

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.faults import CannotEmulate, GuestFault, NestedFault
from vtl0_guest.cpu.guest_memory import EXECUTE, READ, WRITE
from vtl0_guest.cpu.instructions import moves
from vtl0_guest.cpu.operands import operands
from vtl0_guest.cpu.operation import Operation
from vtlab.v1 import vcpu_pb2
from vtlab.x86 import paging

_ERROR_WRITE, _ERROR_FETCH = 2, 16
_MASK64 = (1 << 64) - 1


def access_kind(error_code: int) -> vcpu_pb2.AccessKind.ValueType:
    """From the low bits of EXITINFO1 (AMD APM volume 2, 15.25.6)."""
    if error_code & _ERROR_FETCH:
        return EXECUTE
    return WRITE if error_code & _ERROR_WRITE else READ


def _tables(context: Context, linear: int) -> set[int]:
    """Guest-physical pages of the tables that a walk of `linear` reads, as far as it gets."""
    pages: set[int] = set()

    def read(address: int, size: int) -> int:
        pages.add(address >> 12)
        return context.memory.physical.read_entry(address, size)

    environment = context.environment
    with contextlib.suppress(NestedFault, ValueError):
        paging.walk(
            read, cr0=environment.cr(0), cr3=environment.cr(3), cr4=environment.cr(4), efer=environment.efer, gva=linear
        )
    return pages


def locate(context: Context, instruction: Instruction | None, fault: NestedFault) -> NestedFault:
    """Fills in the guest-virtual address, the data of a plain store, and whether the walker itself was refused."""
    environment = context.environment
    candidates: list[int] = []
    if instruction is not None and not instruction.is_invalid and fault.access != EXECUTE:
        for operand in operands(context, instruction):
            candidates += [operand.linear, operand.linear + max(1, operand.size) - 1 & _MASK64]
    if fault.access == EXECUTE:
        code_base = 0 if environment.bitness == 64 else environment.segment(1).base
        start = code_base + environment.rip & _MASK64
        candidates = [start, (start | 0xFFF) + 1]
    for linear in candidates:
        found = context.memory.code_gpa(linear)
        if found is not None and found >> 12 == fault.gpa >> 12:
            fault.gva = linear & ~0xFFF | fault.gpa & 0xFFF
            break
    else:
        code = environment.segment(1).base if environment.bitness != 64 else 0
        for linear in [*candidates, code + environment.rip & _MASK64]:
            if fault.gpa >> 12 in _tables(context, linear):
                fault.page_walk, fault.gva = True, linear
                break
    if fault.access == WRITE and not fault.page_walk and instruction is not None and not fault.data:
        try:
            fault.data = moves.store_data(context, instruction)
        except (GuestFault, NestedFault, CannotEmulate):
            fault.data = b""
    return fault


def operation(
    context: Context,
    instruction: Instruction | None,
    fault: NestedFault,
    ram_pages: int,
    execute: Callable[[Instruction, int], None] | None = None,
) -> Operation:
    """The open exit of a refused access. `execute` finishes what is more than a move, where no RAM is."""
    unmapped = fault.gpa >> 12 >= ram_pages
    message = vcpu_pb2.MemoryFault(
        gpa=fault.gpa,
        gva=fault.gva,
        access=fault.access,
        page_walk=fault.page_walk,
        data=fault.data,
        unmapped=unmapped,
    )

    def complete(value: int) -> None:
        if fault.access == EXECUTE or fault.page_walk or instruction is None:
            raise CannotEmulate(f"cannot finish the access to {fault.gpa:#x}")
        if unmapped and execute is not None and not moves.is_plain(instruction):
            execute(instruction, value)
        elif fault.access == READ:
            moves.finish_load(context, instruction, value)
        elif not fault.data:
            raise CannotEmulate(f"cannot finish the store of {instruction}")

    def commit(_value: int) -> None:
        """What was judged has been stored by whoever may write the page; done if the bytes are there."""
        if fault.access != WRITE or not fault.data:
            raise CannotEmulate(f"cannot commit the access to {fault.gpa:#x}")
        context.memory.physical.store_judged(fault.gpa, fault.data)

    return Operation(vcpu_pb2.Exit(memory_fault=message), commit, 0, complete)


def announce(stores: Sequence[tuple[int, bytes]], then: Callable[[Operation | None], None]) -> Operation | None:
    """Exits for what an instruction that is over has stored where no RAM is; `then` takes each one that follows."""
    if not stores:
        return None
    (gpa, data), *others = stores
    message = vcpu_pb2.MemoryFault(gpa=gpa, access=WRITE, data=data, unmapped=True)
    return Operation(
        vcpu_pb2.Exit(memory_fault=message),
        complete=lambda _value: then(announce(others, then)),
        refuse=lambda _resolution: None,  # the bytes are lost; there is no instruction left that could fault
    )
