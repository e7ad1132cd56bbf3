"""What VTL1 says of a state that a vCPU is about to load by RSM. Pure."""

from __future__ import annotations

from vtl1_monitor.judge import Verdict
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import StateViolation
from vtl1_monitor.state_judge import StateFacts, judge_state
from vtlab.v1 import vcpu_pb2

SMBASE = "smbase"
"""The rule that SMBASE stays where it is while VTL1 is enabled."""

UNKNOWN = "unknown state load"

_ACTIONS = {
    StateViolation.RESET: vcpu_pb2.ACTION_RESET,
    StateViolation.HALT: vcpu_pb2.ACTION_HALT,
}


def judge_load(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Verdict:
    """COMMIT if every pin holds; else what the policy's lifecycle says, by the name of the pin. Never raises."""
    if load.cause != vcpu_pb2.STATE_LOAD_CAUSE_RSM or not load.HasField("before"):
        return _refused(rules, UNKNOWN, "a state is loaded by nothing that VTL1 knows")
    if load.smbase != load.smbase_before:
        return _refused(rules, SMBASE, f"{SMBASE}: {load.smbase_before:#x} -> {load.smbase:#x}")
    verdict = judge_state(rules, facts, load)
    return verdict if verdict.allowed else _refused(rules, verdict.rule, verdict.resolution.reason)


def _refused(rules: Rules, rule: str, reason: str) -> Verdict:
    action = _ACTIONS[rules.lifecycle.rsm_violation]
    return Verdict(vcpu_pb2.Resolution(action=action, reason=f"RSM: {reason}"), rule)
