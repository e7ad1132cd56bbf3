'''Rules in Python, for what the policy language cannot say.

They reach the monitor when it is spawned (`ServerConfig.rules`, shipped by the launcher with dill) and never by RPC.
A rule says what must exit, and judges exits after the tables have:

    from vtl1_monitor.api import CodeRule, Machine, deny
    from vtlab.v1 import vcpu_pb2

    class OneWriteOfLstar(CodeRule):
        """LSTAR may be written once after lock."""

        name = "one write of LSTAR"

        def __init__(self):
            self.writes = 0

        def filter(self):
            return vcpu_pb2.InterceptFilter(msr_writes=[vcpu_pb2.MsrFilter(index=0xC0000082, mask=2**64 - 1)])

        def judge(self, exit_, verdict, machine):
            if exit_.WhichOneof("reason") != "msr" or exit_.msr.index != 0xC0000082:
                return None
            self.writes += 1
            return deny("LSTAR was written before") if self.writes > 1 else None

    with launch(rules=[OneWriteOfLstar()]) as lab: ...

One object serves all machines of the monitor; each machine starts with a copy (copy.deepcopy).
'''

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Protocol

from vtl1_monitor.judge import Verdict
from vtlab.errors import BadArgument
from vtlab.v1 import vcpu_pb2

__all__ = ["CodeRule", "Machine", "Verdict", "commit", "deny", "halt", "load_rules", "reset", "skip"]


class Machine(Protocol):
    """What a rule may see."""

    vm: str

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of guest memory that VTL0 can read. Raises vtl1_monitor.memory.GuestFault."""

    def owner(self, gfn: int) -> str:
        """Name of the memory rule of a page, "" if none."""


class CodeRule:
    """Base of rules in code.

    Attributes:
        name: in verdicts.
        may_relax: its resolution also replaces a refusal by the policy; otherwise it can only refuse more.
    """

    name = "code"
    may_relax = False

    def filter(self) -> vcpu_pb2.InterceptFilter:
        """What must exit besides the policy's own filter, from LOCK_REGS on."""
        return vcpu_pb2.InterceptFilter()

    def judge(self, exit_: vcpu_pb2.Exit, verdict: Verdict, machine: Machine) -> vcpu_pb2.Resolution | None:  # noqa: ARG002
        """The resolution, or None to leave `verdict` as it is. Raising denies."""
        return None


def _resolution(action: vcpu_pb2.Action.ValueType, reason: str) -> vcpu_pb2.Resolution:
    return vcpu_pb2.Resolution(action=action, reason=reason)


def commit(reason: str = "") -> vcpu_pb2.Resolution:
    """Do what was judged."""
    return _resolution(vcpu_pb2.ACTION_COMMIT, reason)


def deny(reason: str = "") -> vcpu_pb2.Resolution:
    """#GP(0); nothing happens."""
    return _resolution(vcpu_pb2.ACTION_DENY, reason)


def skip(reason: str = "") -> vcpu_pb2.Resolution:
    """Nothing happens, next instruction."""
    return _resolution(vcpu_pb2.ACTION_SKIP, reason)


def halt(reason: str = "") -> vcpu_pb2.Resolution:
    """The vCPU stays stopped."""
    return _resolution(vcpu_pb2.ACTION_HALT, reason)


def reset(reason: str = "") -> vcpu_pb2.Resolution:
    """The machine is reset."""
    return _resolution(vcpu_pb2.ACTION_RESET, reason)


def load_rules(shipped: Any) -> tuple[CodeRule, ...]:
    """What came with the configuration: None, a rule, or rules. Raises BadArgument for anything else."""
    if shipped is None:
        return ()
    rules = tuple(shipped) if isinstance(shipped, Iterable) else (shipped,)
    for rule in rules:
        if not isinstance(rule, CodeRule):
            raise BadArgument("rules", f"{type(rule).__name__} is not a vtl1_monitor.api.CodeRule")
    return rules


def copies(rules: Iterable[CodeRule]) -> tuple[CodeRule, ...]:
    """Rules for one machine."""
    return tuple(copy.deepcopy(rule) for rule in rules)


# What only makes a guest less able to do things: a rule without `may_relax` may answer these to anything.
STRICTER = frozenset({vcpu_pb2.ACTION_DENY, vcpu_pb2.ACTION_HALT, vcpu_pb2.ACTION_RESET})


def apply(rules: Iterable[CodeRule], exit_: vcpu_pb2.Exit, verdict: Verdict, machine: Machine) -> Verdict:
    """The verdict after all rules in code. A rule that raises denies."""
    for rule in rules:
        try:
            answer = rule.judge(exit_, verdict, machine)
        except Exception as error:  # noqa: BLE001 - somebody else's code: whatever it is, the answer is no
            answer = deny(f"rule raised {type(error).__name__}: {error}")
        if answer is None:
            continue
        if answer.action == vcpu_pb2.ACTION_UNSPECIFIED:
            answer = deny(answer.reason or "rule gave no action")
        if verdict.allowed or rule.may_relax or answer.action in STRICTER:
            verdict = Verdict(answer, rule.name)
    return verdict
