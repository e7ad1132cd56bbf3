"""The judge: an exit of VTL0 and the rules -> how it ends, and which rule says so. Pure; tables, no I/O.

It judges the change, not the value: a write is refused as a whole if it changes a pinned bit to what the rule forbids.
What no rule pins is committed. An exit of a kind that is not in the tables is denied.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import NamedTuple, Protocol

from vtl1_monitor.policy.rules import Rules, ValueRule
from vtl1_monitor.policy.schema import Violation
from vtlab.enums import name_of
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Msr

CR3_BASE = 0x000F_FFFF_FFFF_F000
"""Page-table base in CR3, without PCID and flags (SDM volume 3, section 4.5.2)."""

UNKNOWN = "unknown exit"
NO_RULE = ""


class Facts(Protocol):
    """What a verdict depends on besides the rules."""

    @property
    def roots(self) -> Set[int]:
        """Page-table roots that VTL1 knows, as bases."""

    def owner(self, gfn: int) -> str:
        """The rule that gave a page its rights."""


class Verdict(NamedTuple):
    """`rule` is "" where none is concerned."""

    resolution: vcpu_pb2.Resolution
    rule: str

    @property
    def allowed(self) -> bool:
        return self.resolution.action in (vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_RETRY)


REGISTER_ACTION: dict[Violation, vcpu_pb2.Action.ValueType] = {
    Violation.GP: vcpu_pb2.ACTION_DENY,
    Violation.SKIP: vcpu_pb2.ACTION_SKIP,
    Violation.LOG: vcpu_pb2.ACTION_COMMIT,
    Violation.HALT: vcpu_pb2.ACTION_HALT,
    Violation.RESET: vcpu_pb2.ACTION_RESET,
}
"""What a violation of a register's rule does."""

# Of memory, "log" opens the page and runs the instruction again.
_MEMORY_ACTION = REGISTER_ACTION | {Violation.LOG: vcpu_pb2.ACTION_RETRY}


def judge(rules: Rules, facts: Facts, exit_: vcpu_pb2.Exit) -> Verdict:
    """Decides one exit. Never raises: what it does not know it denies."""
    kind = exit_.WhichOneof("reason")
    handler = _KINDS.get(kind or "")
    if handler is None:
        return _verdict(vcpu_pb2.ACTION_DENY, UNKNOWN, f"exit {kind or 'without a reason'} has no rule")
    return handler(rules, facts, exit_)


def _verdict(action: vcpu_pb2.Action.ValueType, rule: str, reason: str) -> Verdict:
    return Verdict(vcpu_pb2.Resolution(action=action, reason=reason), rule)


def _commit(rule: str, reason: str) -> Verdict:
    return _verdict(vcpu_pb2.ACTION_COMMIT, rule, reason)


def _value(rule: ValueRule | None, name: str, old: int, new: int) -> Verdict:
    if rule is None:
        return _commit(NO_RULE, f"{name} is not pinned")
    refused = rule.refused(old, new)
    if refused:
        reason = f"{rule.name}: {old:#x} -> {new:#x} changes pinned bits {refused:#x}"
        return _verdict(REGISTER_ACTION[rule.violation], rule.name, reason)
    if (old ^ new) & rule.watched_mask:
        return _commit(rule.name, f"{rule.name}: {old:#x} -> {new:#x} is watched")
    return _commit(NO_RULE, f"{rule.name}: no pinned bit changes to a forbidden value")


def _register_write(rules: Rules, facts: Facts, exit_: vcpu_pb2.Exit) -> Verdict:
    handler = _REGISTERS.get(exit_.register_write.name)
    if handler is None:
        return _verdict(vcpu_pb2.ACTION_DENY, UNKNOWN, f"register {exit_.register_write.name:#x} has no rule")
    return handler(rules, facts, exit_.register_write)


def _bits_register(rules: Rules, _facts: Facts, write: vcpu_pb2.RegisterWrite) -> Verdict:
    rule = rules.registers.get(write.name)
    return _value(rule, name_of(registers_pb2.RegisterName, write.name), write.old_value, write.new_value)


def _table_register(rules: Rules, _facts: Facts, write: vcpu_pb2.RegisterWrite) -> Verdict:
    rule = rules.tables.get(write.name)
    if rule is None:
        return _commit(NO_RULE, f"{name_of(registers_pb2.RegisterName, write.name)} is not pinned")
    same = write.old_table == write.new_table and write.old_value == write.new_value
    # LLDT and LTR reload the hidden part from memory: the same selector may mean another segment.
    if same and write.name in (registers_pb2.REGISTER_NAME_GDTR, registers_pb2.REGISTER_NAME_IDTR):
        return _commit(NO_RULE, f"{rule.name}: same base and limit")
    return _verdict(REGISTER_ACTION[rule.violation], rule.name, f"{rule.name} is frozen")


def _cr3(rules: Rules, facts: Facts, write: vcpu_pb2.RegisterWrite) -> Verdict:
    rule = rules.cr3
    if rule is None:
        return _commit(NO_RULE, "CR3 is not limited")
    root = write.new_value & CR3_BASE
    if root in facts.roots:
        return _commit(NO_RULE, f"cr3: root {root:#x} is known")
    return _verdict(REGISTER_ACTION[rule.violation], rule.name, f"cr3: root {root:#x} is not known to VTL1")


def _free_register(_rules: Rules, _facts: Facts, write: vcpu_pb2.RegisterWrite) -> Verdict:
    return _commit(NO_RULE, f"{name_of(registers_pb2.RegisterName, write.name)} is never pinned")


def _msr(rules: Rules, _facts: Facts, exit_: vcpu_pb2.Exit) -> Verdict:
    access = exit_.msr
    if not access.write:
        return _commit(NO_RULE, f"reads of MSR {access.index:#x} are not limited")
    register = _MSR_OF_REGISTER.get(access.index)
    rule = rules.msrs.get(access.index) if register is None else rules.registers.get(register)
    return _value(rule, f"MSR {access.index:#x}", access.old_value, access.new_value)


def _memory_fault(rules: Rules, facts: Facts, exit_: vcpu_pb2.Exit) -> Verdict:
    fault = exit_.memory_fault
    owner = facts.owner(fault.gpa >> 12)
    access = name_of(vcpu_pb2.AccessKind, fault.access).removeprefix("ACCESS_KIND_").lower()
    if fault.unmapped:
        return _verdict(vcpu_pb2.ACTION_DENY, UNKNOWN, f"{access} of {fault.gpa:#x}: nothing is there")
    if not owner:
        # The nested table refused what VTL1 never took away: somebody is out of step.
        return _verdict(vcpu_pb2.ACTION_DENY, UNKNOWN, f"{access} of {fault.gpa:#x}: no rule covers this page")
    action = _MEMORY_ACTION[rules.violation(owner)]
    return _verdict(action, owner, f"{owner}: {access} of {fault.gpa:#x} is refused")


# Registers with a rule of their own that a client may also write by MSR index.
_MSR_OF_REGISTER = {int(Msr.EFER): registers_pb2.REGISTER_NAME_EFER}


_KINDS: dict[str, Callable[[Rules, Facts, vcpu_pb2.Exit], Verdict]] = {
    "register_write": _register_write,
    "msr": _msr,
    "memory_fault": _memory_fault,
}

_REGISTERS: dict[int, Callable[[Rules, Facts, vcpu_pb2.RegisterWrite], Verdict]] = {
    registers_pb2.REGISTER_NAME_CR0: _bits_register,
    registers_pb2.REGISTER_NAME_CR4: _bits_register,
    registers_pb2.REGISTER_NAME_EFER: _bits_register,
    registers_pb2.REGISTER_NAME_XFEM: _bits_register,
    registers_pb2.REGISTER_NAME_CR3: _cr3,
    registers_pb2.REGISTER_NAME_GDTR: _table_register,
    registers_pb2.REGISTER_NAME_IDTR: _table_register,
    registers_pb2.REGISTER_NAME_LDTR: _table_register,
    registers_pb2.REGISTER_NAME_TR: _table_register,
    # Only a client's writes reach VTL1 for these.
    registers_pb2.REGISTER_NAME_CR2: _free_register,
    registers_pb2.REGISTER_NAME_CR8: _free_register,
    registers_pb2.REGISTER_NAME_DR0: _free_register,
    registers_pb2.REGISTER_NAME_DR1: _free_register,
    registers_pb2.REGISTER_NAME_DR2: _free_register,
    registers_pb2.REGISTER_NAME_DR3: _free_register,
    registers_pb2.REGISTER_NAME_DR6: _free_register,
    registers_pb2.REGISTER_NAME_DR7: _free_register,
}
