"""Legitimate operations: a guard that broke them would be no use."""

from __future__ import annotations

import struct

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.services import Service
from vtlab.x86.registers import Cr0, Cr4, Msr
from vtlab_attacks.evidence import Attempts, Control, Evidence, Run, observe
from vtlab_attacks.secure_memory import FW_CFG_DMA, FW_CFG_READ_SIGNATURE
from vtlab_attacks.state import NX, PRESENT, SPARE_WINDOW, WRITABLE, memory, msr, register, show_bytes

LISTED_JUMP = bytes.fromhex("e90b000000")
NOP5 = bytes.fromhex("0f1f440000")
USER_CODE = 0x2B
MODULE_RESULT = 0x600D0001
TICK_TRIES = 200


def toggle(number: int, bit: Cr0 | Cr4) -> Run:
    """Flips a bit that no policy pins and flips it back, in the kernel's way."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        name = f"cr{number}"
        seen: list[int] = []

        def steps(attempts: Attempts) -> None:
            for _ in range(2):
                attempts.step(driver.control, number, register(machine, name) ^ bit)
                seen.append(register(machine, name) & bit)

        def state() -> int:
            return int(register(machine, name) & bit)

        return observe(
            f"{name.upper()}.{bit.name}",
            state,
            steps,
            symbols,
            lambda before, after: seen == [before ^ bit, before] and after == before,
            lambda value: "→".join(str(int(bool(step))) for step in [*seen[:1], value]),
        )

    return run


def map_page(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """A data page gets a second mapping, is written through it, and the mapping goes."""
    page = symbols.physical("driver_mailbox")

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.map, SPARE_WINDOW, page, PRESENT | WRITABLE | NX)
        attempts.step(driver.write_bytes, SPARE_WINDOW, b"mapped!!")
        attempts.step(driver.map, SPARE_WINDOW, 0, 0)

    return observe(
        "data page behind the mapping, and the mapping",
        lambda: (memory(machine, page), machine.translate(SPARE_WINDOW).present),
        steps,
        symbols,
        lambda _, after: after == (b"mapped!!", False),
        lambda seen: f"{show_bytes(seen[0])}, {'mapped' if seen[1] else 'not mapped'}",
    )


def load_signed(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    results: list[int] = []

    def steps(attempts: Attempts) -> None:
        attempts.step(lambda: results.append(driver.module("good")))

    def state() -> bool:
        walk = machine.translate(symbols["module_area"])
        return walk.present and walk.executable

    return observe(
        "module area",
        state,
        steps,
        symbols,
        lambda _, after: after and results == [MODULE_RESULT],
        lambda executable: f"executable, returned {results[0]:#x}" if executable and results else "not executable",
    )


def patch_listed(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """A static key goes on and off; each time the code does the other thing."""
    site = symbols["patch_site_trace"]
    results: list[int] = []

    def steps(attempts: Attempts) -> None:
        for code in (LISTED_JUMP, NOP5, LISTED_JUMP):
            attempts.step(driver.patch, site, code)
            results.append(driver.call(symbols["static_key_trace"]))

    return observe(
        "code of static_key_trace",
        lambda: memory(machine, symbols.physical(site), 5),
        steps,
        symbols,
        lambda _, after: after == LISTED_JUMP and results == [1, 0, 1],
        lambda code: f"{show_bytes(code)} → {','.join(map(str, results)) or driver.call(symbols['static_key_trace'])}",
    )


def write_msr(index: Msr) -> Run:
    value = 0x12345000

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        def steps(attempts: Attempts) -> None:
            attempts.step(driver.call, symbols["wrmsr"], index, value)

        return observe(index.name, lambda: msr(machine, index), steps, symbols, lambda _, after: after == value, hex)

    return run


def timer(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def state() -> int:
        return int.from_bytes(machine.read_memory(symbols.physical("ticks"), 8), "little")

    def steps(attempts: Attempts) -> None:
        start = driver.ticks()
        for _ in range(TICK_TRIES):
            if driver.ticks() > start + 1:
                return
        attempts.note("no tick came")

    return observe("timer interrupts", state, steps, symbols, lambda before, after: after > before + 1)


def system_call(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The user program asks for the timer count, and gets what the kernel's memory holds."""
    answers: list[int] = []

    def state() -> int:
        return int.from_bytes(machine.read_memory(symbols.physical("ticks"), 8), "little")

    def steps(attempts: Attempts) -> None:
        attempts.step(lambda: answers.append(driver.ticks()))

    return observe(
        "ticks by system call, between memory reads",
        state,
        steps,
        symbols,
        lambda before, after: len(answers) == 1 and before <= answers[0] <= after,
        lambda value: f"{value}, answer {answers[0]}" if answers else str(value),
    )


def write_data(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    target = symbols["driver_mailbox"] + 64

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.write_bytes, target, b"ordinary")

    return observe(
        "kernel data",
        lambda: memory(machine, symbols.physical(target)),
        steps,
        symbols,
        lambda _, after: after == b"ordinary",
        show_bytes,
    )


def run_user(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """A function of the user program runs at CPL3 and stores its CS at the far end of the user stack."""
    target = symbols["user_stack_top"] - 8192

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.user, symbols["user_payload"], target)

    return observe(
        "CS that it stored",
        lambda: int.from_bytes(memory(machine, symbols.physical(target)) or b"", "little"),
        steps,
        symbols,
        lambda _, after: after == USER_CODE,
        hex,
    )


def dma_data(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    request = symbols.physical("driver_mailbox")
    target = request + 128
    machine.write_memory(request, struct.pack(">IIQ", FW_CFG_READ_SIGNATURE, 4, target))

    def steps(attempts: Attempts) -> None:
        for half, port in ((request >> 32, FW_CFG_DMA), (request & 0xFFFFFFFF, FW_CFG_DMA + 4)):
            attempts.step(driver.call, symbols["outl"], port, int.from_bytes(half.to_bytes(4, "big"), "little"))

    return observe(
        "kernel data",
        lambda: memory(machine, target, 4),
        steps,
        symbols,
        lambda _, after: after == b"QEMU",
        show_bytes,
    )


def ping_vtl1(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """RBX, RBP and R12 to R15 survive a VTL call, or the kernel would not answer."""
    results: list[int] = []

    def steps(attempts: Attempts) -> None:
        attempts.step(lambda: results.append(driver.vtl(Service.PING)))

    return observe(
        "answers of VTL1",
        lambda: len(results),
        steps,
        symbols,
        lambda _, after: after == 1 and results == [0],
    )


CONTROLS = [
    Control("cr0-ts", "The kernel sets and clears CR0.TS", toggle(0, Cr0.TS)),
    Control("cr4-pge", "The kernel clears and sets CR4.PGE, which flushes the TLB", toggle(4, Cr4.PGE)),
    Control("page-mapped", "The kernel maps a data page, writes through it, unmaps it", map_page),
    Control("module-signed", "The kernel loads a signed module and runs it", load_signed),
    Control("patch-listed", "The kernel flips a static key that is on the list", patch_listed),
    Control("msr-unwatched", "The kernel writes FS_BASE, which no rule names", write_msr(Msr.FS_BASE)),
    Control(
        "msr-watched", "The kernel writes KERNEL_GS_BASE, which is watched but free", write_msr(Msr.KERNEL_GS_BASE)
    ),
    Control("timer", "Timer interrupts go on", timer),
    Control("system-call", "The user program makes system calls", system_call),
    Control("data-written", "The kernel writes its data", write_data),
    Control("user-runs", "User code runs at CPL3", run_user),
    Control("data-dma", "fw_cfg writes ordinary memory by DMA", dma_data),
    Control("vtl-call", "VTL1 answers a call", ping_vtl1, needs_vtl1=True),
]
