"""S3 that the kernel's own code ends: the vector, the sealed state, and the state in which the waking code is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.monitor.test_state_load import RULES, WP, World, held
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import Lifecycle
from vtl1_monitor.policy.text import parse
from vtl1_monitor.rights import Run
from vtl1_monitor.sleep_judge import judge_awake, judge_sleep
from vtl1_monitor.state_load import judge_load, woken
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.registers_pb2 import ProcessorState
from vtlab.v1.vcpu_pb2 import Sleep, StateLoad

VECTOR = 0x70000
VERIFIED = replace(
    RULES, lifecycle=Lifecycle.model_validate({"s3": "verify", "waking": "waking code"}), waking=Run(VECTOR >> 12, 1)
)
RESTORED = replace(RULES, lifecycle=Lifecycle())
REFUSED = replace(RULES, lifecycle=Lifecycle.model_validate({"s3": "refuse"}))
COMMIT, COMPLETE, RESET = vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_COMPLETE, vcpu_pb2.ACTION_RESET


def wake(vector: int, before: ProcessorState | None) -> StateLoad:
    load = StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_WAKE, before=before)
    load.state.registers.cs.base, load.state.registers.rip = vector & ~0xF, vector & 0xF
    return load


@pytest.mark.parametrize(
    ("rules", "vector", "action"),
    [
        (RESTORED, 0, COMMIT),
        (REFUSED, VECTOR, COMPLETE),
        (VERIFIED, VECTOR, COMMIT),
        (VERIFIED, VECTOR + 1, COMPLETE),
        (VERIFIED, 0, COMPLETE),
        (replace(VERIFIED, waking=None), VECTOR, COMPLETE),
    ],
)
def test_falling_asleep(rules: Rules, vector: int, action: vcpu_pb2.Action.ValueType) -> None:
    assert judge_sleep(rules, Sleep(waking_vector=vector)).resolution.action == action


def test_the_waking_code_runs_alone() -> None:
    load = wake(VECTOR, held())
    assert judge_load(VERIFIED, World(), load).resolution.action == COMMIT
    assert list(woken(VERIFIED, load).startup_window.runs) == [VECTOR >> 12, 1]


@pytest.mark.parametrize(
    ("vector", "before"),
    [(VECTOR + 2, held()), (0x71000, held()), (VECTOR, None), (VECTOR, held(cr0=1)), (VECTOR, held(cr3=0x9000))],
)
def test_another_vector_or_a_state_that_never_held_is_a_reset(vector: int, before: ProcessorState | None) -> None:
    verdict = judge_load(VERIFIED, World(), wake(vector, before))
    assert verdict.resolution.action == RESET
    assert verdict.resolution.reason.startswith("S3: ")


def test_what_holds_is_awake() -> None:
    assert judge_awake(VERIFIED, World(), held(cr0=0x80000019 | WP), held()).allowed


@pytest.mark.parametrize(
    ("rule", "state"),
    [("cr0", held(cr0=0x80000011)), ("cr3", held(cr3=0x9000)), ("idtr", held(idtr=8)), ("LSTAR", held(lstar=8))],
)
def test_a_broken_pin_is_a_reset_with_its_name(rule: str, state: ProcessorState) -> None:
    verdict = judge_awake(VERIFIED, World(), state, held())
    assert (verdict.rule, verdict.resolution.action) == (rule, RESET)
    assert verdict.resolution.reason.startswith(f"S3: {rule}")


def test_a_null_ldtr_is_one_whatever_its_limit() -> None:
    rules = replace(VERIFIED, tables={registers_pb2.REGISTER_NAME_LDTR: RULES.tables[registers_pb2.REGISTER_NAME_IDTR]})
    sealed, state = held(), held()
    state.ldtr.limit = 0xFFFF
    assert judge_awake(rules, World(), state, sealed).allowed
    state.ldtr.selector = 8
    assert not judge_awake(rules, World(), state, sealed).allowed


HEAD = "version: 1\nname: p\nmemory:\n  - {name: code, gpa: 0x70000, size: 0x1000, access: %s}\nlifecycle: {%s}\n"


@pytest.mark.parametrize(
    ("access", "lifecycle", "key"),
    [
        ("r--", "s3: verify", "lifecycle.s3"),
        ("r--", "s3: verify, waking: other", "lifecycle.waking"),
        ("rw-", "s3: verify, waking: code", "lifecycle.waking"),
        ("---", "s3: verify, waking: code", "lifecycle.waking"),
    ],
)
def test_the_waking_code_is_memory_that_nobody_writes(access: str, lifecycle: str, key: str) -> None:
    with pytest.raises(PolicyProblems) as caught:
        parse(HEAD % (access, lifecycle))
    assert [one.key for one in caught.value.problems] == [key]


@pytest.mark.parametrize("access", ["r--", "r-x"])
def test_a_policy_names_the_waking_code(access: str) -> None:
    assert parse(HEAD % (access, "s3: verify, waking: code")).model.lifecycle.waking == "code"
