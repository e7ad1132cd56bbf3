"""The judge and the filter: pinned bits hold, nothing else is hindered, and what must exit is what may be refused."""

from __future__ import annotations

from collections.abc import Set

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtl1_monitor.filter import intercept_filter
from vtl1_monitor.judge import UNKNOWN, judge
from vtl1_monitor.policy.rules import Rules, TableRule, ValueRule
from vtl1_monitor.policy.schema import Violation
from vtlab.v1 import registers_pb2, vcpu_pb2

BITS = (
    registers_pb2.REGISTER_NAME_CR0,
    registers_pb2.REGISTER_NAME_CR4,
    registers_pb2.REGISTER_NAME_EFER,
    registers_pb2.REGISTER_NAME_XFEM,
)
TABLES = (
    registers_pb2.REGISTER_NAME_GDTR,
    registers_pb2.REGISTER_NAME_IDTR,
    registers_pb2.REGISTER_NAME_LDTR,
    registers_pb2.REGISTER_NAME_TR,
)
ROOT = 0x5000
words = st.integers(0, (1 << 64) - 1)
masks = st.one_of(words, st.sets(st.integers(0, 63), max_size=4).map(lambda bits: sum(1 << bit for bit in bits)))


class World:
    """Facts: one known root, page 7 belongs to 'text', page 8 to 'log'."""

    roots: Set[int] = frozenset({ROOT})

    def owner(self, gfn: int) -> str:
        return {7: "text", 8: "log"}.get(gfn, "")


@st.composite
def value_rules(draw: st.DrawFn) -> ValueRule:
    """Any rule, with any consequence that does not let the write through."""
    violation = draw(st.sampled_from([Violation.GP, Violation.SKIP, Violation.HALT, Violation.RESET]))
    return ValueRule("rule", violation, draw(masks), draw(words), draw(masks), draw(masks))


def register_exit(name: registers_pb2.RegisterName.ValueType, old: int, new: int) -> vcpu_pb2.Exit:
    return vcpu_pb2.Exit(register_write=vcpu_pb2.RegisterWrite(name=name, old_value=old, new_value=new))


def msr_exit(index: int, old: int, new: int) -> vcpu_pb2.Exit:
    return vcpu_pb2.Exit(msr=vcpu_pb2.MsrAccess(index=index, write=True, old_value=old, new_value=new))


def rules_and_exit(rule: ValueRule, kind: int, old: int, new: int) -> tuple[Rules, vcpu_pb2.Exit]:
    """The rule on a control register or (kind 4) on an MSR, and a write of it."""
    if kind < len(BITS):
        return Rules(registers={BITS[kind]: rule}), register_exit(BITS[kind], old, new)
    return Rules(msrs={0xC0000082: rule}), msr_exit(0xC0000082, old, new)


def exits(filter_: vcpu_pb2.InterceptFilter, kind: int, old: int, new: int) -> bool:
    """What a core with this filter does."""
    fields = ("cr0_mask", "cr4_mask", "efer_mask", "xcr0_mask")
    if kind < len(fields):
        return bool((old ^ new) & getattr(filter_, fields[kind]))
    return any(row.index == 0xC0000082 and (old ^ new) & row.mask for row in filter_.msr_writes)


@given(value_rules(), st.integers(0, 4), words, words)
def test_no_pinned_bit_is_ever_set_wrong(rule: ValueRule, kind: int, old: int, new: int) -> None:
    rules, exit_ = rules_and_exit(rule, kind, old, new)
    verdict = judge(rules, World(), exit_)
    for bit in (1 << n for n in range(64)):
        if not (old ^ new) & bit:
            continue
        wrong = rule.frozen_mask & bit or (rule.fixed_mask & bit and (new ^ rule.fixed_value) & bit)
        assert not (wrong and verdict.allowed)


@given(value_rules(), st.integers(0, 4), words, words)
def test_what_is_not_pinned_is_never_refused(rule: ValueRule, kind: int, old: int, new: int) -> None:
    """Bits that no mask has may change at will, and a bit that is wrong already and stays so is nobody's fault."""
    new = old & (rule.fixed_mask | rule.frozen_mask) | new & ~(rule.fixed_mask | rule.frozen_mask)
    rules, exit_ = rules_and_exit(rule, kind, old, new)
    assert judge(rules, World(), exit_).resolution.action == vcpu_pb2.ACTION_COMMIT


@given(value_rules(), st.integers(0, 4), words, words)
def test_everything_that_is_refused_exits(rule: ValueRule, kind: int, old: int, new: int) -> None:
    rules, exit_ = rules_and_exit(rule, kind, old, new)
    if not judge(rules, World(), exit_).allowed:
        assert exits(intercept_filter(rules, ()), kind, old, new)


@given(value_rules(), st.integers(0, 4), st.integers(0, 63))
def test_no_bit_exits_without_a_reason(rule: ValueRule, kind: int, bit: int) -> None:
    """A bit in the filter is watched, or one of its two changes is refused."""
    rules, _ = rules_and_exit(rule, kind, 0, 0)
    mask = 1 << bit
    changes = [(0, mask), (mask, 0)]
    refused = [not judge(rules, World(), rules_and_exit(rule, kind, old, new)[1]).allowed for old, new in changes]
    assert exits(intercept_filter(rules, ()), kind, 0, mask) == (any(refused) or bool(rule.watched_mask & mask))


@given(value_rules(), st.integers(0, 4), words, words)
def test_a_verdict_is_never_the_zero_value(rule: ValueRule, kind: int, old: int, new: int) -> None:
    rules, exit_ = rules_and_exit(rule, kind, old, new)
    verdict = judge(rules, World(), exit_)
    assert verdict.resolution.action != vcpu_pb2.ACTION_UNSPECIFIED
    assert verdict.resolution.reason


@pytest.mark.parametrize("name", TABLES)
def test_frozen_tables(name: registers_pb2.RegisterName.ValueType) -> None:
    rules = Rules(tables={name: TableRule("table", Violation.GP)})
    write = vcpu_pb2.RegisterWrite(
        name=name,
        old_table=registers_pb2.TableRegister(base=0x1000, limit=0xFF),
        new_table=registers_pb2.TableRegister(base=0x2000, limit=0xFF),
        old_value=8,
        new_value=16,
    )
    exit_ = vcpu_pb2.Exit(register_write=write)
    assert judge(rules, World(), exit_).resolution.action == vcpu_pb2.ACTION_DENY
    assert judge(Rules(), World(), exit_).resolution.action == vcpu_pb2.ACTION_COMMIT
    filter_ = intercept_filter(rules, ())
    assert [filter_.gdtr_writes, filter_.idtr_writes, filter_.ldtr_writes, filter_.tr_writes] == [
        name == other for other in TABLES
    ]


@pytest.mark.parametrize(
    ("name", "action"),
    [
        (registers_pb2.REGISTER_NAME_GDTR, vcpu_pb2.ACTION_COMMIT),
        (registers_pb2.REGISTER_NAME_IDTR, vcpu_pb2.ACTION_COMMIT),
        (registers_pb2.REGISTER_NAME_LDTR, vcpu_pb2.ACTION_DENY),
        (registers_pb2.REGISTER_NAME_TR, vcpu_pb2.ACTION_DENY),
    ],
)
def test_loading_the_same_value_again(
    name: registers_pb2.RegisterName.ValueType, action: vcpu_pb2.Action.ValueType
) -> None:
    """Of LDTR and TR the same selector may mean another segment, for the GDT is memory."""
    rules = Rules(tables={name: TableRule("table", Violation.GP)})
    assert judge(rules, World(), register_exit(name, 0x28, 0x28)).resolution.action == action


@pytest.mark.parametrize(
    ("value", "allowed"), [(ROOT, True), (ROOT | 0x18, True), (1 << 63 | ROOT | 5, True), (0x6000, False), (0, False)]
)
def test_cr3_takes_known_roots_whatever_the_pcid(value: int, allowed: bool) -> None:
    rules = Rules(cr3=TableRule("cr3", Violation.GP))
    assert judge(rules, World(), register_exit(registers_pb2.REGISTER_NAME_CR3, 0, value)).allowed is allowed
    filter_ = intercept_filter(rules, World.roots)
    assert filter_.cr3_writes
    assert list(filter_.cr3_targets) == [ROOT]


def test_without_a_rule_for_it_cr3_does_not_exit() -> None:
    assert not intercept_filter(Rules(), World.roots).cr3_writes


@pytest.mark.parametrize(
    ("gpa", "unmapped", "action", "rule"),
    [
        (0x7123, False, vcpu_pb2.ACTION_DENY, "text"),
        (0x8000, False, vcpu_pb2.ACTION_RETRY, "log"),
        (0x9000, False, vcpu_pb2.ACTION_DENY, UNKNOWN),
        (0x8000, True, vcpu_pb2.ACTION_DENY, UNKNOWN),
    ],
)
def test_memory(gpa: int, unmapped: bool, action: vcpu_pb2.Action.ValueType, rule: str) -> None:
    rules = Rules(violations={"log": Violation.LOG})
    fault = vcpu_pb2.MemoryFault(gpa=gpa, access=vcpu_pb2.ACCESS_KIND_WRITE, unmapped=unmapped)
    verdict = judge(rules, World(), vcpu_pb2.Exit(memory_fault=fault))
    assert (verdict.resolution.action, verdict.rule) == (action, rule)


KINDS = [field.name for field in vcpu_pb2.Exit.DESCRIPTOR.oneofs_by_name["reason"].fields]
JUDGED = ("register_write", "msr", "memory_fault", "sleep")


@pytest.mark.parametrize("kind", [None, *(k for k in KINDS if k not in JUDGED)])
def test_unknown_exits_are_denied(kind: str | None) -> None:
    exit_ = vcpu_pb2.Exit()
    if kind is not None:
        getattr(exit_, kind).SetInParent()
    verdict = judge(Rules(), World(), exit_)
    assert (verdict.resolution.action, verdict.rule) == (vcpu_pb2.ACTION_DENY, UNKNOWN)


def test_efer_is_pinned_by_whichever_name_it_is_written() -> None:
    """A client of the VMM may write EFER as an MSR; the guest's own write exits as a register."""
    rules = Rules(registers={registers_pb2.REGISTER_NAME_EFER: ValueRule("efer", Violation.GP, 1 << 11, 1 << 11)})
    by_index = msr_exit(0xC0000080, 0xD01, 0x501)
    by_name = register_exit(registers_pb2.REGISTER_NAME_EFER, 0xD01, 0x501)
    assert [judge(rules, World(), exit_).rule for exit_ in (by_index, by_name)] == ["efer", "efer"]


def test_unknown_registers_are_denied() -> None:
    assert not judge(Rules(), World(), register_exit(registers_pb2.REGISTER_NAME_CS, 8, 16)).allowed
    assert not judge(Rules(), World(), register_exit(registers_pb2.REGISTER_NAME_UNSPECIFIED, 8, 16)).allowed


@pytest.mark.parametrize(
    ("violation", "action"),
    [
        (Violation.GP, vcpu_pb2.ACTION_DENY),
        (Violation.SKIP, vcpu_pb2.ACTION_SKIP),
        (Violation.LOG, vcpu_pb2.ACTION_COMMIT),
        (Violation.HALT, vcpu_pb2.ACTION_HALT),
        (Violation.RESET, vcpu_pb2.ACTION_RESET),
    ],
)
def test_what_a_violation_does(violation: Violation, action: vcpu_pb2.Action.ValueType) -> None:
    rules = Rules(registers={registers_pb2.REGISTER_NAME_CR0: ValueRule("cr0", violation, 1 << 16, 1 << 16)})
    verdict = judge(rules, World(), register_exit(registers_pb2.REGISTER_NAME_CR0, 1 << 16, 0))
    assert (verdict.resolution.action, verdict.rule) == (action, "cr0")


def test_extra_filters_of_rules_in_code_are_merged() -> None:
    rules = Rules(
        registers={registers_pb2.REGISTER_NAME_CR4: ValueRule("cr4", Violation.GP, 1)},
        msrs={1: ValueRule("m", Violation.GP, 1)},
        cr3=TableRule("cr3", Violation.GP),
    )
    extra = vcpu_pb2.InterceptFilter(
        cr4_mask=2, hlt=True, cr3_writes=True, msr_writes=[vcpu_pb2.MsrFilter(index=1, mask=4)]
    )
    merged = intercept_filter(rules, {ROOT}, [extra])
    assert (merged.cr4_mask, merged.hlt, list(merged.cr3_targets)) == (3, True, [])
    assert [(row.index, row.mask) for row in merged.msr_writes] == [(1, 5)]
