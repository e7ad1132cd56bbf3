"""Guarding from outside: the operator's policy holds at once, on a machine whose guest never asked for VTL1.

What a guest does with TAKE_POLICY, LOCK_REGS and SIGNAL_END_OF_BOOT is done in one step, for the state that the guest
is in. Nothing is said to the guest.
"""

from __future__ import annotations

import errno

from vtl1_monitor.services.boot import check_registers, end_of_boot, lock_registers
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.services.take_policy import adopt, resolved
from vtl1_monitor.steps import Steps
from vtlab.v1 import registers_pb2
from vtlab.x86.registers import Cr0

_RESET_VECTOR = 0xFFFF_FFF0


def _waits_for_startup(registers: registers_pb2.Registers) -> bool:
    """As INIT leaves it. What runs looks otherwise: there is no code at that place."""
    return not registers.cr0 & Cr0.PE and registers.cs.base + registers.rip == _RESET_VECTOR


def guard(call: Call) -> Steps:
    """Of one vCPU, with its present registers; the first call of a machine takes the policy.

    A vCPU that waits for SIPI cannot satisfy the pins now: its whole state is judged when it has started.

    Raises:
        Refused: no operator's policy (-ENOENT); a policy that does not fit, or registers that are not as it wants
            (-EINVAL). Nothing holds then that did not before.
    """
    machine = call.machine
    started = not _waits_for_startup(call.registers)
    if machine.broken:
        raise Refused(errno.EPERM, machine.broken)
    if not machine.taken:
        if machine.override is None:
            raise Refused(errno.ENOENT, "no operator's policy is set for this machine")
        parsed, rules = resolved(call, machine.override)
        check_registers(call, rules)  # before anything is changed
        yield from adopt(call, parsed, rules)
        lock_registers(call)
        yield from end_of_boot(call)
    elif started:
        lock_registers(call)
    return 0
