"""An operator's policy that observes guest code at VTL1, one object a vCPU. It holds no state of the machine's own.

It holds from the first VTL return on: until then VTL1 sets itself up. Registers, MSRs and states are judged as they
exit from VTL1's core, before anybody else sees the exit; what a hypercall would change is judged when the VMM has
decoded it (Hypercall.observed).
"""

from __future__ import annotations

from vtl1_monitor.filter import intercept_filter
from vtl1_monitor.judge import CR3_BASE, REGISTER_ACTION, Verdict
from vtl1_monitor.machine import Machine
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.resolve import resolve
from vtl1_monitor.policy.rules import Rules
from vtl1_monitor.policy.text import PolicyText
from vtlab.errors import WrongState
from vtlab.hyperv.convention import decode_registers
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.v1 import monitor_pb2, registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import Resolution

VTL = 1
ENDINGS = frozenset({vcpu_pb2.ACTION_HALT, vcpu_pb2.ACTION_RESET})
"""Verdicts after which VTL1 executes no instruction."""

_SWITCHES = (int(HypercallCode.VTL_CALL), int(HypercallCode.VTL_RETURN))
_JUDGED = frozenset({"register_write", "msr", "state_load", "sleep", "startup"})
_AT_LOCK = {
    registers_pb2.REGISTER_NAME_CR0: "cr0",
    registers_pb2.REGISTER_NAME_CR4: "cr4",
    registers_pb2.REGISTER_NAME_EFER: "efer",
}


def observable(parsed: PolicyText, machine: Machine) -> Rules:
    """The rules of a policy for guest code. Raises PolicyProblems for what only a policy that is VTL1 can do."""
    rules = resolve(parsed, machine.image, machine.memory.size, None)
    model = parsed.model
    wanted = {
        "page_tables": rules.guard_page_tables is not None,
        "registers": rules.cr3 is not None and not rules.cr3_frozen,
        "startup": rules.startup.trampoline,
        "modules": model.modules is not None,
        "patches": model.patches is not None,
        "services": model.services is not None,
        "actions": bool(model.actions),
    }
    message = "VTL1 is the guest's own code: a policy can observe it, and not serve in its place"
    problems = [parsed.problem((key,), message) for key, wants in wanted.items() if wants]
    if problems:
        raise PolicyProblems(parsed.file_name, problems)
    return rules


class Observer:
    """Judges what one vCPU of VTL1 does."""

    def __init__(self, machine: Machine, vp_index: int) -> None:
        self._machine = machine
        self._vp_index = vp_index
        self._updates: list[vcpu_pb2.Update] = []
        self._watched: frozenset[int] = frozenset()

    @property
    def present(self) -> bool:
        """There is a policy."""
        return self._machine.override is not None

    @property
    def in_force(self) -> bool:
        """It holds."""
        return self._machine.taken

    def take_updates(self) -> list[vcpu_pb2.Update]:
        """What is to be programmed before that vCPU runs again."""
        updates, self._updates = self._updates, []
        return updates

    def judge(self, exit_: vcpu_pb2.Exit) -> Resolution | None:
        """How an exit of VTL1 ends by the policy; None if it is not the policy's, and goes its way."""
        with self._machine.turn:
            if exit_.HasField("hypercall"):
                return self._hypercall(exit_)
            kind = exit_.WhichOneof("reason")
            if kind not in _JUDGED or not self._machine.processors[self._vp_index].locked:
                return None
            if kind == "msr" and not (exit_.msr.write and exit_.msr.index in self._watched):
                return None
            return self._machine.judge(self._vp_index, exit_).resolution

    def judge_change(self, change: vcpu_pb2.Exit) -> Resolution:
        """The verdict on what a hypercall of VTL1 would change. Raises WrongState for an exit of VTL0."""
        if change.vtl != VTL:
            raise WrongState(
                f"vCPU {self._vp_index} of VTL1", f"asked about VTL{change.vtl}, which its own code guards"
            )
        with self._machine.turn:
            return self._machine.judge(self._vp_index, change).resolution

    def _hypercall(self, exit_: vcpu_pb2.Exit) -> Resolution | None:
        request = decode_registers(exit_.registers)
        if request is None:
            return None
        if request.value not in _SWITCHES:
            reason = f"hypercall {request.value & 0xFFFF:#06x}"
            self._machine.verdicts.record(exit_, Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason), "")
        elif request.value == HypercallCode.VTL_RETURN and not self._machine.processors[self._vp_index].locked:
            return self._lock(exit_)
        return None

    # ------------------------------------------------------------------------------------- where it begins to hold

    def _lock(self, exit_: vcpu_pb2.Exit) -> Resolution | None:
        """VTL1 returns for the first time: its pins hold from here on, or the return is refused as their rules say."""
        machine, registers = self._machine, exit_.registers
        if not machine.taken:
            refusal = self._take()
            if refusal is not None:
                machine.verdicts.record(exit_, refusal, "policy")
                return refusal
        verdict = _objection(machine.rules, registers)
        if verdict is not None:
            machine.verdicts.record(exit_, verdict.resolution, verdict.rule)
            if not verdict.allowed:
                return verdict.resolution
        machine.processors[self._vp_index].locked = True
        if machine.rules.cr3 is not None:
            machine.frozen_roots.add(registers.cr3 & CR3_BASE)
        for name, field in _AT_LOCK.items():
            machine.locked_values.setdefault(int(name), getattr(registers, field))
        for index, msr in machine.rules.msrs.items():
            if msr.written_at_lock:
                self._updates.append(vcpu_pb2.Update(msr=registers_pb2.MsrValue(index=index, value=msr.fixed_value)))
        self._program()
        return None

    def _take(self) -> Resolution | None:
        """Makes the operator's text the machine's rules; a text that does not fit the image halts VTL1."""
        machine, text = self._machine, self._machine.override
        assert text is not None
        try:
            rules = observable(text, machine)
        except PolicyProblems as error:
            return Resolution(action=vcpu_pb2.ACTION_HALT, reason=str(error))
        machine.policy, machine.rules, machine.rules_before_lock = text, rules, rules.without_registers()
        machine.source = monitor_pb2.POLICY_SOURCE_OPERATOR
        machine.taken = True
        return None

    def _program(self) -> None:
        """The filter of VTL1's own core: of rules in code, what they want of registers and MSRs."""
        machine = self._machine
        wanted = intercept_filter(machine.rules, machine.roots, (rule.filter() for rule in machine.code_rules))
        wanted.startups, wanted.startup_window = not machine.rules.startup.allowed, False
        wanted.cpuid = wanted.hlt = wanted.invlpg = False
        del wanted.ports[:], wanted.msr_reads[:]
        self._watched = frozenset(row.index for row in wanted.msr_writes)
        self._updates.append(vcpu_pb2.Update(intercepts=wanted))


def _objection(rules: Rules, registers: registers_pb2.Registers) -> Verdict | None:
    """The first rule of a control register that VTL1 does not satisfy."""
    for name, field in _AT_LOCK.items():
        rule, value = rules.registers.get(int(name)), getattr(registers, field)
        wrong = (value ^ rule.fixed_value) & rule.fixed_mask if rule is not None else 0
        if rule is not None and wrong:
            reason = f"{rule.name} is {value:#x} when VTL1 returns: bits {wrong:#x} are not as the policy wants"
            return Verdict(Resolution(action=REGISTER_ACTION[rule.violation], reason=reason), rule.name)
    return None
