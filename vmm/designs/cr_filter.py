"""Design `cr-filter`: the owner of the machine decides. KVM tells it of filtered writes and does what it answers.

It is what Christopherson asks for in place of Heki's hypercall (2024-05-03): a generic exit for writes of control
registers that looks like the MSR filter, and MSRs pinned by the MSR filter as it is. KVM knows nothing of pins and the
guest cannot ask for any; what the owner answers is data (UserspaceFilters), which it may replace at any time.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from vmm.board import Answer, Board, complete
from vmm.designs import register_filter
from vmm.designs.heki import record_verdict, tell_userspace
from vmm.designs.native import Native
from vmm.processor import Processor
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2
from vtlab.v1.vcpu_pb2 import Exit, InterceptFilter, Resolution
from vtlab.v1.vmm_pb2 import FilterRule, MachineSpec, RegisterExit, UserspaceExit, UserspaceFilters

_ALL = (1 << 64) - 1
_COMMIT = Resolution(action=vcpu_pb2.ACTION_COMMIT)
_CONTROL = {
    registers_pb2.REGISTER_NAME_CR0: 0,
    registers_pb2.REGISTER_NAME_CR3: 3,
    registers_pb2.REGISTER_NAME_CR4: 4,
}
_GP = vmm_pb2.FILTER_ANSWER_GENERAL_PROTECTION
_ALLOW = vmm_pb2.FILTER_ANSWER_ALLOW
_REPLACE = vmm_pb2.FILTER_ANSWER_REPLACE


class Access(NamedTuple):
    """A filtered access."""

    msr: bool
    register: int
    write: bool
    old: int
    new: int

    @property
    def name(self) -> str:
        return f"MSR {self.register:#x}" if self.msr else f"CR{self.register}"


class Reply(NamedTuple):
    """What userspace answers, and which rule of its said so."""

    answer: vmm_pb2.FilterAnswer.ValueType
    value: int
    rule: str


class CrFilter(Native):
    """Its filters are MachineSpec.filters until VmmService.SetUserspaceFilters replaces them."""

    has_state = True

    def __init__(self, spec: MachineSpec) -> None:
        super().__init__(spec)
        register_filter.check_all(spec.filters)
        self._filters = spec.filters

    def save(self) -> bytes:
        return self._filters.SerializeToString(deterministic=True)

    def restore(self, state: bytes) -> None:
        try:
            self._filters = UserspaceFilters.FromString(state)
        except DecodeError as error:
            raise ValueError(str(error)) from None

    def filter(self) -> InterceptFilter:
        wanted = super().filter()
        filters = self._filters
        denied = register_filter.denied_crs(filters.cr)
        wanted.cr0_mask = _ALL if 0 in denied else 0
        wanted.cr4_mask = _ALL if 4 in denied else 0
        wanted.cr3_writes = 3 in denied
        for index in register_filter.denied_msr_writes(filters.msr):
            wanted.msr_writes.add(index=index, mask=_ALL)
        wanted.msr_reads.extend(register_filter.denied_msr_reads(filters.msr))
        return wanted

    def set_filters(self, board: Board, filters: UserspaceFilters) -> None:
        register_filter.check_all(filters)
        with board.serving:
            self._filters = filters
            board.watch_all(self.filter())

    def reset(self) -> None:
        if not self._filters.keep_on_reset:
            self._filters = UserspaceFilters()

    def intercepted(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        access = _access(exit_)
        if access is None or _passes(self._filters, access):
            return processor.resume(_COMMIT)
        if not self._filters.exit_reasons & register_filter.FILTERED:
            resolution = Resolution(action=vcpu_pb2.ACTION_DENY, reason=f"{access.name}: filtered, no userspace exit")
            record_verdict(board, processor, exit_, resolution)
            return processor.resume(resolution)
        reply = decide(self._filters, access)
        tell_userspace(board, processor, _told(access, reply))
        resolution = _resolution(access, reply)
        record_verdict(board, processor, exit_, resolution)
        return processor.resume(resolution)


def _access(exit_: Exit) -> Access | None:
    kind = exit_.WhichOneof("reason")
    if kind == "msr":
        return Access(True, exit_.msr.index, exit_.msr.write, exit_.msr.old_value, exit_.msr.new_value)
    number = _CONTROL.get(exit_.register_write.name) if kind == "register_write" else None
    if number is None:
        return None
    return Access(False, number, True, exit_.register_write.old_value, exit_.register_write.new_value)


def _passes(filters: UserspaceFilters, access: Access) -> bool:
    if access.msr:
        return register_filter.msr_allowed(filters.msr, access.register, access.write)
    return register_filter.allowed(filters.cr, access.register, write=True)


def decide(filters: UserspaceFilters, access: Access) -> Reply:
    """Userspace's answer, a pure function of its rules; without a rule for the register, `otherwise`."""
    found = False
    value = access.new
    for rule in filters.rules:
        if rule.msr != access.msr or rule.index != access.register:
            continue
        found = True
        if not access.write:
            continue
        wanted = _wanted(rule, access._replace(new=value))
        if wanted == value:
            continue
        if rule.answer == _REPLACE:
            value = wanted
        elif rule.answer != _ALLOW:
            return Reply(_GP, access.new, rule.name)
    if not found:
        return Reply(_ALLOW if filters.otherwise == _ALLOW else _GP, access.new, "otherwise")
    return Reply(_ALLOW if value == access.new else _REPLACE, value, "rules")


def _wanted(rule: FilterRule, access: Access) -> int:
    """The value that the rule would have in place of the new one."""
    if rule.frozen_once_set and access.old:
        return access.old
    set_before = access.old & rule.stays_set
    clear_before = ~access.old & rule.stays_clear
    return (access.new | set_before) & ~clear_before & _ALL


def _told(access: Access, reply: Reply) -> UserspaceExit:
    run = RegisterExit(error=int(reply.answer == _GP), reason=register_filter.FILTERED, index=access.register)
    run.data = access.new if access.write else access.old
    if reply.answer == _REPLACE:
        run.replaced = reply.value
    if not access.msr:
        return UserspaceExit(wrcr=run)
    return UserspaceExit(wrmsr=run) if access.write else UserspaceExit(rdmsr=run)


def _resolution(access: Access, reply: Reply) -> Resolution:
    reason = f"{access.name}: {reply.rule}"
    if reply.answer == _GP:
        return Resolution(action=vcpu_pb2.ACTION_DENY, reason=reason)
    if not access.write:
        return complete(access.old)
    if reply.answer == _REPLACE:
        return Resolution(action=vcpu_pb2.ACTION_REPLACE, value=reply.value, reason=reason)
    return Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason)
