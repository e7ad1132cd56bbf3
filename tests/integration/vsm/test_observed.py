"""A policy observes the guest's own VTL1: its registers, its MSRs, what its hypercalls change; three real processes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from tests.integration.vsm import guest
from vtlab.client import Lab, Machine
from vtlab.errors import BadPolicy, Refused, WrongState
from vtlab.hyperv.status import HvStatus
from vtlab.v1 import monitor_pb2, vcpu_pb2, vmm_pb2
from vtlab.x86.registers import Cr4

STOPPED = vmm_pb2.MACHINE_STATE_STOPPED
TIMEOUT = 120.0
TSD = int(Cr4.TSD)
POLICY = f"""
version: 1
name: observed
registers: {{cr4: {{must_be_0: [TSD]}}}}
msrs: {{LSTAR: frozen}}
memory:
  - {{name: secret, gpa: {guest.SECRET:#x}, size: 0x1000, access: ---}}
violation: {{default: VIOLATION}}
"""
Verdicts = list[monitor_pb2.WatchVerdictsResponse]
Run = Callable[..., tuple[Machine, str]]


@pytest.fixture
def run(lab: Lab) -> Iterator[Run]:
    """Boots a guest under a policy and waits for its end; gives the machine and why it stopped."""
    made: list[Machine] = []

    def boot(violation: str, later: str = "", first: str = "") -> tuple[Machine, str]:
        machine = guest.create(lab, guest.assemble(guest.CALLS_AGAIN, above=first, later=later))
        made.append(machine)
        lab.policy.set(machine, POLICY.replace("VIOLATION", violation))
        machine.start()
        end = machine.wait_state(STOPPED, timeout=TIMEOUT)
        return machine, "" if end.debug_exit == 0x2A else end.reason

    yield boot
    for machine in made:
        machine.destroy()


def by_rule(lab: Lab, machine: Machine, rule: str) -> Verdicts:
    return [verdict for verdict in lab.policy.verdicts_so_far(machine) if verdict.rule == rule]


def seen(machine: Machine, address: int = guest.SEEN + 80) -> int:
    (value,) = struct.unpack("<Q", machine.read_memory(address, 8))
    return int(value)


CONSEQUENCES = [
    ("gp", vcpu_pb2.ACTION_DENY, False, 1),
    ("skip", vcpu_pb2.ACTION_SKIP, False, 0),
    ("log", vcpu_pb2.ACTION_COMMIT, True, 0),
]


@pytest.mark.parametrize(("violation", "action", "happens", "faults"), CONSEQUENCES)
def test_a_pin_of_vtl1s_own_cr4(
    lab: Lab, run: Run, violation: str, action: vcpu_pb2.Action.ValueType, happens: bool, faults: int
) -> None:
    machine, reason = run(violation, guest.SETS_TSD)
    assert reason == ""
    assert bool(seen(machine) & TSD) is happens
    assert seen(machine, guest.GP_COUNT) & 0xFFFF_FFFF == faults
    (verdict,) = by_rule(lab, machine, "cr4")
    assert (verdict.exit.vtl, verdict.resolution.action) == (1, action)
    assert verdict.exit.register_write.new_value & TSD


@pytest.mark.parametrize(("violation", "happens"), [("skip", False), ("log", True)])
def test_a_pin_of_vtl1s_own_msr(lab: Lab, run: Run, violation: str, happens: bool) -> None:
    machine, reason = run(violation, guest.WRITES_LSTAR)
    assert reason == ""
    assert (seen(machine) == 0x1000) is happens
    (verdict,) = by_rule(lab, machine, "LSTAR")
    assert (verdict.exit.vtl, verdict.exit.msr.new_value) == (1, 0x1000)


@pytest.mark.parametrize(("violation", "happens"), [("gp", False), ("skip", False), ("log", True)])
def test_vtl1_opens_what_a_rule_seals(lab: Lab, run: Run, violation: str, happens: bool) -> None:
    machine, reason = run(violation, guest.OPENS_SECRET)
    assert reason == ""
    assert seen(machine) & 0xFFFF == (HvStatus.SUCCESS if happens else HvStatus.ACCESS_DENIED)
    (verdict,) = by_rule(lab, machine, "secret")
    assert (verdict.exit.vtl, verdict.resolution.action == vcpu_pb2.ACTION_COMMIT) == (1, happens)
    if happens:
        assert machine.read_memory(guest.SECRET, 8)
    else:
        with pytest.raises(Refused):
            machine.read_memory(guest.SECRET, 8)


@pytest.mark.parametrize(("violation", "status"), [("gp", HvStatus.ACCESS_DENIED), ("log", HvStatus.SUCCESS)])
def test_vtl1_writes_a_pinned_register_of_vtl0(lab: Lab, run: Run, violation: str, status: HvStatus) -> None:
    machine, reason = run(violation, guest.SETS_TSD_OF_VTL0)
    assert reason == ""
    assert seen(machine) & 0xFFFF == status
    (verdict,) = by_rule(lab, machine, "cr4")
    assert (verdict.exit.vtl, verdict.exit.register_write.new_value) == (1, Cr4.PAE | Cr4.TSD)
    assert bool(machine.registers().registers.cr4 & TSD) is (status == HvStatus.SUCCESS)


@pytest.mark.parametrize("later", [guest.SETS_TSD, guest.OPENS_SECRET], ids=["register", "hypercall"])
def test_a_violation_that_halts_ends_vtl1_where_it_is(run: Run, later: str) -> None:
    machine, reason = run("halt", later)
    assert reason.startswith("halted by VTL1: "), reason
    assert seen(machine) == 0, "VTL1 went on behind what it may not do"


def test_vtl1_that_never_satisfied_its_pins_does_not_return(lab: Lab, run: Run) -> None:
    machine, reason = run("halt", first=guest.STARTS_WITH_TSD)
    assert reason.startswith("halted by VTL1: cr4 is "), reason
    assert seen(machine, guest.RESULT + 8) == 0, "VTL0 went on"
    (verdict,) = by_rule(lab, machine, "cr4")
    assert verdict.exit.vtl == 1


def test_what_vtl1_asks_the_hypervisor_is_in_the_log(lab: Lab, run: Run) -> None:
    machine, reason = run("log")
    assert reason == ""
    reasons = [verdict.resolution.reason for verdict in by_rule(lab, machine, "") if verdict.exit.vtl == 1]
    assert reasons.count("hypercall 0x000c") == 2
    assert "hypercall 0x0051" in reasons


def test_the_policy_is_closed_once_vtl1_returned(lab: Lab, run: Run) -> None:
    machine, _ = run("log")
    status = lab.policy.get(machine)
    assert status.source == monitor_pb2.POLICY_SOURCE_OPERATOR
    assert any("cr4" in rule for rule in status.rules)
    with pytest.raises(WrongState):
        lab.policy.set(machine, POLICY.replace("VIOLATION", "gp"))


def test_what_only_a_policy_in_vtl1s_place_can_do_is_refused(lab: Lab) -> None:
    machine = guest.create(lab, guest.assemble(""))
    with pytest.raises(BadPolicy, match="observe"):
        lab.policy.set(machine, "version: 1\nname: guard\npage_tables: {guard: true}\n")
    machine.destroy()
