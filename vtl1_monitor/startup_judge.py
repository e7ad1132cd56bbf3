"""INIT, SIPI and HvCallStartVirtualProcessor, and the end of the window after SIPI -> what becomes of them. Pure."""

from __future__ import annotations

from vtl1_monitor.judge import Verdict
from vtl1_monitor.policy.rules import Rules, StartupRule
from vtl1_monitor.policy.schema import Violation
from vtl1_monitor.state_judge import StateFacts, judge_state
from vtlab.enums import name_of
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr, Vector

RULE = "startup"
LOW_MEMORY_PAGES = 256
"""Pages below 1 MiB: all that SIPI can name."""

_ACTION: dict[Violation, vcpu_pb2.Action.ValueType] = {
    Violation.GP: vcpu_pb2.ACTION_DENY,
    Violation.SKIP: vcpu_pb2.ACTION_SKIP,
    Violation.LOG: vcpu_pb2.ACTION_COMMIT,
    Violation.HALT: vcpu_pb2.ACTION_HALT,
    Violation.RESET: vcpu_pb2.ACTION_RESET,
}
# Bits that say in which mode the vCPU is: VTL1 cannot set them for it.
_MODE = {
    registers_pb2.REGISTER_NAME_CR0: int(Cr0.PE | Cr0.PG),
    registers_pb2.REGISTER_NAME_CR4: int(Cr4.PAE | Cr4.LA57),
    registers_pb2.REGISTER_NAME_EFER: int(Efer.LME | Efer.LMA),
}
KEPT = tuple(_MODE)
"""Registers whose pins VTL1 can set on a vCPU that starts: INIT clears them."""


def judge_startup(rules: Rules, facts: StateFacts, startup: vcpu_pb2.Startup) -> Verdict:
    """Decides one message that stops or starts a vCPU."""
    kind = name_of(vcpu_pb2.StartupKind, startup.kind).removeprefix("STARTUP_KIND_")
    what = f"startup: {kind} for vCPU {startup.target_vp}"
    if startup.kind == vcpu_pb2.STARTUP_KIND_INIT and startup.target_vp == 0:
        return _verdict(vcpu_pb2.ACTION_COMMIT, f"{what} is a RESET")
    rule = rules.startup
    if rule.allowed:
        return _verdict(vcpu_pb2.ACTION_COMMIT, f"{what} is allowed")
    if not rule.trampoline:
        return _refused(rule, f"{what} is denied")
    if startup.kind == vcpu_pb2.STARTUP_KIND_CONTEXT:
        load = vcpu_pb2.StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END, state=startup.context)
        return judge_state(rules, facts, load)
    sipi = startup.kind == vcpu_pb2.STARTUP_KIND_SIPI
    if not startup.target_parked and sipi:  # the second of the two that kernels send
        return _verdict(vcpu_pb2.ACTION_SKIP, f"{what}, which runs and would ignore it")
    if not startup.target_parked:
        return _refused(rule, f"{what}, which runs")
    if sipi and not rule.covers(startup.vector):
        return _refused(rule, f"{what} at {startup.vector << 12:#x}, which is not the trampoline")
    return _verdict(vcpu_pb2.ACTION_COMMIT, f"{what} is legitimate")


def with_pins(rules: Rules, state: registers_pb2.ProcessorState) -> list[registers_pb2.RegisterValue]:
    """The control registers of a state that lack pinned bits, with them; bits of the processor's mode left out."""
    held = {
        registers_pb2.REGISTER_NAME_CR0: state.registers.cr0,
        registers_pb2.REGISTER_NAME_CR4: state.registers.cr4,
        registers_pb2.REGISTER_NAME_EFER: state.registers.efer,
    }
    result = []
    for name, value in held.items():
        pinned = kept(rules, name, value)
        if pinned != value:
            result.append(registers_pb2.RegisterValue(name=name, value=pinned))
    return result


def kept(rules: Rules, name: int, value: int) -> int:
    """CR0, CR4 or EFER with the bits that the rules fix, those of the processor's mode left out."""
    rule = rules.registers.get(name)
    if rule is None:
        return value
    mask = rule.fixed_mask & ~_MODE[registers_pb2.RegisterName.ValueType(name)]
    return value & ~mask | rule.fixed_value & mask


def pinned_state(rules: Rules, state: registers_pb2.ProcessorState) -> registers_pb2.ProcessorState:
    """The state after `with_pins`."""
    result = registers_pb2.ProcessorState()
    result.CopyFrom(state)
    for name, field in ((KEPT[0], "cr0"), (KEPT[1], "cr4"), (KEPT[2], "efer")):
        setattr(result.registers, field, kept(rules, name, getattr(state.registers, field)))
    del result.msrs[:]
    result.msrs.extend(entry for entry in state.msrs if entry.index != Msr.EFER)
    return result


def _verdict(action: vcpu_pb2.Action.ValueType, reason: str) -> Verdict:
    return Verdict(vcpu_pb2.Resolution(action=action, reason=reason), RULE)


def _refused(rule: StartupRule, reason: str) -> Verdict:
    verdict = _verdict(_ACTION[rule.violation], reason)
    if rule.violation is Violation.GP:  # the instruction that sent it is over, so no fault is the default one
        verdict.resolution.exception.vector = Vector.GP
        verdict.resolution.exception.error_code = 0
    return verdict
