"""S3 where the policy has the kernel's own code wake (`s3: verify`): falling asleep, the vector, the way out. Pure.

write of the sleep register -> COMMIT if the FACS names the first byte of the waking code, else nothing happens
waking                      -> the waking code and no other, if the vector is still that and the sealed state holds
fetch from anywhere else    -> COMMIT if every pin holds, by what was held before; else RESET
"""

from __future__ import annotations

from vtl1_monitor.judge import Verdict
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import SleepMode
from vtl1_monitor.state_judge import StateFacts, judge_state
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import registers_pb2, vcpu_pb2

SLEEP = "s3"
"""The rule of the policy's lifecycle."""


def judge_sleep(rules: Rules, sleep: vcpu_pb2.Sleep) -> Verdict:
    """COMPLETE: the machine does not sleep, and VTL0 goes on behind the write."""
    mode = rules.lifecycle.s3
    if mode is SleepMode.REFUSE:
        return _verdict(vcpu_pb2.ACTION_COMPLETE, "refused")
    wanted = _start(rules)
    if mode is SleepMode.VERIFY and sleep.waking_vector != wanted:
        return _verdict(vcpu_pb2.ACTION_COMPLETE, f"waking vector {sleep.waking_vector:#x} is not {wanted:#x}")
    return Verdict(vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT, reason="S3: the machine may sleep"), "")


def judge_wake(rules: Rules, facts: StateFacts, load: vcpu_pb2.StateLoad) -> Verdict:
    """Before the first instruction: `before` is the state that was sealed, `state` that of the vector."""
    if not load.HasField("before"):
        return _verdict(vcpu_pb2.ACTION_RESET, "nobody knows the state before")
    registers = load.state.registers
    vector, wanted = registers.cs.base + registers.rip, _start(rules)
    if rules.waking is None or vector != wanted:
        return _verdict(vcpu_pb2.ACTION_RESET, f"waking vector {vector:#x} is not {wanted:#x}")
    held = _judged(rules, facts, load.before, load.before)
    if not held.allowed:
        return held
    return _verdict(vcpu_pb2.ACTION_COMMIT, f"the code at {vector:#x} wakes, and no other runs until every pin holds")


def judge_awake(
    rules: Rules, facts: StateFacts, state: registers_pb2.ProcessorState, sealed: registers_pb2.ProcessorState
) -> Verdict:
    """The first fetch from outside the waking code."""
    verdict = _judged(rules, facts, state, sealed)
    if not verdict.allowed:
        return verdict
    return _verdict(vcpu_pb2.ACTION_COMMIT, "awake, all pins hold")


def window(rules: Rules) -> vcpu_pb2.Update:
    """What may be executed until then."""
    runs = list(rules.waking) if rules.waking is not None else []
    return vcpu_pb2.Update(startup_window=vcpu_pb2.StartupWindow(runs=runs))


def _start(rules: Rules) -> int:
    return rules.waking.first * PAGE_SIZE if rules.waking is not None else 0


def _judged(
    rules: Rules, facts: StateFacts, state: registers_pb2.ProcessorState, sealed: registers_pb2.ProcessorState
) -> Verdict:
    load = vcpu_pb2.StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_WAKE, state=state, before=sealed)
    verdict = judge_state(rules, facts, load)
    if verdict.allowed:
        return verdict
    reason = f"S3: {verdict.resolution.reason}"
    return Verdict(vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_RESET, reason=reason), verdict.rule)


def _verdict(action: vcpu_pb2.Action.ValueType, reason: str) -> Verdict:
    return Verdict(vcpu_pb2.Resolution(action=action, reason=f"S3: {reason}"), SLEEP)
