"""What hardware does by itself at any instant, NMIs and machine checks, as transitions and in an attacker's hands.

Both come while the kernel changes CR4 in its own way, over and over: between instructions, and while VTL1 has an exit
of the vCPU open, which ends as it was judged before the interruption is delivered.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import replace

from vtlab.client.driver import COMMAND_PORT, READY, Driver, parse
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.errors import TimedOut
from vtlab.v1 import vmm_pb2
from vtlab.x86.registers import Cr4
from vtlab_attacks.control_registers import SMEP_BYPASS
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Transition, observe
from vtlab_attacks.guest import BOOT_TIMEOUT, Guest
from vtlab_attacks.kernels import kernel_symbols
from vtlab_attacks.resets import FREE, say
from vtlab_attacks.state import msr, register

STORM = "selfguard: NMI storm"
NMIS = 12  # in one storm
CHECKS = 3
MCG_STATUS = 0x17A
# struct machine_checks of vtl0_guest/kernels/selfguard/hardware.c
COUNT, ADDRESS = 0, 16

SDM_NMI = "Intel SDM volume 3, 6.7 and 6.15"
SDM_MCE = "Intel SDM volume 3, machine-check architecture; Linux mm/memory-failure.c"
NMI_CHAIN = "Linux, arch/x86/kernel/nmi.c: the list of NMI handlers is ordinary memory"


def storm(machine: Machine, each: Callable[[], object]) -> str:
    """Has the kernel change CR4 until NMIS NMIs have come, and does something meanwhile; the command's answer line.

    The kernel sends itself one now and then, so that it ends in any case.
    """
    log, answers = machine.serial_reader(0, from_now=True), machine.serial_reader(COMMAND_PORT, from_now=True)
    say(machine, f"nmi {NMIS}")
    log.read_until(STORM, BOOT_TIMEOUT)
    deadline = time.monotonic() + BOOT_TIMEOUT
    while "\n" not in answers.peek() and time.monotonic() < deadline:
        each()
    return answers.read_line(BOOT_TIMEOUT)


def _held(machine: Machine) -> tuple[int, ...]:
    registers = machine.registers().registers
    return machine.info().generation, registers.cr0, registers.cr3, registers.cr4 & ~Cr4.PGE, registers.efer


def _word(machine: Machine, gpa: int) -> int:
    (value,) = struct.unpack("<Q", machine.read_memory(gpa, 8))
    return int(value)


def check(machine: Machine) -> None:
    """A memory error, dealt with by the kernel: another one before that would be a shutdown."""
    count = kernel_symbols().physical("machine_checks")
    known = _word(machine, count)
    machine.inject_machine_check(FREE)
    deadline = time.monotonic() + BOOT_TIMEOUT
    while _word(machine, count) == known or msr(machine, MCG_STATUS):
        if time.monotonic() > deadline:
            raise TimedOut(f"machine '{machine.name}'", "does not deal with a machine check")


def interrupted(
    event: Callable[[Machine], object], symbol: str, count: int
) -> Callable[[Guest], tuple[Guest, Evidence]]:
    """Complete if the guest's handler has run for each event at least, and the kernel holds what it held."""

    def run(guest: Guest) -> tuple[Guest, Evidence]:
        machine, place = guest.machine, guest.symbols.physical(symbol)
        before, known = _held(machine), _word(machine, place)
        left = count

        def meanwhile() -> None:
            nonlocal left
            if left:
                left -= 1
                event(machine)
            else:
                time.sleep(0.01)

        answer = storm(machine, meanwhile)
        following = replace(guest, driver=Driver(machine))
        for _ in range(left):  # the storm was over before
            event(machine)
            following.driver.ping()
        after, handled = _held(machine), _word(machine, place) - known
        shown = [" ".join(map(hex, one)) for one in (before, after)]
        reached = parse(answer) >= NMIS and handled >= count and after == before
        return following, Evidence("generation, CR0, CR3, CR4 but PGE, EFER", *shown, reached, False)

    return run


TRANSITIONS = [
    Transition(
        "nmi",
        "NMIs come while the kernel changes CR4, from itself and from outside; its handler counts them",
        SDM_NMI,
        interrupted(Machine.inject_nmi, "nmi_count", NMIS),
        interrupted=True,
    ),
    Transition(
        "mce",
        "Memory errors are found while the kernel changes CR4 and sends itself NMIs; its handler leaves the page aside",
        SDM_MCE,
        interrupted(check, "machine_checks", CHECKS),
        interrupted=True,
    ),
]


# ---------------------------------------------------------------------------------------------------------- attacks


def replace_callback(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The handler's callback becomes a MOV to CR4: it runs wherever an NMI comes, also between check and use."""
    held = register(machine, "cr4")
    driver.write(symbols["nmi_action"] + 8, held & ~Cr4.SMEP)
    driver.write(symbols["nmi_action"], symbols["gadget_mov_cr4"])

    def smep() -> int:
        return int(bool(register(machine, "cr4") & Cr4.SMEP))

    return observe(
        "CR4.SMEP",
        smep,
        lambda attempts: _storm(attempts, machine),
        symbols,
        lambda _, after: not after,
    )


def _storm(attempts: Attempts, machine: Machine) -> None:
    """Only the kernel's own NMIs: one from outside would come after the attack, too."""
    attempts.step(lambda: parse(storm(machine, lambda: time.sleep(0.01))))


def poison(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """VTL0 hears that memory in which VTL1 keeps its secrets is bad, and goes on with a VTL1 that cannot know."""
    page = symbols.physical("vtl1_memory")
    place = symbols.physical("machine_checks") + ADDRESS

    def steps(attempts: Attempts) -> None:
        generation = machine.info().generation
        log = machine.serial_reader(0, from_now=True)
        machine.inject_machine_check(page)
        after = machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING, timeout=BOOT_TIMEOUT)
        if after.generation == generation:
            driver.ping()
            return
        attempts.note(after.reason)
        log.read_until(READY, BOOT_TIMEOUT)

    return observe(
        "VTL0 has heard of a bad page of VTL1",
        lambda: _word(machine, place) == page,
        steps,
        symbols,
        lambda _, after: after,
        lambda heard: "yes" if heard else "no",
    )


TRANSITION_ATTACKS = [
    Attack(
        "nmi-callback-replaced",
        "Makes the NMI handler's callback a MOV to CR4 and has NMIs come while CR4 changes are judged",
        f"{NMI_CHAIN}; {SMEP_BYPASS}",
        replace_callback,
    ),
    Attack(
        "mce-in-vtl1-memory",
        "Has memory go bad that VTL1 keeps its secrets in, and VTL0 go on",
        "Kim et al. 2014, Flipping bits in memory without accessing them",
        poison,
    ),
]
