"""VTL1's rules replaced by newer ones while the guest runs on, and attacks on that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vtlab.client.driver import Driver, GuestRefusal
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.services import Service
from vtlab.x86.registers import Cr4
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Transition, observe
from vtlab_attacks.guest import Guest
from vtlab_attacks.kernels import policy
from vtlab_attacks.state import register

SOURCE = "LVBS: no method replaces the secure kernel but a reboot"
# What the newer policy pins and the first does not.
NEWLY_PINNED = Cr4.TSD
STRICTER = {"registers": {"cr4": {"must_be_0": [NEWLY_PINNED.name]}}}
LAXER = {"registers": {"cr4": {"must_be_1": ["UMIP"]}}}


def hand_over(machine: Machine, driver: Driver, symbols: Symbols, data: bytes) -> None:
    """The guest calls UPGRADE with it. Raises GuestRefusal, GuestFault."""
    place = symbols.physical("driver_mailbox")
    machine.write_memory(place, data)
    driver.vtl(Service.UPGRADE, place, len(data))


def may_set(machine: Machine, driver: Driver, bit: Cr4) -> bool:
    """Whether CR4 takes the bit, by the kernel's way; it is cleared again."""
    before = register(machine, "cr4")
    try:
        driver.control(4, before | bit)
    except GuestRefusal:
        return False
    taken = bool(register(machine, "cr4") & bit)
    driver.control(4, before)
    return taken


def upgrade(guest: Guest) -> tuple[Guest, Evidence]:
    """Complete if what may be written changed as the newer rules say; without VTL1 there is nothing to do."""
    machine, driver = guest.machine, guest.driver
    if not machine.info().vtl1_enabled:
        return guest, Evidence("VTL1", "off", "off", reached=True, intact=True)
    before = machine.info()
    could = may_set(machine, driver, NEWLY_PINNED)
    hand_over(machine, driver, guest.symbols, policy(1, STRICTER))
    can = may_set(machine, driver, NEWLY_PINNED)
    reached = could and not can and machine.info().generation == before.generation
    shown = ["can be set" if one else "is pinned" for one in (could, can)]
    return replace(guest), Evidence("CR4.TSD", *shown, reached, could == can)


TRANSITIONS = [Transition("vtl1-upgrade", "VTL1 takes newer rules, signed, while the guest runs on", SOURCE, upgrade)]


def lax_policy(version: int, *, signed: bool) -> Callable[[Machine, Driver, Symbols], Evidence]:
    """After an upgrade to version 2, hands over a laxer policy, then clears what that does not pin."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        def steps(attempts: Attempts) -> None:
            if machine.info().vtl1_enabled:
                hand_over(machine, driver, symbols, policy(2, STRICTER))
            attempts.step(hand_over, machine, driver, symbols, policy(version, LAXER, signed=signed))
            attempts.step(driver.call, symbols["gadget_mov_cr4"], register(machine, "cr4") & ~Cr4.SMEP)

        def smep() -> int:
            return int(bool(register(machine, "cr4") & Cr4.SMEP))

        return observe("CR4.SMEP", smep, steps, symbols, lambda _, after: not after)

    return run


TRANSITION_ATTACKS = [
    Attack("upgrade-rollback", "Replays an old, laxer policy, rightly signed", SOURCE, lax_policy(1, signed=True)),
    Attack(
        "upgrade-unsigned", "Hands over a newer, laxer policy that nobody signed", SOURCE, lax_policy(3, signed=False)
    ),
]
