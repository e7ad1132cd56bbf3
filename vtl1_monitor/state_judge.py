"""A whole state of a vCPU and the rules -> whether it may run on with it. Pure.

For what no single write leads to: the end of a startup, RSM, waking from S3, a context that somebody hands over. There
the value is judged, not the change: nothing is kept from before. Frozen registers are compared with the last state in
which the pins held, or what they were at lock; table registers of which neither is known must lie in memory that VTL0
cannot write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from vtl1_monitor.judge import CR3_BASE, NO_RULE, Facts, Verdict
from vtl1_monitor.policy.rules import Rules, ValueRule
from vtl1_monitor.policy.schema import Violation
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Msr

_STARTUP_END = vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END

_ACTION: dict[Violation, vcpu_pb2.Action.ValueType] = {
    Violation.GP: vcpu_pb2.ACTION_DENY,
    Violation.SKIP: vcpu_pb2.ACTION_DENY,
    Violation.HALT: vcpu_pb2.ACTION_HALT,
    Violation.RESET: vcpu_pb2.ACTION_RESET,
}


class StateFacts(Facts, Protocol):
    """What the judgement of a whole state depends on besides the rules."""

    def at_lock(self, name: int) -> int | None:
        """CR0, CR4 or EFER when registers were locked; None where VTL1 does not know."""

    def is_sealed(self, registers: registers_pb2.Registers, gva: int, size: int) -> bool:
        """VTL0 can write none of these bytes, as the page tables of that state have them."""


class _Refusal(NamedTuple):
    rule: str
    violation: Violation
    reason: str


def judge_state(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Verdict:
    """COMMIT if every pin holds in the state; else what the first broken rule says, `gp` and `skip` being DENY."""
    logged = NO_RULE
    for refusal in _refusals(rules, facts, load):
        if refusal.violation is not Violation.LOG:
            resolution = vcpu_pb2.Resolution(action=_ACTION[refusal.violation], reason=refusal.reason)
            return Verdict(resolution, refusal.rule)
        logged = logged or refusal.rule
    reason = f"{logged}: is not as the policy wants" if logged else "all pins hold"
    return Verdict(vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason), logged)


def _refusals(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Iterator[_Refusal]:
    yield from _control_registers(rules, facts, load)
    yield from _msrs(rules, load)
    root = load.state.registers.cr3 & CR3_BASE
    if rules.cr3 is not None and root not in facts.roots:
        yield _Refusal(rules.cr3.name, rules.cr3.violation, f"cr3: root {root:#x} is not known to VTL1")
    yield from _tables(rules, facts, load)


def _value(state: registers_pb2.ProcessorState, name: int) -> int:
    registers = state.registers
    values: dict[int, int] = {
        registers_pb2.REGISTER_NAME_CR0: registers.cr0,
        registers_pb2.REGISTER_NAME_CR4: registers.cr4,
        registers_pb2.REGISTER_NAME_EFER: registers.efer,
        registers_pb2.REGISTER_NAME_XFEM: state.xcr0,
    }
    return values[name]


def _control_registers(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Iterator[_Refusal]:
    for name, rule in rules.registers.items():
        reference = _value(load.before, name) if load.HasField("before") else facts.at_lock(name)
        # INIT leaves XCR0 alone, so its pins were never lifted.
        kept = load.cause == _STARTUP_END and name == registers_pb2.REGISTER_NAME_XFEM
        yield from _bits(rule, _value(load.state, name), reference, kept=kept)
        if name == registers_pb2.REGISTER_NAME_EFER:  # may stand among the MSRs too, and is loaded from there last
            for entry in load.state.msrs:
                if entry.index == Msr.EFER:
                    yield from _bits(rule, entry.value, reference, kept=False)


def _msrs(rules: Rules, load: vcpu_pb2.StateLoad) -> Iterator[_Refusal]:
    before = {entry.index: entry.value for entry in load.before.msrs}
    # INIT leaves MSRs alone, so their pins were never lifted.
    kept = load.cause == _STARTUP_END
    for entry in load.state.msrs:
        rule = rules.msrs.get(entry.index)
        if rule is not None:
            yield from _bits(rule, entry.value, before.get(entry.index), kept=kept)


def _bits(rule: ValueRule, value: int, reference: int | None, *, kept: bool) -> Iterator[_Refusal]:
    wrong = (value ^ rule.fixed_value) & rule.fixed_mask
    if reference is not None:
        wrong |= (value ^ reference) & rule.frozen_mask
    elif not kept:
        wrong |= rule.frozen_mask  # nobody knows what they were
    if wrong:
        yield _Refusal(rule.name, rule.violation, f"{rule.name} is {value:#x}: bits {wrong:#x} are not as pinned")


def _tables(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Iterator[_Refusal]:
    for name, rule in rules.tables.items():
        held = _table(load.state, name)
        if load.HasField("before"):
            before = _table(load.before, name)
            good = held == before or (_unusable(held) and _unusable(before))
        elif _unusable(held):
            good = True  # as INIT left it: nothing was loaded
        else:
            good = facts.is_sealed(load.state.registers, held.base, held.limit + 1)
        if not good:
            yield _Refusal(rule.name, rule.violation, f"{rule.name} at {held.base:#x} is not the pinned table")


def _unusable(table: registers_pb2.TableRegister | registers_pb2.Segment) -> bool:
    """LDTR or TR with a null selector: every use of it faults, whatever the limit says."""
    return isinstance(table, registers_pb2.Segment) and not table.selector & 0xFFFC and not table.base


def _table(state: registers_pb2.ProcessorState, name: int) -> registers_pb2.TableRegister | registers_pb2.Segment:
    tables: dict[int, registers_pb2.TableRegister | registers_pb2.Segment] = {
        registers_pb2.REGISTER_NAME_GDTR: state.gdtr,
        registers_pb2.REGISTER_NAME_IDTR: state.idtr,
        registers_pb2.REGISTER_NAME_LDTR: state.ldtr,
        registers_pb2.REGISTER_NAME_TR: state.tr,
    }
    return tables[name]
