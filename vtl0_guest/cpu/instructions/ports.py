"""IN, OUT, INS, OUTS. Sources: Intel SDM volume 1, chapter 19 (I/O permission), volume 2.

The engine checks no I/O permission and stops at each instruction before anything happened. Elements of a REP form are
done one by one, each exactly; those of REP OUTS a few in one stop, while they go to a device that nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic

from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import SEGMENTS, address_mask, linear_address
from vtl0_guest.cpu.environment import Gpr, Seg
from vtl0_guest.cpu.faults import general_protection
from vtl0_guest.cpu.guest_memory import PAGE
from vtl0_guest.cpu.operation import Operation
from vtlab.v1 import vcpu_pb2
from vtlab.x86.registers import Rflags

_VM, _DF, _TF = int(Rflags.VM), int(Rflags.DF), int(Rflags.TF)
# Of REP OUTS in one stop: as many bytes as the FIFO of a UART takes. Interrupts wait so long.
_ELEMENTS = 16
_INPUT = frozenset({Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.IN})
_STRING = frozenset({Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD})


def check_permission(context: Context, port: int, size: int) -> None:
    """IOPL, then the TSS's I/O permission bitmap. Raises #GP(0)."""
    environment = context.environment
    if not environment.cr(0) & 1:
        return
    flags = environment.rflags
    if not flags & _VM and environment.cpl <= flags >> 12 & 3:
        return
    tr = environment.segment(Seg.TR)
    if not tr.attributes & 8 or tr.limit < 0x67:  # a 16-bit TSS has no bitmap
        raise general_protection()
    offset = context.memory.read_int(tr.base + 0x66, 2, implicit=True) + port // 8
    if offset + 1 > tr.limit:
        raise general_protection()
    bits = context.memory.read_int(tr.base + offset, 2, implicit=True)
    if bits >> (port & 7) & ((1 << size) - 1):
        raise general_protection()


def access(context: Context, instruction: Instruction, port: int, size: int, value: int) -> Operation | None:
    """Any of them; `value` is what OUT writes."""
    check_permission(context, port, size)
    if instruction.mnemonic in _STRING:
        return _string(context, instruction, port, size)
    if instruction.mnemonic in _INPUT:
        return _transfer_in(context, port, size, lambda result: _set_accumulator(context, size, result))
    return _transfer_out(context, port, size, value, lambda: None)


def _set_accumulator(context: Context, size: int, value: int) -> None:
    rax = context.environment.gpr(Gpr.RAX)
    value &= (1 << 8 * size) - 1
    context.environment.set_gpr(Gpr.RAX, value if size == 4 else rax & ~((1 << 8 * size) - 1) | value)


def _transfer_in(context: Context, port: int, size: int, finish: Callable[[int], None]) -> Operation | None:
    device = context.platform.ports.get(port)
    if device is None or context.intercepts.port(port, size):
        message = vcpu_pb2.Exit(port=vcpu_pb2.PortAccess(port=port, write=False, size=size))
        own = None if device is None else (lambda _value: finish(device.read(port, size)))
        return Operation(message, own, 0, finish)
    finish(device.read(port, size))
    return None


def _transfer_out(context: Context, port: int, size: int, value: int, finish: Callable[[], None]) -> Operation | None:
    device = context.platform.ports.get(port)

    def write(judged: int) -> None:
        assert device is not None
        device.write(port, size, judged & (1 << 8 * size) - 1)
        finish()

    if device is None or context.intercepts.port(port, size):
        message = vcpu_pb2.Exit(port=vcpu_pb2.PortAccess(port=port, write=True, size=size, value=value))
        return Operation(message, None if device is None else write, value, lambda _result: finish())
    write(value)
    return None


def _string(context: Context, instruction: Instruction, port: int, size: int) -> Operation | None:
    """Elements of one stop. RIP moves on only after the last one of a REP form."""
    environment, memory = context.environment, context.memory
    mask = address_mask(environment, instruction)
    repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
    left = environment.gpr(Gpr.RCX) & mask if repeated else 1
    if not left:
        return None
    step = -size if environment.rflags & _DF else size
    incoming = instruction.mnemonic in _INPUT
    pointer = Gpr.RDI if incoming else Gpr.RSI
    offset = environment.gpr(pointer) & mask
    segment = Seg.ES if incoming else SEGMENTS[instruction.memory_segment]
    linear = linear_address(environment, segment, offset, size, incoming)

    def finish(done: int = 1) -> None:
        _add(context, pointer, step * done, mask)
        if repeated:
            _add(context, Gpr.RCX, -done, mask)
            # While elements are left the instruction is not over: undoes the step that ends it.
            context.repeat = done < left

    if incoming:
        memory.probe_write(linear, size)

        def store(value: int) -> None:
            memory.write(linear, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
            finish()

        return _transfer_in(context, port, size, store)
    count = _together(context, port, size, linear, left) if offset <= mask - PAGE else 1
    if count == 1:
        return _transfer_out(context, port, size, memory.read_int(linear, size), finish)
    device, data = context.platform.ports[port], memory.read(linear, count * size)
    done = 0
    while done < count and not context.platform.exit_waits:
        device.write(port, size, int.from_bytes(data[done * size : (done + 1) * size], "little"))
        done += 1
    finish(done)
    return None


def _together(context: Context, port: int, size: int, linear: int, left: int) -> int:
    """Elements of REP OUTS that nothing comes between: from one page, upwards, to a device that nobody watches."""
    environment = context.environment
    alone = environment.rflags & (_DF | _TF) or environment.bitness != 64
    if alone or port not in context.platform.ports or context.intercepts.port(port, size):
        return 1
    return max(min(left, _ELEMENTS, (PAGE - linear % PAGE) // size), 1)


def _add(context: Context, register: Gpr, amount: int, mask: int) -> None:
    old = context.environment.gpr(register)
    value = old + amount & mask
    context.environment.set_gpr(register, value if mask >= 0xFFFF_FFFF else old & ~mask | value)
