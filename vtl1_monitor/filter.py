"""Rules -> what the core must exit on, and nothing more. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import SleepMode, SmmMode
from vtlab.v1 import registers_pb2, vcpu_pb2

# Registers whose mask has a field of its own.
_MASKS = {
    registers_pb2.REGISTER_NAME_CR0: "cr0_mask",
    registers_pb2.REGISTER_NAME_CR4: "cr4_mask",
    registers_pb2.REGISTER_NAME_EFER: "efer_mask",
    registers_pb2.REGISTER_NAME_XFEM: "xcr0_mask",
}
_TABLES = {
    registers_pb2.REGISTER_NAME_GDTR: "gdtr_writes",
    registers_pb2.REGISTER_NAME_IDTR: "idtr_writes",
    registers_pb2.REGISTER_NAME_LDTR: "ldtr_writes",
    registers_pb2.REGISTER_NAME_TR: "tr_writes",
}


_SWITCHES = ("cpuid", "hlt", "invlpg", "state_loads", "no_smi", "sleeps", "startups", "startup_window")


def intercept_filter(
    rules: Rules, roots: Iterable[int], extra: Iterable[vcpu_pb2.InterceptFilter] = ()
) -> vcpu_pb2.InterceptFilter:
    """The filter for these rules; known page-table roots do not exit.

    Args:
        roots: page-table bases that may be loaded.
        extra: what rules in code want besides (vtl1_monitor.api).
    """
    result = vcpu_pb2.InterceptFilter()
    for name, field in _MASKS.items():
        rule = rules.registers.get(name)
        if rule is not None:
            setattr(result, field, rule.mask)
    for name, field in _TABLES.items():
        setattr(result, field, name in rules.tables)
    if rules.cr3 is not None:
        result.cr3_writes = True
        result.cr3_targets.extend(sorted(roots))
    result.state_loads = True
    result.sleeps = rules.lifecycle.s3 in (SleepMode.REFUSE, SleepMode.VERIFY)
    result.no_smi = rules.lifecycle.smm is SmmMode.DENY
    for index, rule in sorted(rules.msrs.items()):
        if rule.mask:
            result.msr_writes.add(index=index, mask=rule.mask)
    for other in extra:
        _merge(result, other)
    return result


def _merge(into: vcpu_pb2.InterceptFilter, other: vcpu_pb2.InterceptFilter) -> None:
    """Makes `into` exit on what either exits on."""
    for field in _MASKS.values():
        setattr(into, field, getattr(into, field) | getattr(other, field))
    for field in (*_TABLES.values(), *_SWITCHES):
        setattr(into, field, getattr(into, field) or getattr(other, field))
    if other.cr3_writes:
        into.cr3_writes = True
        # A rule in code that watches CR3 sees every write, unless it names roots itself.
        targets = set(into.cr3_targets) & set(other.cr3_targets)
        del into.cr3_targets[:]
        into.cr3_targets.extend(sorted(targets))
    masks = {row.index: row.mask for row in into.msr_writes}
    for row in other.msr_writes:
        masks[row.index] = masks.get(row.index, 0) | row.mask
    del into.msr_writes[:]
    into.msr_writes.extend(vcpu_pb2.MsrFilter(index=index, mask=mask) for index, mask in sorted(masks.items()))
    into.msr_reads.extend(other.msr_reads)
    into.ports.extend(other.ports)
