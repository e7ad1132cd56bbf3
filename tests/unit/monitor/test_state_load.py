"""RSM: the pin that it would break is named, and the policy says what follows."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import pytest

from vtl1_monitor.policy.rules import Rules, TableRule, ValueRule
from vtl1_monitor.policy.schema import Lifecycle, SleepMode, StateViolation, Violation
from vtl1_monitor.sleep_judge import SLEEP
from vtl1_monitor.state_load import SMBASE, UNKNOWN, judge_load, woken
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.registers_pb2 import ProcessorState
from vtlab.v1.vcpu_pb2 import StateLoad

WP, LSTAR = 1 << 16, 0xC0000082
GP = Violation.GP
RULES = Rules(
    registers={registers_pb2.REGISTER_NAME_CR0: ValueRule("cr0", GP, fixed_mask=WP, fixed_value=WP)},
    msrs={LSTAR: ValueRule("LSTAR", GP, frozen_mask=(1 << 64) - 1)},
    tables={registers_pb2.REGISTER_NAME_IDTR: TableRule("idtr", GP)},
    cr3=TableRule("cr3", GP),
)


class World:
    """Facts: one known root; nothing else is asked."""

    roots: Set[int] = frozenset({0x5000})

    def owner(self, _gfn: int) -> str:
        return ""

    def at_lock(self, name: int) -> int | None:
        raise AssertionError(name)

    def is_sealed(self, _registers: registers_pb2.Registers, gva: int, _size: int) -> bool:
        raise AssertionError(gva)


def held(cr0: int = 0x80000011 | WP, cr3: int = 0x5000, idtr: int = 0x2000, lstar: int = 7) -> ProcessorState:
    state = ProcessorState(xcr0=1)
    state.registers.cr0, state.registers.cr3, state.idtr.base = cr0, cr3, idtr
    state.msrs.add(index=LSTAR, value=lstar)
    return state


def load(after: ProcessorState, smbase: int = 0xA0000) -> StateLoad:
    cause = vcpu_pb2.STATE_LOAD_CAUSE_RSM
    return StateLoad(cause=cause, before=held(), state=after, smbase=smbase, smbase_before=0xA0000)


def test_what_holds_is_loaded() -> None:
    assert judge_load(RULES, World(), load(held())).resolution.action == vcpu_pb2.ACTION_COMMIT
    assert judge_load(RULES, World(), load(held(cr0=0x80000019 | WP))).allowed


@pytest.mark.parametrize(
    ("rule", "state"),
    [("cr0", held(cr0=0x80000011)), ("cr3", held(cr3=0x9000)), ("idtr", held(idtr=8)), ("LSTAR", held(lstar=8))],
)
@pytest.mark.parametrize(
    ("wanted", "action"),
    [(StateViolation.RESET, vcpu_pb2.ACTION_RESET), (StateViolation.HALT, vcpu_pb2.ACTION_HALT)],
)
def test_a_broken_pin_is_named(
    rule: str, state: ProcessorState, wanted: StateViolation, action: vcpu_pb2.Action.ValueType
) -> None:
    rules = replace(RULES, lifecycle=Lifecycle.model_validate({"rsm_violation": wanted.value}))
    verdict = judge_load(rules, World(), load(state))
    assert (verdict.rule, verdict.resolution.action) == (rule, action)
    assert verdict.resolution.reason.startswith(f"RSM: {rule}")


def test_smbase_stays() -> None:
    verdict = judge_load(RULES, World(), load(held(), smbase=0x30000))
    assert (verdict.rule, verdict.resolution.action) == (SMBASE, vcpu_pb2.ACTION_RESET)


@pytest.mark.parametrize("unknown", [StateLoad(), StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_RSM)])
def test_what_nobody_can_compare_is_refused(unknown: StateLoad) -> None:
    verdict = judge_load(Rules(), World(), unknown)
    assert (verdict.rule, verdict.resolution.action) == (UNKNOWN, vcpu_pb2.ACTION_RESET)


def wake(before: ProcessorState) -> StateLoad:
    return StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_WAKE, before=before, state=ProcessorState())


def test_waking_goes_back_to_the_sealed_state() -> None:
    verdict = judge_load(RULES, World(), wake(held()))
    assert (verdict.rule, verdict.resolution.action) == (SLEEP, vcpu_pb2.ACTION_COMMIT)
    state = woken(RULES, wake(held())).start_processor.state
    assert state.registers == held().registers
    assert not state.msrs


@pytest.mark.parametrize("mode", [SleepMode.RESET, SleepMode.REFUSE])
def test_a_policy_without_s3_resets_what_wakes(mode: SleepMode) -> None:
    rules = replace(RULES, lifecycle=Lifecycle.model_validate({"s3": mode.value}))
    assert judge_load(rules, World(), wake(held())).resolution.action == vcpu_pb2.ACTION_RESET


@pytest.mark.parametrize("sealed", [held(cr0=1), held(cr3=0x9000)])
def test_a_sealed_state_must_hold_every_pin(sealed: ProcessorState) -> None:
    assert judge_load(RULES, World(), wake(sealed)).resolution.action == vcpu_pb2.ACTION_RESET
