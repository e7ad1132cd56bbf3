"""UPGRADE: a newer policy, signed, in place of the one in force, while VTL0 runs on and every pin stays.

The rules are swapped as a whole by the vCPU whose turn it is, and no other runs again before it has the new filter.
Keys, measurements, modules and guarded tables are handed over as they are. What is sealed does not change.
"""

from __future__ import annotations

import errno

from vtl1_monitor import cms
from vtl1_monitor.module_file import BadModule, split
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.resolve import resolve
from vtl1_monitor.policy.rules import MemoryRule, Rules
from vtl1_monitor.policy.schema import Upgrade
from vtl1_monitor.policy.text import PolicyText, parse
from vtl1_monitor.services.boot import check_registers
from vtl1_monitor.services.call import EKEYREJECTED, Call, Refused
from vtlab.services import MAX_POLICY_SIZE, UPGRADE_HEADER, UPGRADE_MAGIC
from vtlab.v1 import monitor_pb2, registers_pb2, vcpu_pb2

_SIGNATURE_SIZE = 8 << 10


def upgrade(call: Call) -> int:
    """(pa, size). Refused, nothing has changed."""
    machine = call.machine
    if machine.rules.lifecycle.upgrade is not Upgrade.SIGNED or machine.operator_locked:
        raise Refused(errno.EPERM, "this policy cannot be upgraded")
    if not machine.end_of_boot:
        raise Refused(errno.EPERM, "boot has not ended")
    if not 0 < call.second <= MAX_POLICY_SIZE + _SIGNATURE_SIZE:
        raise Refused(errno.EINVAL, f"policy of {call.second} bytes")
    version, text = _verified(call, machine.memory.read(call.first, call.second))
    parsed, rules = _resolved(call, text)
    problem = _difference(machine.rules, rules, len(machine.processors))
    if problem:
        raise Refused(errno.EINVAL, problem)
    check_registers(call, rules)
    for index, msr in rules.msrs.items():
        if msr.written_at_lock:
            call.updates.append(vcpu_pb2.Update(msr=registers_pb2.MsrValue(index=index, value=msr.fixed_value)))
    machine.policy, machine.rules, machine.rules_before_lock = parsed, rules, rules.without_registers()
    machine.policy_version, machine.source = version, monitor_pb2.POLICY_SOURCE_GUEST
    machine.filter_changed()
    reason = f"policy version {version}"
    resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT, reason=reason)
    machine.verdicts.record(call.as_exit(), resolution, "upgrade")
    return 0


def _verified(call: Call, data: bytes) -> tuple[int, bytes]:
    """Version and text. Raises Refused (-EKEYREJECTED), also for a version that is not newer."""
    machine = call.machine
    try:
        signed, signature = split(data)
        cms.verify(signature, signed, machine.kdata.signers())
    except (BadModule, cms.BadSignature) as error:
        raise Refused(EKEYREJECTED, str(error).replace("module", "policy")) from None
    if len(signed) < UPGRADE_HEADER.size:
        raise Refused(EKEYREJECTED, "policy is truncated")
    magic, version = UPGRADE_HEADER.unpack_from(signed)
    if magic != UPGRADE_MAGIC:
        raise Refused(EKEYREJECTED, "what is signed is no policy")
    if version <= machine.policy_version:
        raise Refused(EKEYREJECTED, f"policy version {version} is not newer than {machine.policy_version}")
    return version, signed[UPGRADE_HEADER.size :]


def _resolved(call: Call, text: bytes) -> tuple[PolicyText, Rules]:
    machine, registers = call.machine, call.registers
    translate = machine.memory.translator(cr0=registers.cr0, cr3=registers.cr3, cr4=registers.cr4, efer=registers.efer)
    try:
        parsed = parse(text, "signed policy")
        return parsed, resolve(parsed, machine.image, machine.memory.size, translate)
    except PolicyProblems as error:
        raise Refused(errno.EINVAL, str(error)) from None


def _difference(old: Rules, new: Rules, vp_count: int) -> str:
    """What changes that an upgrade may not: what is sealed or guarded, what each vCPU had to do; "" if nothing."""

    def places(rules: Rules) -> list[tuple[object, ...]]:
        def place(rule: MemoryRule) -> tuple[object, ...]:
            return rule.name, rule.run, rule.code, rule.phase, rule.measured

        return [place(rule) for rule in rules.memory]

    same = (
        ("memory", places(old), places(new)),
        ("memory", (old.default_code, old.default_name), (new.default_code, new.default_name)),
        ("page_tables", old.guard_page_tables, new.guard_page_tables),
        ("registers.cr3", (old.cr3 is None, old.cr3_frozen), (new.cr3 is None, new.cr3_frozen)),
    )
    changed = next((key for key, before, after in same if before != after), "")
    if changed:
        return f"{changed}: an upgrade cannot change it"
    written = [rule.name for index, rule in new.msrs.items() if rule.written_at_lock and old.msrs.get(index) != rule]
    if written and vp_count > 1:
        return f"msrs.{written[0]}: a value can be written on one vCPU only"
    return ""
