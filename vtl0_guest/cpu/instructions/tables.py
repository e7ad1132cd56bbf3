"""LGDT, LIDT, LLDT, LTR and their stores, which UMIP forbids above CPL0. Source: Intel SDM volume 2."""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic

from vtl0_guest.cpu import descriptors
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import operand_address, read_operand, write_operand
from vtl0_guest.cpu.environment import Seg, SegmentState
from vtl0_guest.cpu.faults import GuestFault, general_protection, undefined_opcode
from vtl0_guest.cpu.instructions.control_registers import register_write, require_kernel
from vtl0_guest.cpu.operation import Operation
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.paging import is_canonical
from vtlab.x86.registers import Cr4, Vector

_UMIP = int(Cr4.UMIP)
_TABLES = {
    Mnemonic.LGDT: (Seg.GDTR, registers_pb2.REGISTER_NAME_GDTR),
    Mnemonic.LIDT: (Seg.IDTR, registers_pb2.REGISTER_NAME_IDTR),
    Mnemonic.SGDT: (Seg.GDTR, registers_pb2.REGISTER_NAME_GDTR),
    Mnemonic.SIDT: (Seg.IDTR, registers_pb2.REGISTER_NAME_IDTR),
}


def load_table(context: Context, instruction: Instruction) -> Operation | None:
    """LGDT, LIDT: 2-byte limit, then a base of 8 bytes in 64-bit mode, 4 otherwise (3 used with a 16-bit operand)."""
    require_kernel(context)
    environment = context.environment
    segment, name = _TABLES[instruction.mnemonic]
    size = 10 if environment.bitness == 64 else 6
    data = context.memory.read(operand_address(environment, instruction, size, False), size)
    limit, base = int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little")
    if size == 6 and instruction.op_code().operand_size == 16:
        base &= 0xFF_FFFF
    if not is_canonical(base):
        raise general_protection()

    def commit(_value: int) -> None:
        environment.set_table(segment, base, limit)

    if context.intercepts.table_write(name):
        old_base, old_limit = environment.table(segment)
        change = vcpu_pb2.RegisterWrite(
            name=name,
            old_table=registers_pb2.TableRegister(base=old_base, limit=old_limit),
            new_table=registers_pb2.TableRegister(base=base, limit=limit),
            old_value=old_base,
            new_value=base,
        )

        def replace(judged: int) -> None:
            environment.set_table(segment, judged, limit)

        return Operation(vcpu_pb2.Exit(register_write=change), replace, base)
    commit(base)
    return None


def store_table(context: Context, instruction: Instruction) -> Operation | None:
    """SGDT, SIDT."""
    _check_umip(context)
    environment = context.environment
    base, limit = environment.table(_TABLES[instruction.mnemonic][0])
    size = 10 if environment.bitness == 64 else 6
    data = limit.to_bytes(2, "little") + (base & (1 << 8 * (size - 2)) - 1).to_bytes(size - 2, "little")
    context.memory.write(operand_address(environment, instruction, size, True), data)
    return None


def store_selector(context: Context, instruction: Instruction) -> Operation | None:
    """SLDT, STR: 16 bits to memory, zero-extended into a register."""
    if not context.environment.protected:
        raise undefined_opcode()
    _check_umip(context)
    segment = Seg.LDTR if instruction.mnemonic == Mnemonic.SLDT else Seg.TR
    selector = context.environment.segment(segment).selector
    write_operand(context.environment, context.memory, instruction, 0, 2, selector)
    return None


def _check_umip(context: Context) -> None:
    if context.environment.cpl and context.environment.cr(4) & _UMIP:
        raise general_protection()


def _load_system(
    context: Context,
    instruction: Instruction,
    name: registers_pb2.RegisterName.ValueType,
    segment: Seg,
    prepare: Callable[[Context, int], tuple[SegmentState, Callable[[], None]]],
) -> Operation | None:
    if not context.environment.protected:
        raise undefined_opcode()
    require_kernel(context)
    selector = read_operand(context.environment, context.memory, instruction, 0, 2) & 0xFFFF
    old = context.environment.segment(segment).selector
    loaded, finish = prepare(context, selector)

    def commit(judged: int) -> None:
        if judged == selector:
            finish()
            context.environment.set_segment(segment, loaded)
            return
        replaced, finish_other = prepare(context, judged & 0xFFFF)
        finish_other()
        context.environment.set_segment(segment, replaced)

    if context.intercepts.table_write(name):
        return Operation(register_write(name, old, selector), commit, selector)
    commit(selector)
    return None


def load_ldtr(context: Context, instruction: Instruction) -> Operation | None:
    """LLDT."""
    return _load_system(context, instruction, registers_pb2.REGISTER_NAME_LDTR, Seg.LDTR, _prepare_ldtr)


def load_tr(context: Context, instruction: Instruction) -> Operation | None:
    """LTR; marks the TSS busy."""
    return _load_system(context, instruction, registers_pb2.REGISTER_NAME_TR, Seg.TR, _prepare_tr)


def _nothing() -> None:
    return None


def _prepare_ldtr(context: Context, selector: int) -> tuple[SegmentState, Callable[[], None]]:
    if not selector & ~3:
        return SegmentState(selector, 0, 0, 0), _nothing
    loaded, _ = descriptors.load_system(context.environment, context.memory, selector)
    if loaded.attributes & 0x1F != descriptors.LDT:
        raise general_protection(selector & 0xFFFC)
    if not loaded.attributes & descriptors.PRESENT:
        raise GuestFault(Vector.NP, selector & 0xFFFC)
    return loaded, _nothing


def _prepare_tr(context: Context, selector: int) -> tuple[SegmentState, Callable[[], None]]:
    if not selector & ~3:
        raise general_protection()
    loaded, at = descriptors.load_system(context.environment, context.memory, selector)
    kind = loaded.attributes & 0x1F
    available = {descriptors.TSS_AVAILABLE} | (
        set() if context.environment.long_mode else {descriptors.TSS16_AVAILABLE}
    )
    if kind not in available:
        raise general_protection(selector & 0xFFFC)
    if not loaded.attributes & descriptors.PRESENT:
        raise GuestFault(Vector.NP, selector & 0xFFFC)
    busy = loaded._replace(attributes=loaded.attributes | 2)

    def mark_busy() -> None:
        context.memory.write(at + 5, bytes([busy.attributes & 0xFF]), implicit=True)

    return busy, mark_busy
