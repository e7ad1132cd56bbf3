"""An operator guards a machine whose guest never called: the policy holds at once, or nothing changes."""

from __future__ import annotations

from pathlib import Path

from tests.unit.monitor.vtl0 import CR4, Vtl0
from vtlab.services import Service
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4

LINUX = (Path(__file__).parents[3] / "deploy" / "policies" / "linux.yaml").read_text()
MINIMAL = "version: 1\nname: outside\nregisters:\n  cr4: {must_be_1: [SMEP]}\n"


def guard(vtl0: Vtl0, vp_index: int = 0) -> vcpu_pb2.VtlReturn:
    """What the VMM does for an operator; protections are applied."""
    asked = vcpu_pb2.Exit(origin=vcpu_pb2.ORIGIN_CLIENT, registers=vtl0.registers, hypercall=vcpu_pb2.Hypercall())
    exit_ = vtl0.enter(vcpu_pb2.ENTER_REASON_ENABLE, vp_index, registers=vtl0.registers, intercept=asked)
    while exit_.WhichOneof("reason") == "protect":
        for update in exit_.protect.protections:
            vtl0.apply(update)
        exit_ = vtl0.enter(vcpu_pb2.ENTER_REASON_RESUME, vp_index, status=0)
    return exit_.vtl_return


def cr4_write(vtl0: Vtl0, value: int) -> vcpu_pb2.Action.ValueType:
    write = vcpu_pb2.RegisterWrite(name=registers_pb2.REGISTER_NAME_CR4, old_value=CR4, new_value=value)
    return vtl0.intercept(register_write=write).resolution.action


def test_the_operators_policy_holds_at_once_and_the_guest_is_told_nothing(vtl0: Vtl0) -> None:
    vtl0.monitor.set_policy("vm", LINUX, "linux.yaml")
    returned = guard(vtl0)
    assert returned.resolution.action == vcpu_pb2.ACTION_COMMIT
    (update,) = returned.updates
    assert update.intercepts.cr4_mask & Cr4.SMEP
    assert update.intercepts.cr0_mask & Cr0.WP
    assert [row.index for row in update.intercepts.msr_writes] == [0xC0000082]
    assert cr4_write(vtl0, CR4 & ~Cr4.SMEP) == vcpu_pb2.ACTION_DENY
    assert cr4_write(vtl0, CR4 | Cr4.PCE) == vcpu_pb2.ACTION_COMMIT
    status = vtl0.monitor.policy("vm")
    assert status.locked
    assert vtl0.take_policy(MINIMAL).value < 0, "the guest cannot replace it"
    assert vtl0.call(Service.LOCK_REGS).value < 0


def test_rules_of_memory_are_applied_too(vtl0: Vtl0, policy: str) -> None:
    vtl0.monitor.set_policy("vm", policy, "policy")
    assert guard(vtl0).resolution.action == vcpu_pb2.ACTION_COMMIT
    assert vtl0.protects == 0
    assert all(one.matches_image for one in vtl0.monitor.policy("vm").measurements)
    assert any(access.kernel_execute and not access.write for access in vtl0.access.values())


def test_without_an_operators_policy_nothing_happens(vtl0: Vtl0) -> None:
    returned = guard(vtl0)
    assert returned.resolution.action == vcpu_pb2.ACTION_DENY
    assert "no operator's policy" in returned.resolution.reason
    assert not returned.updates
    assert not vtl0.machine.taken


def test_registers_that_are_not_as_the_policy_wants_change_nothing(vtl0: Vtl0) -> None:
    vtl0.monitor.set_policy("vm", LINUX, "linux.yaml")
    vtl0.registers.cr4 &= ~int(Cr4.UMIP)
    returned = guard(vtl0)
    assert returned.resolution.action == vcpu_pb2.ACTION_DENY
    assert "cr4" in returned.resolution.reason
    assert not vtl0.machine.taken
    vtl0.registers.cr4 |= int(Cr4.UMIP)
    assert guard(vtl0).resolution.action == vcpu_pb2.ACTION_COMMIT


def test_a_policy_that_does_not_fit_the_machine_changes_nothing(vtl0: Vtl0) -> None:
    text = MINIMAL + "memory:\n  - {name: absent, section: .absent, access: r--}\n"
    vtl0.monitor.set_policy("vm", text, "policy")
    returned = guard(vtl0)
    assert returned.resolution.action == vcpu_pb2.ACTION_DENY
    assert ".absent" in returned.resolution.reason
    assert not vtl0.machine.taken


def test_the_guests_own_enabling_takes_no_policy(vtl0: Vtl0) -> None:
    vtl0.monitor.set_policy("vm", LINUX, "linux.yaml")
    exit_ = vcpu_pb2.Exit(origin=vcpu_pb2.ORIGIN_VCPU, registers=vtl0.registers, hypercall=vcpu_pb2.Hypercall())
    returned = vtl0.enter(vcpu_pb2.ENTER_REASON_ENABLE, registers=vtl0.registers, intercept=exit_).vtl_return
    assert not returned.updates
    assert not vtl0.machine.taken
