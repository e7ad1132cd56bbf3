"""RESET by each of a PC's ways, done by the guest itself, and attacks on what comes after it."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from vtlab.client.driver import COMMAND_PORT, READY, Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.errors import Refused
from vtlab.x86.registers import Cr4
from vtlab_attacks.control_registers import HEKI
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Transition, observe
from vtlab_attacks.guest import BOOT_TIMEOUT, Guest
from vtlab_attacks.state import PAGE, direct, register

STARTED = "selfguard: at VTL0"
GUARDED = "selfguard: guarded by VTL1"
ENABLED = "selfguard: VTL1 enabled"
# Where VTL1 stands when the reset of the race comes, by the kernel's log.
MOMENTS = (ENABLED, "selfguard: VTL1: policy taken", "selfguard: VTL1: registers locked", "selfguard: VTL1: boot ended")
# Free RAM: far from the image, its modules and what the loader writes.
FREE = 40 << 20
CHUNK = 1 << 20


def say(machine: Machine, command: str) -> None:
    """A command that nobody answers."""
    machine.write_serial(COMMAND_PORT, f"{command}\n")


def again(
    machine: Machine, act: Callable[[], object], symbols: Symbols, protected: bool, design: str = "vtl"
) -> tuple[Guest, str]:
    """Does what resets the machine and waits for the kernel's next start; the guest then, and what its log says."""
    log = machine.serial_reader(0, from_now=True)
    act()
    log.read_until(STARTED, BOOT_TIMEOUT)  # until then it is the kernel before that speaks, and may even get ready
    said = log.read_until(READY, BOOT_TIMEOUT)
    return Guest(machine, Driver(machine), symbols, protected, design), said


def reset(way: str) -> Callable[[Guest], tuple[Guest, Evidence]]:
    """The guest's command; complete if the next generation runs and, where VTL1 guarded the last, is guarded again."""

    def run(guest: Guest) -> tuple[Guest, Evidence]:
        machine = guest.machine
        before = machine.info()
        following, said = again(
            machine, lambda: say(machine, f"reset {way}"), guest.symbols, guest.protected, guest.design
        )
        following.driver.ping()
        after = machine.info()
        reached = (
            after.generation == before.generation + 1
            and after.vtl1_enabled == before.vtl1_enabled
            and (GUARDED in said) == before.vtl1_enabled
        )
        shown = [f"generation {one.generation}, VTL1 {'on' if one.vtl1_enabled else 'off'}" for one in (before, after)]
        return following, Evidence("generation and VTL1", *shown, reached, before == after)

    return run


WAYS = {
    "triple": ("Loses its stacks and takes #UD: a triple fault", "Linux reboot=triple"),
    "cf9": ("Writes 0x06 to port 0xCF9", "Intel ICH9 data sheet, RST_CNT"),
    "64": ("Pulses the reset line by command 0xFE of the keyboard controller", "Linux reboot=kbd"),
    "d1": ("Clears bit 0 of the keyboard controller's output port", "IBM PS/2, 8042 output port"),
    "92": ("Sets bit 0 of port 0x92", "IBM PS/2, system control port A"),
    "msr": ("Writes the RESET MSR", "TLFS, HV_X64_MSR_RESET"),
    "init": ("Sends INIT to its own local APIC", "Intel SDM volume 3, INIT"),
}
TRANSITIONS = [Transition(f"reset-{way}", *words, run=reset(way)) for way, words in WAYS.items()]


def found(machine: Machine, needle: bytes) -> list[int]:
    """GPAs of it in all that VTL0 may read of RAM."""
    places: list[int] = []
    for start in range(0, machine.info().spec.ram_size, CHUNK):
        data = readable(machine, start, CHUNK)
        at = data.find(needle)
        while at >= 0:
            places.append(start + at)
            at = data.find(needle, at + 1)
    return places


def readable(machine: Machine, gpa: int, size: int) -> bytes:
    """Bytes as VTL0 may read them; zeros for pages that it may not."""
    try:
        return machine.read_memory(gpa, size)
    except Refused:
        if size == PAGE:
            return bytes(PAGE)
        half = size // 2
        return readable(machine, gpa, half) + readable(machine, gpa + half, half)


def cold_boot(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The victim's key lies in RAM; the attacker resets the machine and searches all of it."""
    secret = secrets.token_bytes(32)
    protected = machine.info().vtl1_enabled
    driver.write_bytes(direct(FREE), secret)
    planted = found(machine, secret) == [FREE]

    def steps(attempts: Attempts) -> None:
        guest, _ = again(machine, lambda: say(machine, "reset cf9"), symbols, protected)
        guest.driver.copy(symbols["driver_mailbox"], direct(FREE), len(secret))
        copied = machine.read_memory(symbols.physical("driver_mailbox"), len(secret))
        attempts.note("" if any(copied) else "zeros where the secret was")

    start = machine.info().generation
    return observe(
        "places of RAM that hold the secret of the generation before",
        lambda: found(machine, secret) if machine.info().generation > start else [],
        steps,
        symbols,
        lambda _, after: planted and bool(after),
        lambda places: ", ".join(map(hex, places)) or "none",
    )


def race_vtl1_start(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """Resets once more while the kernel is giving itself to VTL1; a kernel that then claims to be guarded must be."""
    last: list[tuple[Guest, str]] = []
    starts = machine.info().vtl1_enabled

    def steps(attempts: Attempts) -> None:
        for moment in MOMENTS if starts else ():
            log = machine.serial_reader(0, from_now=True)
            machine.reset()
            log.read_until(moment, BOOT_TIMEOUT)
            guest, said = again(machine, machine.reset, symbols, True)
            last[:] = [(guest, said)]
            if GUARDED not in said:
                return
            smep = register(machine, "cr4") & ~Cr4.SMEP
            if attempts.step(guest.driver.call, symbols["gadget_mov_cr4"], smep):
                return
        attempts.note("" if starts else "the kernel does not start VTL1")

    def unprotected() -> bool:
        """The kernel says that it is guarded, and is not."""
        claims = GUARDED in last[0][1] if last else starts
        return claims and not (machine.info().vtl1_enabled and register(machine, "cr4") & Cr4.SMEP)

    return observe(
        "claims to be guarded and is not",
        unprotected,
        steps,
        symbols,
        lambda _, after: after,
        lambda lost: "yes" if lost else "no",
    )


TRANSITION_ATTACKS = [
    Attack(
        "reset-cold-boot",
        "Resets the machine and searches RAM for what the generation before left there",
        "Halderman et al. 2008, Lest We Remember (cold boot)",
        cold_boot,
    ),
    Attack(
        "reset-races-vtl1-start",
        "Resets the machine at each step of VTL1's start; the next kernel may not believe what is not so",
        HEKI,
        race_vtl1_start,
        "VTL1 is not enabled, so there is no start to race with",
    ),
]
