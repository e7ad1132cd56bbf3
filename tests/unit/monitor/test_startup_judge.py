"""Who may stop and start a vCPU, and what VTL1 makes of the state that it comes with."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitor.test_state_judge import CR0, CR4, EFER, World, good, pinned
from vtl1_monitor.policy.rules import Rules, StartupRule, ValueRule
from vtl1_monitor.policy.schema import Violation
from vtl1_monitor.rights import Run
from vtl1_monitor.startup_judge import judge_startup, kept, pinned_state, with_pins
from vtl1_monitor.state_judge import judge_state
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr

INIT, SIPI, CONTEXT = vcpu_pb2.STARTUP_KIND_INIT, vcpu_pb2.STARTUP_KIND_SIPI, vcpu_pb2.STARTUP_KIND_CONTEXT
COMMIT, DENY, SKIP = vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_SKIP
TRAMPOLINE = StartupRule(run=Run(8, 1))
LOW = StartupRule(low_memory=True)
Kind: TypeAlias = vcpu_pb2.StartupKind.ValueType


def verdict(rule: StartupRule, kind: Kind, target: int = 1, vector: int = 8, parked: bool = True) -> int:
    startup = vcpu_pb2.Startup(target_vp=target, kind=kind, vector=vector, target_parked=parked)
    return judge_startup(Rules(startup=rule), World(), startup).resolution.action


@pytest.mark.parametrize("kind", [INIT, SIPI, CONTEXT])
def test_denied_by_default_and_allowed_before_a_policy(kind: Kind) -> None:
    assert verdict(StartupRule(), kind) == DENY
    assert judge_startup(Rules(), World(), vcpu_pb2.Startup(target_vp=1, kind=kind)).allowed


@pytest.mark.parametrize("rule", [StartupRule(), TRAMPOLINE, LOW])
def test_init_of_the_boot_processor_is_a_reset(rule: StartupRule) -> None:
    assert verdict(rule, INIT, target=0) == COMMIT


def test_a_vcpu_that_runs_is_not_stopped_and_its_second_sipi_is_no_attack() -> None:
    assert verdict(TRAMPOLINE, INIT) == COMMIT
    assert verdict(TRAMPOLINE, INIT, parked=False) == DENY
    assert verdict(TRAMPOLINE, SIPI, parked=False) == SKIP


def test_sipi_starts_at_the_trampoline_only() -> None:
    assert verdict(TRAMPOLINE, SIPI) == COMMIT
    assert verdict(TRAMPOLINE, SIPI, vector=9) == DENY
    assert verdict(LOW, SIPI, vector=9) == COMMIT, "the page itself is judged when it is fetched"


@pytest.mark.parametrize(
    ("violation", "action"),
    [
        (Violation.GP, DENY),
        (Violation.SKIP, SKIP),
        (Violation.LOG, COMMIT),
        (Violation.HALT, vcpu_pb2.ACTION_HALT),
        (Violation.RESET, vcpu_pb2.ACTION_RESET),
    ],
)
def test_a_refusal_does_what_the_policy_says(violation: Violation, action: int) -> None:
    startup = vcpu_pb2.Startup(target_vp=1, kind=INIT)
    resolution = judge_startup(Rules(startup=StartupRule(violation)), World(), startup).resolution
    assert resolution.action == action
    assert resolution.HasField("exception") == (violation is Violation.GP), "the sender is told"


def test_a_context_must_hold_every_pin() -> None:
    rules = Rules(registers=pinned().registers, startup=TRAMPOLINE)
    startup = vcpu_pb2.Startup(target_vp=1, kind=CONTEXT, context=good())
    assert judge_startup(rules, World(), startup).allowed
    startup.context.registers.cr4 = 0
    assert judge_startup(rules, World(), startup).rule == "cr4"


words = st.integers(0, (1 << 64) - 1)


@given(words, words, words)
def test_set_pins_are_what_lacks_and_nothing_of_the_mode(cr0: int, cr4: int, efer: int) -> None:
    rules = pinned()
    state = good()
    state.registers.cr0, state.registers.cr4, state.registers.efer = cr0, cr4, efer
    state.msrs.add(index=Msr.EFER, value=efer)
    after = pinned_state(rules, state)
    changes = {value.name: value.value for value in with_pins(rules, state)}
    names = ((CR0, cr0, after.registers.cr0), (CR4, cr4, after.registers.cr4), (EFER, efer, after.registers.efer))
    for name, before, now in names:
        assert changes.get(name, before) == now == kept(rules, name, before)
    assert (cr0 ^ after.registers.cr0) & (Cr0.PE | Cr0.PG) == 0
    assert after.registers.cr4 & (Cr4.SMEP | Cr4.VMXE) == Cr4.SMEP
    assert after.registers.efer & Efer.NXE
    load = vcpu_pb2.StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END, state=after)
    assert judge_state(rules, World(), load).allowed == bool(cr0 & Cr0.PG)


def test_a_register_without_a_rule_is_left_alone() -> None:
    rules = Rules(registers={CR4: ValueRule("cr4", Violation.GP, frozen_mask=1)})
    assert kept(rules, registers_pb2.REGISTER_NAME_CR0, 5) == 5
    assert with_pins(rules, good()) == []
