"""Each design with the real guest: what it promises holds, and what its authors left open is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.waiting import wait_until
from vtlab.client import Lab, Machine
from vtlab.client.driver import READY, GuestFault
from vtlab.client.filters import pinning
from vtlab.errors import TimedOut, WrongState
from vtlab.v1.vmm_pb2 import FILTER_ANSWER_REPLACE, UserspaceFilters
from vtlab.x86.registers import Cr0, Cr4
from vtlab_attacks.evidence import Outcome
from vtlab_attacks.guest import RAM, Guest, boot, kernel_symbols
from vtlab_attacks.requests import PIN, STAND_DOWN, TRANSITION_ATTACKS, Ring
from vtlab_attacks.state import register
from vtlab_attacks.table import ATTACKS

EINVAL, ENOSYS, EPERM = -22, -1000, -1
LOCK_CR, PROTECT_MEMORY = 13, 14
BY_NAME = {attack.name: attack for attack in [*ATTACKS, *TRANSITION_ATTACKS]}
DESIGNS = ("none", "heki-v2", "heki-v3", "cr-filter", "mmio-device", "vtl")


def attack(guest: Guest, name: str) -> Outcome:
    outcome: Outcome = BY_NAME[name].run(guest.machine, guest.driver, guest.symbols).outcome
    return outcome


def kvm(guest: Guest, number: int, *arguments: int) -> int:
    """A KVM hypercall by the guest's kernel; RAX, signed."""
    value: int = guest.driver.call(guest.symbols["kvm_hypercall"], number, *arguments)
    return value - (1 << 64 if value >> 63 else 0)


@contextmanager
def heki(lab: Lab, **options: str) -> Iterator[Machine]:
    """A guest that has locked its registers, on a machine with options."""
    with lab.create(
        kernel_symbols().image, ram=RAM, command_line="protect=heki-v3", design="heki-v3", design_options=options
    ) as machine:
        machine.start()
        machine.wait_serial(READY, timeout=30)
        yield machine


# Design -> attacks that its promise is about, and attacks that its authors say nothing against.
PROMISES = {
    "none": ((), ("cr0-wp", "cr4-smep", "cr4-umip", "msr-lstar", "text-write", "text-dma", "cr3-forged")),
    "heki-v3": (("cr0-wp", "cr4-smep", "cr4-umip"), ("msr-lstar", "efer-nxe", "text-write", "debugger-cr4")),
    "heki-v2": (("cr0-wp", "cr4-smep", "text-write"), ("msr-lstar", "cr3-forged", "text-dma")),
    "cr-filter": (("cr0-wp", "cr4-smep", "msr-lstar", "efer-nxe"), ("text-write", "idt-gate", "cr3-forged")),
    "mmio-device": (("cr0-wp", "cr4-smep", "msr-lstar", "text-write"), ("cr3-forged", "vtl1-read")),
}
PAIRS = [
    pytest.param(design, name, outcome, id=f"{design}-{name}")
    for design, (held, open_) in PROMISES.items()
    for names, outcome in ((held, Outcome.BLOCKED), (open_, Outcome.SUCCEEDED))
    for name in names
]


@pytest.mark.parametrize(("design", "name", "outcome"), PAIRS)
def test_promises_and_holes(lab: Lab, design: str, name: str, outcome: Outcome) -> None:
    with boot(lab, True, design=design) as guest:
        assert attack(guest, name) is outcome


@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "vtl"])
def test_only_vtl_has_hyperv(lab: Lab, design: str) -> None:
    with boot(lab, True, design=design) as guest:
        assert not guest.machine.info().vtl1_enabled
        assert kvm(guest, 0x11) == ENOSYS


def test_a_kernel_pins_itself_and_its_own_mov_passes_by(lab: Lab) -> None:
    with boot(lab, True, design="none") as guest:
        before = register(guest.machine, "cr4")
        guest.driver.control(4, before & ~Cr4.SMEP)
        assert register(guest.machine, "cr4") == before
        assert "pinned CR4 bits changed: 0x100000" in guest.machine.wait_serial("bits changed: 0x100000")
        guest.driver.control(0, register(guest.machine, "cr0") & ~Cr0.WP)
        assert register(guest.machine, "cr0") & Cr0.WP
        guest.driver.call(guest.symbols["write_cr4"], before & ~Cr4.SMEP)
        assert not register(guest.machine, "cr4") & Cr4.SMEP


# ------------------------------------------------------------------------------------------------------------- Heki


def test_heki_hypercalls_of_a_real_guest(lab: Lab) -> None:
    with boot(lab, False, design="heki-v3") as guest:
        assert kvm(guest, LOCK_CR, 0, 0, 1) == 1
        assert kvm(guest, LOCK_CR, 0, 0, 3) == EINVAL
        assert kvm(guest, LOCK_CR, 4, int(Cr4.TSD)) == EINVAL
        assert kvm(guest, PROTECT_MEMORY, 0x1000) == ENOSYS
        before = register(guest.machine, "cr4")
        guest.driver.call(guest.symbols["gadget_mov_cr4"], before & ~Cr4.UMIP)  # nothing is pinned yet
        assert kvm(guest, LOCK_CR, 4, int(Cr4.SMEP)) == 0
        with pytest.raises(GuestFault, match=r"#GP\(0x0\)"):
            guest.driver.call(guest.symbols["gadget_mov_cr4"], before & ~Cr4.SMEP)
        guest.driver.call(guest.symbols["gadget_mov_cr4"], before & ~Cr4.SMAP)


def test_heki_refuses_user_code(lab: Lab) -> None:
    """VMMCALL at CPL3 does not fault: it fails with -KVM_EPERM."""
    with boot(lab, False, design="heki-v3") as guest:
        code = bytes.fromhex("b80d000000 bb04000000 b900001000 31d2 0f01d9 c3")  # LOCK_CR_UPDATE(4, SMEP, 0)
        at = guest.symbols["user_payload"]
        guest.machine.write_memory(guest.machine.translate(at).gpa, code)
        assert guest.driver.user(at) - (1 << 64) == EPERM
        guest.driver.call(guest.symbols["gadget_mov_cr4"], register(guest.machine, "cr4") & ~Cr4.SMEP)


def test_heki_on_amd_checks_nothing(lab: Lab) -> None:
    options = {"vendor": "amd"}
    symbols = kernel_symbols()
    with lab.create(
        symbols.image, ram=RAM, command_line="protect=heki-v3", design="heki-v3", design_options=options
    ) as vm:
        vm.start()
        assert "CR4 locked" in vm.wait_serial(READY, timeout=30)
        from vtlab.client.driver import Driver

        Driver(vm).call(symbols["gadget_mov_cr4"], register(vm, "cr4") & ~Cr4.SMEP)
        assert not register(vm, "cr4") & Cr4.SMEP


def test_heki_tells_userspace_which_has_no_say(lab: Lab) -> None:
    options = {"configure": "3", "denial": "3"}
    symbols = kernel_symbols()
    with lab.create(
        symbols.image, ram=RAM, command_line="protect=heki-v3", design="heki-v3", design_options=options
    ) as vm:
        vm.start()
        vm.wait_serial(READY, timeout=30)
        from vtlab.client.driver import Driver

        wanted = register(vm, "cr4") & ~Cr4.SMEP
        with pytest.raises(GuestFault):
            Driver(vm).call(symbols["gadget_mov_cr4"], wanted)
        told = [event.userspace_exit for event in vm.events(("userspace_exit",), until_now=True)]
        assert [one.WhichOneof("run") for one in told] == ["heki_configure"] * 2 + ["heki_denial"]
        assert [one.heki_configure.value for one in told[:2]] == [Cr0.WP, Cr4.SMEP | Cr4.SMAP | Cr4.UMIP]
        assert (told[2].heki_denial.reason, told[2].heki_denial.value) == (2, wanted)


def test_heki_pins_outlive_a_reset_and_the_guest_does_not(lab: Lab) -> None:
    """The kernel's first MOV to CR4 lacks the pinned bits and takes #GP before there is anybody to handle it."""
    with boot(lab, True, design="heki-v3") as guest:
        log = guest.machine.serial_reader(0, from_now=True)
        guest.machine.reset()
        wait_until(lambda: guest.machine.info().generation > 4, 60, "the guest resets itself again and again")
        assert "triple fault" in guest.machine.info().reason
        guest.machine.stop()
        with pytest.raises((TimedOut, WrongState)):  # it ended without a word
            log.read_until("selfguard", 0.1)


@pytest.mark.parametrize("design", ["none", "cr-filter", "mmio-device", "vtl"])
def test_other_designs_live_through_a_reset(lab: Lab, design: str) -> None:
    with boot(lab, True, design=design) as guest:
        log = guest.machine.serial_reader(0, from_now=True)
        guest.machine.reset()
        log.read_until(READY, 30)
        expected = Outcome.SUCCEEDED if design == "none" else Outcome.BLOCKED
        assert attack(guest, "cr4-smep") is expected


# -------------------------------------------------------------------------------------------------------- cr-filter


def test_an_owner_changes_its_filter_while_the_guest_runs(lab: Lab) -> None:
    with boot(lab, False, design="cr-filter") as guest:
        mov, before = guest.symbols["gadget_mov_cr4"], register(guest.machine, "cr4")
        guest.driver.call(mov, before & ~Cr4.SMEP)
        guest.driver.call(mov, before)
        guest.machine.set_filters(pinning())
        with pytest.raises(GuestFault, match=r"#GP\(0x0\)"):
            guest.driver.call(mov, before & ~Cr4.SMEP)
        guest.machine.set_filters(pinning(FILTER_ANSWER_REPLACE))
        guest.driver.call(mov, before & ~Cr4.SMEP & ~Cr4.PGE)
        assert register(guest.machine, "cr4") == before & ~Cr4.PGE
        told = [event.userspace_exit.wrcr for event in guest.machine.events(("userspace_exit",), until_now=True)]
        assert [(one.index, one.error) for one in told] == [(4, 1), (4, 0)]
        assert told[1].replaced == before & ~Cr4.PGE
        guest.machine.set_filters(UserspaceFilters())
        guest.driver.call(mov, before & ~Cr4.SMEP)
        assert not register(guest.machine, "cr4") & Cr4.SMEP


# ------------------------------------------------------------------------------------------------------ mmio-device


def test_user_code_pins_by_delegation_and_nothing_else(lab: Lab) -> None:
    with boot(lab, True, design="mmio-device") as guest:
        ring = Ring(guest.machine, guest.symbols)
        mov, before = guest.symbols["gadget_mov_cr4"], register(guest.machine, "cr4")
        guest.driver.call(mov, before ^ Cr4.PGE)
        guest.driver.call(mov, before)
        guest.driver.user(guest.symbols["user_doorbell"], ring.place(4, int(Cr4.PGE), action=PIN))
        assert ring.status() == ""
        with pytest.raises(GuestFault):
            guest.driver.call(mov, before ^ Cr4.PGE)
        assert attack(guest, "delegated-action-beyond-delegation") is Outcome.BLOCKED


def test_a_jump_to_the_doorbell_that_may_ask_is_obeyed(lab: Lab) -> None:
    """Restriction is by address: whoever can choose where the kernel goes on has the rights of that address."""
    with boot(lab, True, design="mmio-device") as guest:
        ring = Ring(guest.machine, guest.symbols)
        guest.driver.call(guest.symbols["guard_doorbell"], ring.place(1, action=STAND_DOWN))
        assert ring.status() == ""
        assert attack(guest, "cr4-smep") is Outcome.SUCCEEDED
