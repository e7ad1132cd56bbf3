"""S3 as a transition, and what an attacker changes in memory while everything in the processor is lost.

Under the kernel's own policy VTL1 loads the state that it sealed. `verified` has a newer one that lets the kernel's
waking code do it (lifecycle.s3: verify), as every other design has it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from vtlab.client.driver import COMMAND_PORT, READY, Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.errors import GuestLost, TimedOut
from vtlab.v1.vcpu_pb2 import ACTION_COMMIT
from vtlab.x86.registers import Cr0, Cr4
from vtlab_attacks.control_registers import forge_tables
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Transition, observe
from vtlab_attacks.guest import BOOT_TIMEOUT, Guest
from vtlab_attacks.kernels import policy
from vtlab_attacks.resets import say
from vtlab_attacks.state import ENTRY_ADDRESS, direct, memory, register, show_bytes
from vtlab_attacks.upgrades import hand_over

TO_RAM = 3
# struct suspended of vtl0_guest/kernels/selfguard/sleep.c
SAVED_CR3, SAVED_CR4, WAKING_VECTOR = 8, 16, 24
WAKE_PAGE, ROGUE_PAGE, MARK_OFFSET = 0x70000, 0x71000, 0x100
MARK = b"awak"
# Real mode: mov dword ptr cs:[0x100], MARK
MARKS = b"\x66\x2e\xc7\x06\x00\x01" + MARK
BACK = b"\xea" + struct.pack("<HH", 0, WAKE_PAGE >> 4)  # jmp WAKE_PAGE:0
JUMP = b"\xea" + struct.pack("<HH", 0, ROGUE_PAGE >> 4)
ROGUE_CODE = MARKS + BACK


def restores(start: bytes) -> bytes:
    """Real mode: writes the first five bytes of WAKE_PAGE."""
    # mov ax, imm16; mov ds, ax; mov dword ptr [0], imm32; mov byte ptr [4], imm8
    segment = b"\xb8" + struct.pack("<H", WAKE_PAGE >> 4) + b"\x8e\xd8"
    return segment + b"\x66\xc7\x06\x00\x00" + start[:4] + b"\xc6\x06\x04\x00" + start[4:5]


BOOT_SCRIPT = "Wojtczuk, Kallenberg 2015, Attacks on UEFI security (the S3 boot script)"
SEAN_S3 = "Heki thread (Christopherson 2024): suspend and resume need more than one hypercall"


# What the kernel's policy becomes, where its own code wakes.
VERIFY = {"lifecycle": {"s3": "verify", "waking": "waking code"}}
BY_VECTOR, BEHIND = "by the waking vector", "where it fell asleep"
AWAKE = re.compile(rf"selfguard: awake, ({BY_VECTOR}|{BEHIND})|{READY}")
LOOK = 0.5  # seconds until a guest that says nothing is looked at


def lost(machine: Machine) -> str:
    """Why the guest never comes back, by its state; empty if it may.

    All code of real mode lies in segments of its own. Segment 0 holds the interrupt vectors: a fault that nobody
    handles leads there.
    """
    state = machine.registers()
    registers = state.registers
    if registers.cr0 & Cr0.PE or registers.cs.base or registers.cs.selector:
        return ""
    return f"runs in real mode at 0000:{registers.rip:04x}, where no code is, with CR4 {registers.cr4:#x}"


def to_ram(machine: Machine) -> str:
    """Has the guest fall asleep; what its kernel says once it is awake, or once it starts again.

    Raises:
        GuestLost: waking led it where no code is.
        TimedOut: it never came.
    """
    log, answers = machine.serial_reader(0, from_now=True), machine.serial_reader(COMMAND_PORT, from_now=True)
    say(machine, f"sleep {TO_RAM} 0")
    for left in reversed(range(int(BOOT_TIMEOUT / LOOK))):
        try:
            said = log.read_until(AWAKE, LOOK)
        except TimedOut:
            if why := lost(machine):
                raise GuestLost(f"machine '{machine.name}'", f"{why}: {last_refusal(machine)}") from None
            if not left:
                raise
        else:
            if "selfguard: awake" in said:
                answers.read_line(BOOT_TIMEOUT)
            return said
    raise AssertionError


def last_refusal(machine: Machine) -> str:
    """What the machine's protection refused last."""
    verdicts = [event.verdict.resolution for event in machine.events(("verdict",), until_now=True)]
    return next((one.reason for one in reversed(verdicts) if one.action != ACTION_COMMIT), "nothing was refused")


def suspend(machine: Machine, attempts: Attempts) -> None:
    """To RAM and back by the clock's alarm, or the machine is reset and its kernel starts again."""
    generation = machine.info().generation
    said = to_ram(machine)
    after = machine.info()
    if after.generation != generation:
        attempts.note(after.reason)
    elif BEHIND in said:
        attempts.note("the guest went on where it fell asleep")


def verify(machine: Machine, driver: Driver, symbols: Symbols, version: int) -> None:
    """VTL1, where there is one, takes the policy that has the waking code run."""
    if machine.info().vtl1_enabled:
        hand_over(machine, driver, symbols, policy(version, VERIFY))


def suspend_to_mark(machine: Machine, attempts: Attempts, mark: int) -> None:
    """The same, where the attacker's code may have run although the guest was lost after it.

    Raises:
        GuestLost: it was lost before.
    """
    try:
        suspend(machine, attempts)
    except GuestLost as gone:
        if memory(machine, mark, len(MARK)) != MARK:
            raise
        attempts.note(gone.detail)


def s3(guest: Guest) -> tuple[Guest, Evidence]:
    return _slept(guest, BEHIND if guest.machine.info().vtl1_enabled else BY_VECTOR)


def s3_verified(guest: Guest) -> tuple[Guest, Evidence]:
    verify(guest.machine, guest.driver, guest.symbols, 1)
    return _slept(guest, BY_VECTOR)


def _slept(guest: Guest, way: str) -> tuple[Guest, Evidence]:
    """Complete if it woke in that way, with what it held before."""
    machine = guest.machine

    def held() -> tuple[int, ...]:
        registers = machine.registers().registers
        return machine.info().generation, registers.cr0, registers.cr3, registers.cr4, registers.efer

    before, ticks = held(), guest.driver.ticks()
    said = to_ram(machine)
    following = replace(guest, driver=Driver(machine))  # whose answers begin here
    following.driver.sleep(0, 1)  # interrupts come again
    after = held()
    reached = way in said and after == before and following.driver.ticks() > ticks
    shown = [" ".join(map(hex, one)) for one in (before, after)]
    return following, Evidence("generation, CR0, CR3, CR4, EFER", *shown, reached, False)


def change_vector(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    mark = ROGUE_PAGE + MARK_OFFSET
    driver.write_bytes(direct(ROGUE_PAGE), ROGUE_CODE)
    driver.write_bytes(direct(mark), bytes(len(MARK)))
    driver.write(symbols["suspended"] + WAKING_VECTOR, ROGUE_PAGE, 4)
    return observe(
        "mark of the attacker's code at the waking vector",
        lambda: memory(machine, mark, len(MARK)),
        lambda attempts: suspend_to_mark(machine, attempts, mark),
        symbols,
        lambda _, after: after == MARK,
        show_bytes,
    )


def change_code(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The waking code jumps to the attacker's, which puts it right again and goes back."""
    mark, start = ROGUE_PAGE + MARK_OFFSET, machine.read_memory(WAKE_PAGE, len(JUMP))
    driver.write_bytes(direct(ROGUE_PAGE), MARKS + restores(start) + BACK)
    driver.write_bytes(direct(mark), bytes(len(MARK)))

    def steps(attempts: Attempts) -> None:
        if attempts.step(driver.write_bytes, direct(WAKE_PAGE), JUMP):
            suspend_to_mark(machine, attempts, mark)

    return observe(
        "mark of the attacker's code behind the waking vector",
        lambda: memory(machine, mark, len(MARK)),
        steps,
        symbols,
        lambda _, after: after == MARK,
        show_bytes,
    )


def change_cr4(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    driver.write(symbols["suspended"] + SAVED_CR4, register(machine, "cr4") & ~Cr4.SMEP)
    return observe(
        "CR4.SMEP",
        lambda: int(bool(register(machine, "cr4") & Cr4.SMEP)),
        lambda attempts: suspend(machine, attempts),
        symbols,
        lambda _, after: not after,
    )


def change_tables(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    root = forge_tables(machine, driver, symbols, drop=0)
    driver.write(symbols["suspended"] + SAVED_CR3, root)
    return observe(
        "CR3",
        lambda: register(machine, "cr3"),
        lambda attempts: suspend(machine, attempts),
        symbols,
        lambda _, after: after & ENTRY_ADDRESS == root,
        hex,
    )


def verified(
    change: Callable[[Machine, Driver, Symbols], Evidence], machine: Machine, driver: Driver, symbols: Symbols
) -> Evidence:
    verify(machine, driver, symbols, 2)
    return change(machine, driver, symbols)


_ATTACKS: list[tuple[str, str, str, Callable[[Machine, Driver, Symbols], Evidence]]] = [
    ("changed-waking-vector", "Has S3 wake in the attacker's code", BOOT_SCRIPT, change_vector),
    ("changed-waking-code", "Changes the code that wakes", BOOT_SCRIPT, change_code),
    ("changed-saved-cr4", "Changes the CR4 that waking restores", SEAN_S3, change_cr4),
    ("changed-page-tables", "Changes the CR3 that waking restores", SEAN_S3, change_tables),
]
TRANSITIONS = [
    Transition("s3", "Suspends to RAM, and wakes by the clock's alarm", "ACPI 6.5, S3", s3),
    Transition(
        "s3-verified",
        "Suspends to RAM; the kernel's own code wakes, and no other runs until all pins hold",
        "ACPI 6.5, S3",
        s3_verified,
    ),
]
TRANSITION_ATTACKS = [
    *(Attack(f"s3-{name}", sentence, source, change) for name, sentence, source, change in _ATTACKS),
    *(
        Attack(
            f"s3-verified-{name}", f"{sentence}, where the kernel's own code wakes", source, partial(verified, change)
        )
        for name, sentence, source, change in _ATTACKS
    ),
]
