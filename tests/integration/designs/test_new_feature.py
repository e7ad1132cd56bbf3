"""What a new feature costs: pins for a CR4 bit and an MSR that the hypervisor's side has never heard of.

The processes of the laboratory are the same from the first line to the last; what changes is told by each test.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmm.launcher import LocalLab
from vtlab.client import Lab, Machine
from vtlab.client.driver import READY, Driver, GuestFault
from vtlab.client.filters import deny_writes, pinning
from vtlab.errors import Refused
from vtlab.v1.vmm_pb2 import FilterRule
from vtlab.x86.registers import Cr4
from vtlab_attacks.guest import RAM, boot, kernel_symbols
from vtlab_attacks.state import msr, register

BIT, INDEX = Cr4.TSD, 0xC0010015  # AMD's HWCR
EINVAL = -22
OLD_POLICY = """
version: 1
name: what is known today
registers:
  cr4: {must_be_1: [SMEP, SMAP]}
"""
NEW_POLICY = f"""
version: 1
name: one line and one MSR more
registers:
  cr4: {{must_be_1: [SMEP, SMAP, {BIT.name}]}}
msrs:
  "{INDEX:#x}": frozen
"""


def pids(lab: Lab) -> dict[str, int]:
    assert isinstance(lab, LocalLab)
    return dict(lab.pids)


def feature_is_used(machine: Machine, driver: Driver) -> int:
    """The guest turns the new feature on; CR4 then."""
    symbols = kernel_symbols()
    driver.call(symbols["gadget_mov_cr4"], register(machine, "cr4") | BIT)
    driver.call(symbols["wrmsr"], INDEX, 7)
    return int(register(machine, "cr4"))


def attack(machine: Machine, driver: Driver) -> tuple[bool, bool]:
    """Whether CR4's bit could be cleared, and the MSR be changed, as the machine's state has it."""
    symbols = kernel_symbols()
    for function, arguments in (("gadget_mov_cr4", (register(machine, "cr4") & ~BIT,)), ("wrmsr", (INDEX, 9))):
        try:
            driver.call(symbols[function], *arguments)
        except GuestFault:
            continue
    return not register(machine, "cr4") & BIT, msr(machine, INDEX) == 9


def test_vtl_needs_a_policy(lab: Lab) -> None:
    """Text for VTL1; the VMM and the guest's process do not change, nor does the guest stop."""
    before, names = pids(lab), []
    outcomes = []
    for policy in (OLD_POLICY, NEW_POLICY):
        with lab.create(kernel_symbols().image, ram=RAM, command_line="heki=0") as machine:
            machine.start()
            machine.wait_serial(READY, timeout=30)
            driver = Driver(machine)
            feature_is_used(machine, driver)
            lab.policy.set(machine, policy)
            machine.guard()
            names.append(machine.info().generation)
            outcomes.append(attack(machine, driver))
            driver.ping()
            if policy is NEW_POLICY:
                with pytest.raises(Refused):
                    machine.set_registers({"cr4": register(machine, "cr4") & ~BIT})
    assert outcomes == [(True, True), (False, False)]
    assert names == [1, 1]
    assert pids(lab) == before


def test_heki_needs_another_host(lab: Lab) -> None:
    """The guest asks, and the answer is EINVAL: the mask of bits is the host's, and MSRs have no call."""
    with boot(lab, True, design="heki-v3") as guest:
        feature_is_used(guest.machine, guest.driver)
        call = guest.symbols["kvm_hypercall"]
        for number, pin in ((4, int(BIT)), (INDEX, 7)):
            assert guest.driver.call(call, 13, number, pin) - (1 << 64) == EINVAL
        assert attack(guest.machine, guest.driver) == (True, True)


def test_cr_filter_needs_its_owner(lab: Lab) -> None:
    """KVM does not change. Userspace has to: nothing that the guest does reaches its filter."""
    with boot(lab, True, design="cr-filter") as guest:
        feature_is_used(guest.machine, guest.driver)
        assert attack(guest.machine, guest.driver) == (True, True)
        feature_is_used(guest.machine, guest.driver)
        filters = pinning()
        filters.msr.ranges.extend(deny_writes(INDEX).ranges)
        filters.rules.add(name="new bit", index=4, stays_set=int(BIT))
        filters.rules.append(FilterRule(name="new MSR", msr=True, index=INDEX, frozen_once_set=True))
        guest.machine.set_filters(filters)
        assert attack(guest.machine, guest.driver) == (False, False)


def test_the_vmm_has_never_heard_of_it() -> None:
    """Nothing of the VMM names the MSR, and none of its designs the bit."""
    source = Path(__file__).resolve().parents[3] / "vmm"
    files = {path: path.read_text() for path in source.rglob("*.py")}
    assert len(files) > 50
    msr_named = re.compile(rf"HWCR|{INDEX:x}|{INDEX:_x}", re.IGNORECASE)
    assert [path.name for path, text in files.items() if msr_named.search(text)] == []
    bit_named = re.compile(rf"\b{BIT.name}\b")
    assert [path.name for path, text in files.items() if path.parent.name == "designs" and bit_named.search(text)] == []
