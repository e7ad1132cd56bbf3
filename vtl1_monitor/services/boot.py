"""LOCK_REGS and SIGNAL_END_OF_BOOT: from here on the pins hold, and the boot-only services end."""

from __future__ import annotations

import errno

from vtl1_monitor.judge import CR3_BASE
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import Phase
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.services.startup import remember_low_memory
from vtl1_monitor.services.take_policy import guard_page_tables
from vtl1_monitor.steps import Steps, protect
from vtlab.v1 import registers_pb2, vcpu_pb2

_AT_CALL = {
    registers_pb2.REGISTER_NAME_CR0: "cr0",
    registers_pb2.REGISTER_NAME_CR4: "cr4",
    registers_pb2.REGISTER_NAME_EFER: "efer",
}


def check_registers(call: Call, rules: Rules) -> None:
    """Raises Refused (-EINVAL) if this vCPU does not satisfy the rules of its control registers now."""
    for name, field in _AT_CALL.items():
        rule = rules.registers.get(name)
        value = getattr(call.registers, field)
        if rule is not None and (value ^ rule.fixed_value) & rule.fixed_mask:
            wrong = (value ^ rule.fixed_value) & rule.fixed_mask
            raise Refused(errno.EINVAL, f"{rule.name} is {value:#x}: bits {wrong:#x} are not as the policy wants")


def lock_registers(call: Call) -> int:
    """(): the rules of registers hold on this vCPU. -EINVAL if it does not satisfy them now."""
    machine = call.machine
    check_registers(call, machine.rules)
    root = call.registers.cr3 & CR3_BASE
    if machine.rules.cr3 is not None:
        if machine.rules.cr3_frozen:
            machine.frozen_roots.add(root)
            machine.filter_changed(stricter=False)
        elif root not in machine.roots:
            raise Refused(errno.EINVAL, f"cr3: root {root:#x} is not known to VTL1")
    for index, msr in machine.rules.msrs.items():
        if msr.written_at_lock:
            call.updates.append(vcpu_pb2.Update(msr=registers_pb2.MsrValue(index=index, value=msr.fixed_value)))
    for name, field in _AT_CALL.items():
        machine.locked_values.setdefault(name, getattr(call.registers, field))
    machine.processors[call.vp_index].locked = True
    return 0


def end_of_boot(call: Call) -> Steps:
    """(): applies the rules of the end of boot, and all pins to every vCPU. -EINVAL if this one is not locked."""
    machine = call.machine
    if not machine.processors[call.vp_index].locked:
        raise Refused(errno.EINVAL, "LOCK_REGS was not called on this vCPU")
    yield from protect(machine.memory, machine.end_of_boot_changes())
    if machine.rules.guard_page_tables is Phase.END_OF_BOOT:
        yield from guard_page_tables(call)
    if machine.rules.startup.low_memory:
        remember_low_memory(machine)
    machine.end_of_boot = True
    machine.filter_changed()
    machine.lock_all()
    return 0
