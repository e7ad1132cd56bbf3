"""A machine check -> whether VTL0 hears of it, or what becomes of the machine. Pure.

Memory that VTL0 can read is VTL0's to give up. What VTL1 alone holds is not: nobody knows what its keys and rules are
worth once a page of them is bad, so the machine does not go on.
"""

from __future__ import annotations

from vtl1_monitor import rights
from vtl1_monitor.judge import Verdict
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.schema import StateViolation
from vtlab.v1 import vcpu_pb2

POISON = "poison"
"""The rule of the policy's lifecycle."""
_ADDRESS_VALID = 1 << 58
_ACTIONS = {StateViolation.RESET: vcpu_pb2.ACTION_RESET, StateViolation.HALT: vcpu_pb2.ACTION_HALT}


def judge_poison(rules: Rules, code: int | None, error: vcpu_pb2.MachineCheck) -> Verdict:
    """:param code: of the page at the error's address (vtl1_monitor.rights); None if it is not RAM."""
    if not error.status & _ADDRESS_VALID or code is None:
        return _verdict(vcpu_pb2.ACTION_COMMIT, "no address in RAM: VTL0's to deal with")
    if code & rights.STORE_MASK == rights.PRIVATE:
        return _verdict(_ACTIONS[rules.lifecycle.poison], f"memory of VTL1 at {error.address:#x} is bad")
    return _verdict(vcpu_pb2.ACTION_COMMIT, f"VTL0's to deal with, at {error.address:#x}")


def _verdict(action: vcpu_pb2.Action.ValueType, reason: str) -> Verdict:
    return Verdict(vcpu_pb2.Resolution(action=action, reason=f"machine check: {reason}"), POISON)
