"""WRITE_CONTROL_REGISTER: CR0 and CR4 for kernels whose own code for them was removed. Judged like the write itself."""

from __future__ import annotations

import errno

from vtl1_monitor.services.call import Call, Refused
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer

_NAMES = {0: registers_pb2.REGISTER_NAME_CR0, 4: registers_pb2.REGISTER_NAME_CR4}
_CR0_BITS = sum(int(bit) for bit in Cr0)
_CR4_BITS = sum(int(bit) for bit in Cr4)


def write_control_register(call: Call) -> int:
    """(0 or 4, value). -EINVAL where the processor itself would refuse, -EACCES where the policy does."""
    name = _NAMES.get(call.first)
    if name is None:
        raise Refused(errno.EINVAL, f"control register {call.first}")
    registers, value = call.registers, call.second
    old = registers.cr0 if call.first == 0 else registers.cr4
    problem = _cr0_problem(value) if call.first == 0 else _cr4_problem(value, old, registers)
    if problem:
        raise Refused(errno.EINVAL, f"CR{call.first} = {value:#x}: {problem}")
    exit_ = vcpu_pb2.Exit(
        vp_index=call.vp_index,
        origin=vcpu_pb2.ORIGIN_VCPU,
        registers=registers,
        register_write=vcpu_pb2.RegisterWrite(name=name, old_value=old, new_value=value),
    )
    resolution = call.machine.judge(call.vp_index, exit_).resolution
    if resolution.action == vcpu_pb2.ACTION_COMMIT:
        call.updates.append(vcpu_pb2.Update(register=registers_pb2.RegisterValue(name=name, value=value)))
    elif resolution.action in (vcpu_pb2.ACTION_HALT, vcpu_pb2.ACTION_RESET):
        call.resolution = resolution
        raise Refused(errno.EACCES, resolution.reason)
    elif resolution.action != vcpu_pb2.ACTION_SKIP:
        raise Refused(errno.EACCES, resolution.reason)
    return 0


def _cr0_problem(value: int) -> str:
    """What makes MOV to CR0 fault in 64-bit mode (SDM volume 2, MOV CR), "" if nothing does."""
    if value & ~_CR0_BITS:
        return "reserved bits"
    if value & Cr0.NW and not value & Cr0.CD:
        return "NW without CD"
    return "" if value & Cr0.PG and value & Cr0.PE else "PG and PE stay set in 64-bit mode"


def _cr4_problem(value: int, old: int, registers: registers_pb2.Registers) -> str:
    """The same for CR4."""
    if value & ~_CR4_BITS:
        return "reserved bits"
    if registers.efer & Efer.LMA and (not value & Cr4.PAE or (value ^ old) & Cr4.LA57):
        return "PAE and LA57 do not change in 64-bit mode"
    if value & ~old & Cr4.PCIDE and registers.cr3 & 0xFFF:
        return "PCIDE with a PCID in CR3"
    return ""
