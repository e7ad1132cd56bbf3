"""A whole state: it is let through if every pin holds in it, whatever was there before."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtl1_monitor.policy.rules import Rules, TableRule, ValueRule
from vtl1_monitor.policy.schema import Violation
from vtl1_monitor.state_judge import judge_state
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr

CR0, CR4, EFER = (
    registers_pb2.REGISTER_NAME_CR0,
    registers_pb2.REGISTER_NAME_CR4,
    registers_pb2.REGISTER_NAME_EFER,
)
XFEM, GDTR, TR = registers_pb2.REGISTER_NAME_XFEM, registers_pb2.REGISTER_NAME_GDTR, registers_pb2.REGISTER_NAME_TR
ROOT, SEALED = 0x5000, 0xFFFF800000001000
LSTAR = int(Msr.LSTAR)
words = st.integers(0, (1 << 64) - 1)
causes = st.sampled_from(
    [
        vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END,
        vcpu_pb2.STATE_LOAD_CAUSE_RSM,
        vcpu_pb2.STATE_LOAD_CAUSE_WAKE,
        vcpu_pb2.STATE_LOAD_CAUSE_CLIENT,
    ]
)


@dataclass
class World:
    """Facts: one root, one sealed page, and what was locked."""

    locked: dict[int, int] = field(default_factory=dict)
    roots: Set[int] = frozenset({ROOT})

    def owner(self, _gfn: int) -> str:
        return ""

    def at_lock(self, name: int) -> int | None:
        return self.locked.get(name)

    def is_sealed(self, _registers: registers_pb2.Registers, gva: int, size: int) -> bool:
        return gva >= SEALED and gva + size <= SEALED + 0x1000


def pinned(violation: Violation = Violation.GP) -> Rules:
    """PG, WP, SMEP, NXE must be 1, VMXE 0; LSTAR is 0x1234; roots and tables."""
    return Rules(
        registers={
            CR0: ValueRule("cr0", violation, Cr0.PG | Cr0.WP, Cr0.PG | Cr0.WP),
            CR4: ValueRule("cr4", violation, Cr4.SMEP | Cr4.VMXE, Cr4.SMEP),
            EFER: ValueRule("efer", violation, Efer.NXE, Efer.NXE),
        },
        msrs={LSTAR: ValueRule("LSTAR", violation, (1 << 64) - 1, 0x1234)},
        tables={name: TableRule(text, violation) for name, text in ((GDTR, "gdtr"), (TR, "tr"))},
        cr3=TableRule("cr3", violation),
    )


def good() -> registers_pb2.ProcessorState:
    state = registers_pb2.ProcessorState(msrs=[registers_pb2.MsrValue(index=LSTAR, value=0x1234)])
    registers = state.registers
    registers.cr0, registers.cr3, registers.cr4 = Cr0.PG | Cr0.WP | Cr0.PE, ROOT | 0x18, Cr4.SMEP | Cr4.PAE
    registers.efer = Efer.NXE | Efer.LME
    state.gdtr.base, state.gdtr.limit = SEALED, 0x37
    state.tr.limit = 0xFFFF
    return state


def load(
    state: registers_pb2.ProcessorState,
    cause: vcpu_pb2.StateLoadCause.ValueType = vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END,
    before: registers_pb2.ProcessorState | None = None,
) -> vcpu_pb2.StateLoad:
    return vcpu_pb2.StateLoad(cause=cause, state=state, before=before)


BROKEN = {
    "cr0": lambda state: setattr(state.registers, "cr0", int(Cr0.PG | Cr0.PE)),
    "cr4": lambda state: setattr(state.registers, "cr4", int(Cr4.SMEP | Cr4.VMXE)),
    "efer": lambda state: setattr(state.registers, "efer", int(Efer.LME)),
    "cr3": lambda state: setattr(state.registers, "cr3", 0x6000),
    "gdtr": lambda state: setattr(state.gdtr, "base", 0x9000),
    "tr": lambda state: setattr(state.tr, "base", 0x9000),
    "LSTAR": lambda state: setattr(state.msrs[0], "value", 0x1235),
}


@given(causes)
def test_a_state_in_which_all_pins_hold_passes(cause: vcpu_pb2.StateLoadCause.ValueType) -> None:
    verdict = judge_state(pinned(), World(), load(good(), cause))
    assert (verdict.resolution.action, verdict.rule) == (vcpu_pb2.ACTION_COMMIT, "")


@pytest.mark.parametrize("rule", BROKEN)
@pytest.mark.parametrize(
    ("violation", "action"),
    [
        (Violation.GP, vcpu_pb2.ACTION_DENY),
        (Violation.SKIP, vcpu_pb2.ACTION_DENY),
        (Violation.LOG, vcpu_pb2.ACTION_COMMIT),
        (Violation.HALT, vcpu_pb2.ACTION_HALT),
        (Violation.RESET, vcpu_pb2.ACTION_RESET),
    ],
)
def test_each_pin_is_judged_and_named(rule: str, violation: Violation, action: vcpu_pb2.Action.ValueType) -> None:
    state = good()
    BROKEN[rule](state)
    verdict = judge_state(pinned(violation), World(), load(state))
    assert (verdict.resolution.action, verdict.rule) == (action, rule)


def test_a_logged_violation_does_not_hide_one_that_is_refused() -> None:
    state = good()
    BROKEN["cr0"](state)
    BROKEN["cr4"](state)
    rules = pinned()
    registers = dict(rules.registers) | {CR0: ValueRule("cr0", Violation.LOG, Cr0.WP, Cr0.WP)}
    verdict = judge_state(Rules(registers=registers), World(), load(state))
    assert (verdict.resolution.action, verdict.rule) == (vcpu_pb2.ACTION_DENY, "cr4")


def test_efer_among_the_msrs_counts_too() -> None:
    state = good()
    state.msrs.add(index=int(Msr.EFER), value=int(Efer.LME))
    assert judge_state(pinned(), World(), load(state)).rule == "efer"


@given(causes, words, words, words)
def test_frozen_bits_are_those_of_the_state_before(
    cause: vcpu_pb2.StateLoadCause.ValueType, frozen: int, old: int, new: int
) -> None:
    rules = Rules(registers={CR4: ValueRule("cr4", Violation.GP, frozen_mask=frozen)})
    state, before = good(), good()
    state.registers.cr4, before.registers.cr4 = new, old
    allowed = not (old ^ new) & frozen
    assert judge_state(rules, World({CR4: ~old & (1 << 64) - 1}), load(state, cause, before)).allowed == allowed
    assert judge_state(rules, World({CR4: old}), load(state, cause)).allowed == allowed


def test_what_nobody_remembers_is_refused_unless_it_was_never_lifted() -> None:
    """INIT leaves XCR0 and MSRs alone; whoever loads a state from memory does not."""
    frozen = ValueRule("frozen", Violation.GP, frozen_mask=(1 << 64) - 1)
    for rules in (Rules(registers={XFEM: frozen}), Rules(msrs={LSTAR: frozen})):
        assert judge_state(rules, World(), load(good())).allowed
        assert not judge_state(rules, World(), load(good(), vcpu_pb2.STATE_LOAD_CAUSE_RSM)).allowed


def test_tables_are_compared_with_those_before() -> None:
    rules, before = pinned(), good()
    before.gdtr.base = 0x9000
    assert judge_state(rules, World(), load(good(), before=before)).rule == "gdtr"
    assert judge_state(rules, World(), load(before, before=before)).allowed


@given(words, words, words, words)
def test_no_rules_refuse_nothing(cr0: int, cr3: int, cr4: int, efer: int) -> None:
    state = registers_pb2.ProcessorState(registers=registers_pb2.Registers(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer))
    assert judge_state(Rules(), World(), load(state)).allowed
