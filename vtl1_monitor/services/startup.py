"""The window after SIPI, or waking from S3: what the vCPU may execute, and what it must hold when it leaves that.

    fetch from the trampoline   -> RETRY, the window has its pages
    fetch from anywhere else    -> COMMIT if every pin holds then (or can be set: pins: set); else as the rule says

With `trampoline: low_memory` no rule names pages: each page below 1 MiB that the vCPU comes to is sealed and compared
with what it was when the policy was locked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator

from vtl1_monitor import rights
from vtl1_monitor.judge import Verdict
from vtl1_monitor.machine import Machine
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.services.call import Call
from vtl1_monitor.sleep_judge import judge_awake
from vtl1_monitor.startup_judge import LOW_MEMORY_PAGES, RULE, pinned_state, with_pins
from vtl1_monitor.state_judge import judge_state
from vtl1_monitor.steps import Steps, protect
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.v1 import registers_pb2, vcpu_pb2

_CODE = rights.READ | rights.KERNEL_EXECUTE | rights.SEALED


def remember_low_memory(machine: Machine) -> None:
    """What every page below 1 MiB is now, while VTL0 is trusted."""
    for page in range(min(LOW_MEMORY_PAGES, machine.memory.pages)):
        code = machine.memory.codes[page]
        if code & rights.STORE_MASK != rights.PRIVATE:
            machine.low_memory[page] = _digest(machine.memory.table(page))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def fetch_outside(call: Call, exit_: vcpu_pb2.Exit) -> Steps:
    """Answers StateLoad of cause STARTUP_END; the resolution is the call's."""
    machine, load = call.machine, exit_.state_load
    rule, page = machine.rules.startup, load.gpa // PAGE_SIZE
    processor = machine.processors[call.vp_index]
    kernel = load.state.registers.cpl != 3
    if processor.sealed is not None:
        sealed = registers_pb2.ProcessorState.FromString(processor.sealed)
        call.resolution, rule_name = judge_awake(machine.rules, machine, load.state, sealed)
        processor.sealed = None
        machine.verdicts.record(exit_, call.resolution, rule_name)
        return 0
    if kernel and rule.run is not None and rule.run.first <= page < rule.run.end:
        _admit(call, [rule.run])
    elif kernel and rule.low_memory and page in machine.low_memory:
        unchanged = yield from _sealed_as_it_was(machine, page)
        if unchanged:
            if load.state.registers.rip == 0:  # SIPI has just come
                processor.window.clear()
            processor.window.add(page)
            _admit(call, [Run(one, 1) for one in sorted(processor.window)])
        else:
            reason = f"startup: page {load.gpa & -PAGE_SIZE:#x} is not what it was when the policy was locked"
            call.resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_DENY, reason=reason)
    else:
        _leave(call, load)
    assert call.resolution is not None
    machine.verdicts.record(exit_, call.resolution, RULE)
    return 0


def _admit(call: Call, runs: list[Run]) -> None:
    numbers = [number for run in runs for number in run]
    call.updates.append(vcpu_pb2.Update(startup_window=vcpu_pb2.StartupWindow(runs=numbers)))
    call.resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_RETRY, reason="startup: the trampoline")


def _sealed_as_it_was(machine: Machine, page: int) -> Generator[vcpu_pb2.Protect, int, bool]:
    """Seals a page, unless it is, and compares it in `ram.ro`; it is given back if it differs."""
    memory = machine.memory
    before = memory.codes[page]
    if before & rights.STORE_MASK != rights.SEALED:
        yield from protect(memory, [Change(Run(page, 1), _CODE, RULE)])
    data = memory.ram.views[RamFile.SEALED][page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    if _digest(data) == machine.low_memory[page]:
        return True
    if before & rights.STORE_MASK != rights.SEALED:
        yield from protect(memory, [Change(Run(page, 1), before, "")])
    return False


def _leave(call: Call, load: vcpu_pb2.StateLoad) -> None:
    machine = call.machine
    verdict: Verdict = judge_state(machine.rules, machine, load)
    if not verdict.allowed and machine.rules.startup.sets_pins:
        pinned = vcpu_pb2.StateLoad(cause=load.cause, state=pinned_state(machine.rules, load.state))
        second = judge_state(machine.rules, machine, pinned)
        if second.allowed:
            verdict = second
            registers = with_pins(machine.rules, load.state)
            call.updates.extend(vcpu_pb2.Update(register=value) for value in registers)
            machine.keep_pins(call.vp_index)
    call.resolution = verdict.resolution
