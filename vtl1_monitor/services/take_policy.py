"""TAKE_POLICY: the guest's text becomes rules, its memory is sealed, and what was sealed is measured."""

from __future__ import annotations

import errno
import hashlib

from vtl1_monitor import page_tables, rights
from vtl1_monitor.judge import CR3_BASE
from vtl1_monitor.machine import Machine
from vtl1_monitor.measurements import measure
from vtl1_monitor.memory import GuestFault
from vtl1_monitor.page_tables import BadTables
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.resolve import resolve
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import MeasurementFailure, Phase
from vtl1_monitor.policy.text import PolicyText, parse
from vtl1_monitor.secrets import SIZE, Secrets
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.services.load_kdata import load_section_kdata
from vtl1_monitor.steps import Steps, protect
from vtl1_monitor.table_guard import TableGuard
from vtlab.ram import PAGE_SIZE
from vtlab.services import MAX_POLICY_SIZE
from vtlab.v1 import monitor_pb2, registers_pb2, vcpu_pb2
from vtlab.x86.paging import PagingMode, paging_mode

_ON_MISMATCH = {
    MeasurementFailure.HALT: vcpu_pb2.ACTION_HALT,
    MeasurementFailure.RESET: vcpu_pb2.ACTION_RESET,
}


def take_policy(call: Call) -> Steps:
    """(pa, size). See docs/policy.md for the order and the refusals."""
    machine = call.machine
    if machine.taken:
        raise Refused(errno.EPERM, "a policy was taken already")
    if not 0 < call.second <= MAX_POLICY_SIZE:
        raise Refused(errno.EINVAL, f"policy of {call.second} bytes")
    data = machine.memory.read(call.first, call.second)
    # The guest's own must be readable even where an operator's replaces it.
    parsed, rules = resolved(call, machine.override, data)
    machine.guest_policy_sha256 = hashlib.sha256(data).digest()
    return (yield from adopt(call, parsed, rules))


def adopt(call: Call, parsed: PolicyText, rules: Rules) -> Steps:
    """The policy counts from here on: memory is sealed and measured, the guest's tables are guarded if it says so."""
    machine = call.machine
    machine.taken = True
    machine.tickets.void(machine.vm)  # from here on what was sealed before is history
    machine.policy, machine.rules = parsed, rules
    machine.rules_before_lock = rules.without_registers()
    machine.source = (
        monitor_pb2.POLICY_SOURCE_OPERATOR if parsed is machine.override else monitor_pb2.POLICY_SOURCE_GUEST
    )
    yield from protect(machine.memory, machine.lock_changes(rules))
    machine.secrets = _make_secrets(machine)
    _measure(call, rules)
    if rules.guard_page_tables is Phase.LOCK:
        yield from guard_page_tables(call)
    load_section_kdata(machine)
    return 0


def resolved(call: Call, override: PolicyText | None, data: bytes = b"") -> tuple[PolicyText, Rules]:
    """The policy that counts, the operator's or else the guest's text, resolved. Raises Refused (-EINVAL)."""
    machine, registers = call.machine, call.registers
    translate = machine.memory.translator(cr0=registers.cr0, cr3=registers.cr3, cr4=registers.cr4, efer=registers.efer)
    try:
        parsed = override or parse(data.rstrip(b"\0"), "guest policy")
        rules = resolve(parsed, machine.image, machine.memory.size, translate)
        problem = _table_problem(machine, rules, registers)
        if problem:
            raise PolicyProblems(parsed.file_name, [parsed.problem(("page_tables",), problem)])
    except PolicyProblems as error:
        raise Refused(errno.EINVAL, str(error)) from None
    return parsed, rules


def _table_problem(machine: Machine, rules: Rules, registers: registers_pb2.Registers) -> str:
    """Why the guest could not run on with its tables under these rules; "" if it can."""
    mode = paging_mode(registers.cr0, registers.cr4, registers.efer)
    if mode is not PagingMode.LEVEL_4:
        return f"the guest uses {mode.value}; only 4-level paging can be guarded" if rules.guard_page_tables else ""
    root = (registers.cr3 & CR3_BASE) // PAGE_SIZE
    try:
        tables = page_tables.find(root, machine.memory.table, machine.memory.pages)
    except BadTables as error:
        return str(error)
    except GuestFault as error:
        return f"a page table at {error.gpa:#x} cannot be read"
    for rule in rules.memory:
        store = rule.code & rights.STORE_MASK
        hit = next((gfn for gfn in tables if rule.run.first <= gfn < rule.run.end), None)
        if hit is None or store == rights.WRITABLE:
            continue
        if store == rights.PRIVATE:
            return f"rule '{rule.name}' takes the page table at {hit * PAGE_SIZE:#x} away"
        if rules.guard_page_tables is not rule.phase:
            return (
                f"rule '{rule.name}' seals the page table at {hit * PAGE_SIZE:#x}: set guard: true, when: as the rule"
            )
    return ""


def _make_secrets(machine: Machine) -> Secrets:
    for rule in machine.rules.private:
        if rule.phase is Phase.LOCK:
            return Secrets(machine.memory.ram, rule.run.end * PAGE_SIZE - SIZE)
    return Secrets()


def _measure(call: Call, rules: Rules) -> None:
    """Raises Refused (-EBADMSG) at the first rule whose sealed bytes are not the image's; the machine is broken."""
    machine = call.machine
    for rule in rules.memory:
        if not rule.measured:
            continue
        measurement = measure(rule, machine.memory, machine.image)
        machine.measurements.append(measurement)
        if not measurement.matches_image:
            reason = f"memory rule '{rule.name}': sealed bytes at {measurement.gpa:#x} are not those of the image"
            machine.break_down(reason)
            action = _ON_MISMATCH.get(rules.measurement_failure)
            if action is not None:
                call.resolution = vcpu_pb2.Resolution(action=action, reason=reason)
            raise Refused(errno.EBADMSG, reason)


def guard_page_tables(call: Call) -> Steps:
    """Seals the tables that VTL0 runs on. Raises Refused (-EINVAL); the machine is then broken."""
    machine = call.machine
    guard = TableGuard(machine.memory, machine.by_rules)
    try:
        yield from guard.add_first_root((call.registers.cr3 & CR3_BASE) // PAGE_SIZE)
    except BadTables as error:
        machine.break_down(f"page tables: {error}")
        raise Refused(errno.EINVAL, str(error)) from None
    machine.guard = guard
    machine.filter_changed()
    return 0
