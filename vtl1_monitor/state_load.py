"""What VTL1 says of a state that a vCPU is about to load: by RSM, or waking from S3. Pure."""

from __future__ import annotations

from vtl1_monitor import sleep_judge
from vtl1_monitor.judge import Verdict
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import SleepMode, StateViolation
from vtl1_monitor.sleep_judge import SLEEP
from vtl1_monitor.state_judge import StateFacts, judge_state
from vtlab.v1 import registers_pb2, vcpu_pb2

SMBASE = "smbase"
"""The rule that SMBASE stays where it is while VTL1 is enabled."""

UNKNOWN = "unknown state load"

_ACTIONS = {
    StateViolation.RESET: vcpu_pb2.ACTION_RESET,
    StateViolation.HALT: vcpu_pb2.ACTION_HALT,
}


def judge_load(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Verdict:
    """COMMIT if every pin holds; else what the policy's lifecycle says, by the name of the pin. Never raises.

    COMMIT of a vCPU that wakes is for what `woken` does.
    """
    if load.cause == vcpu_pb2.STATE_LOAD_CAUSE_WAKE:
        return _wake(rules, facts, load)
    if load.cause != vcpu_pb2.STATE_LOAD_CAUSE_RSM or not load.HasField("before"):
        return _refused(rules, UNKNOWN, "a state is loaded by nothing that VTL1 knows")
    if load.smbase != load.smbase_before:
        return _refused(rules, SMBASE, f"{SMBASE}: {load.smbase_before:#x} -> {load.smbase:#x}")
    verdict = judge_state(rules, facts, load)
    return verdict if verdict.allowed else _refused(rules, verdict.rule, verdict.resolution.reason)


def _wake(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Verdict:
    reset = vcpu_pb2.ACTION_RESET
    if rules.lifecycle.s3 is SleepMode.VERIFY:
        return sleep_judge.judge_wake(rules, facts, load)
    if rules.lifecycle.s3 is not SleepMode.RESTORE:
        return Verdict(vcpu_pb2.Resolution(action=reset, reason="S3: the policy lets nobody wake"), SLEEP)
    sealed = vcpu_pb2.StateLoad(cause=load.cause, state=load.before, before=load.before)
    verdict = judge_state(rules, facts, sealed)
    if not load.HasField("before") or not verdict.allowed:
        reason = f"S3: {verdict.resolution.reason}"
        return Verdict(vcpu_pb2.Resolution(action=reset, reason=reason), verdict.rule or SLEEP)
    reason = "S3: the sealed state is loaded; the waking vector is not run"
    return Verdict(vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason), SLEEP)


def woken(rules: Rules, load: vcpu_pb2.StateLoad) -> vcpu_pb2.Update:
    """How a vCPU that may wake goes on: back where it fell asleep, or by the waking code alone.

    MSRs but EFER have kept their values.
    """
    if rules.lifecycle.s3 is SleepMode.VERIFY:
        return sleep_judge.window(rules)
    state = registers_pb2.ProcessorState()
    state.CopyFrom(load.before)
    del state.msrs[:]
    return vcpu_pb2.Update(start_processor=vcpu_pb2.StartProcessor(state=state))


def _refused(rules: Rules, rule: str, reason: str) -> Verdict:
    action = _ACTIONS[rules.lifecycle.rsm_violation]
    return Verdict(vcpu_pb2.Resolution(action=action, reason=f"RSM: {reason}"), rule)
