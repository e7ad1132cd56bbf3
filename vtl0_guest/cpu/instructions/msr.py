"""RDMSR and WRMSR."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vtl0_guest.cpu import msrs
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.environment import Gpr
from vtl0_guest.cpu.instructions.control_registers import register_write, require_kernel
from vtl0_guest.cpu.operation import Operation
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Msr

_LOW = 0xFFFF_FFFF


def access(context: Context, instruction: Instruction) -> Operation | None:
    """Both instructions: they share one exit code."""
    require_kernel(context)
    index = context.environment.gpr(Gpr.RCX) & _LOW
    if instruction.mnemonic == Mnemonic.WRMSR:
        return _write(context, index)
    return _read(context, index)


def _set_result(context: Context, value: int) -> None:
    context.environment.set_gpr(Gpr.RAX, value & _LOW)
    context.environment.set_gpr(Gpr.RDX, value >> 32 & _LOW)


def _read(context: Context, index: int) -> Operation | None:
    def complete(value: int) -> None:
        _set_result(context, value)

    modelled = msrs.modelled(context, index)
    value = msrs.read(context, index) if modelled else 0
    if modelled and not context.intercepts.msr_read(index):
        _set_result(context, value)
        if context.hyperv.idle:
            context.halted = True
        return None
    message = vcpu_pb2.Exit(msr=vcpu_pb2.MsrAccess(index=index, write=False, old_value=value))
    return Operation(message, complete if modelled else None, value, complete)


def _write(context: Context, index: int) -> Operation | None:
    environment = context.environment
    value = environment.gpr(Gpr.RAX) & _LOW | (environment.gpr(Gpr.RDX) & _LOW) << 32
    if not msrs.modelled(context, index):
        message = vcpu_pb2.Exit(msr=vcpu_pb2.MsrAccess(index=index, write=True, new_value=value))
        return Operation(message, complete=lambda _result: None)
    new = msrs.check(context, index, value)

    def commit(judged: int) -> None:
        msrs.write(context, index, msrs.check(context, index, judged))

    intercepts = context.intercepts
    watched = index == Msr.EFER or intercepts.msr_watched(index)
    old = msrs.read(context, index) if watched else 0
    if index == Msr.EFER and intercepts.register_write(registers_pb2.REGISTER_NAME_EFER, old, new):
        return Operation(register_write(registers_pb2.REGISTER_NAME_EFER, old, new), commit, new)
    if watched and intercepts.msr_write(index, old, new):
        message = vcpu_pb2.Exit(msr=vcpu_pb2.MsrAccess(index=index, write=True, old_value=old, new_value=new))
        return Operation(message, commit, new, complete=lambda _result: None)
    msrs.write(context, index, new)
    return None
