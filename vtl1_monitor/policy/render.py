"""Rules for people: one line each."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntFlag

from vtl1_monitor.policy.bits import BITS
from vtl1_monitor.policy.rules import MemoryRule, Rules, ValueRule
from vtl1_monitor.policy.schema import Hibernate, Phase, SleepMode, SmmMode, Upgrade, Verified, Violation
from vtl1_monitor.rights import access_text
from vtlab.ram import PAGE_SIZE
from vtlab.services import Service

_CONSEQUENCE = {
    Violation.GP: "#GP",
    Violation.SKIP: "skipped",
    Violation.LOG: "logged",
    Violation.HALT: "halt",
    Violation.RESET: "reset",
}
_SLEEP = {
    SleepMode.RESTORE: "VTL1 loads the state that it sealed",
    SleepMode.VERIFY: "the waking code runs alone until every pin holds; else reset",
    SleepMode.RESET: "waking is a reset",
    SleepMode.REFUSE: "refused",
}
_ALL = (1 << 64) - 1


def render(rules: Rules) -> list[str]:
    """Lines like "cr0: PE WP must be 1; else #GP"."""
    return list(_lines(rules))


def _lines(rules: Rules) -> Iterator[str]:
    for rule in rules.registers.values():
        yield from _value_lines(rule, BITS.get(rule.name))
    for index, rule in sorted(rules.msrs.items()):
        yield from (f"msr {index:#x} {line}" for line in _value_lines(rule, None))
    for table in rules.tables.values():
        yield f"{table.name}: frozen; else {_CONSEQUENCE[table.violation]}"
    if rules.cr3 is not None:
        allowed = "frozen" if rules.cr3_frozen else "only page-table roots that VTL1 knows"
        yield f"cr3: {allowed}; else {_CONSEQUENCE[rules.cr3.violation]}"
    for memory in sorted(rules.memory, key=lambda one: one.run):
        yield _memory_line(memory)
    if rules.default_code is not None:
        consequence = _CONSEQUENCE[rules.violation(rules.default_name)]
        yield f"{rules.default_name}: {access_text(rules.default_code)} all other RAM; else {consequence}"
    if rules.guard_page_tables is not None:
        consequence = _CONSEQUENCE[rules.violation("page_tables")]
        yield f"page_tables: written by VTL1 only{_phase(rules.guard_page_tables)}; else {consequence}"
    yield from _lifecycle_lines(rules)
    if not rules.startup.allowed:
        yield _startup_line(rules)
    yield from _service_lines(rules)


def _startup_line(rules: Rules) -> str:
    rule, end = rules.startup, f"; else {_CONSEQUENCE[rules.startup.violation]}"
    if not rule.trampoline:
        return f"startup: no vCPU is stopped or started{end}"
    place = "pages below 1 MiB as they were at lock"
    if rule.run is not None:
        place = f"{rule.run.first * PAGE_SIZE:#x}-{rule.run.end * PAGE_SIZE:#x}"
    pins = "VTL1 sets the pins behind it" if rule.sets_pins else "the pins must hold behind it"
    return f"startup: only through {place}; {pins}{end}"


def _value_lines(rule: ValueRule, bits: type[IntFlag] | None) -> Iterator[str]:
    end = f"; else {_CONSEQUENCE[rule.violation]}"
    if rule.written_at_lock:
        yield f"{rule.name}: is {rule.fixed_value:#x}{end}"
    else:
        for wanted in (1, 0):
            mask = rule.fixed_mask & (rule.fixed_value if wanted else ~rule.fixed_value)
            if mask:
                yield f"{rule.name}: {_names(mask, bits)} must be {wanted}{end}"
    if rule.frozen_mask:
        yield f"{rule.name}: {_names(rule.frozen_mask, bits)} frozen{end}"
    if rule.watched_mask:
        yield f"{rule.name}: {_names(rule.watched_mask, bits)} watched"


def _names(mask: int, bits: type[IntFlag] | None) -> str:
    if mask == _ALL:
        return "all bits"
    if bits is None or mask.bit_count() > 32:
        return f"bits {mask:#x}"
    names = {int(member): str(member.name) for member in bits}
    return " ".join(names.get(1 << bit, f"bit {bit}") for bit in range(64) if mask >> bit & 1)


def _memory_line(rule: MemoryRule) -> str:
    first, last = rule.run.first * PAGE_SIZE, rule.run.end * PAGE_SIZE
    measured = ", measured" if rule.measured else ""
    consequence = _CONSEQUENCE[rule.violation]
    return (
        f"{rule.name}: {access_text(rule.code)} {first:#x}-{last:#x}{_phase(rule.phase)}{measured}; else {consequence}"
    )


def _phase(phase: Phase) -> str:
    return " after the end of boot" if phase is Phase.END_OF_BOOT else ""


def _lifecycle_lines(rules: Rules) -> Iterator[str]:
    if rules.lifecycle.smm is SmmMode.DENY:
        yield "smm: SMIs are dropped"
    else:
        yield f"smm: RSM loads what the rules of registers allow; else {rules.lifecycle.rsm_violation.value}"
    for name, verified in (("kexec", rules.lifecycle.kexec), ("kdump", rules.lifecycle.kdump)):
        if verified is Verified.REFUSE:
            yield f"{name}: refused"
    if rules.lifecycle.upgrade is Upgrade.SIGNED:
        yield "policy: replaced by a newer one that is signed"
    if rules.lifecycle.minimum_kernel_version:
        yield f"kexec and kdump: no kernel below version {rules.lifecycle.minimum_kernel_version}"
    yield f"s3: {_SLEEP[rules.lifecycle.s3]}"
    if rules.lifecycle.hibernate is Hibernate.REFUSE:
        yield "hibernate: refused"


def _service_lines(rules: Rules) -> Iterator[str]:
    if rules.services != frozenset(Service):
        yield "services: " + " ".join(service.name for service in sorted(rules.services))
    for action in rules.actions.values():
        allowed = sorted(action.allows) + sorted(service.name for service in action.services)
        key = action.public_key.hex()[:16]
        yield f"action {action.name}: once {', '.join(allowed) or 'nothing'}, proved by key {key}"
