"""Other vCPUs: INIT clears their control registers, and SIPI runs code in real mode; who decides which?

The kernel starts CPU 1 through its trampoline and takes it offline and online again. Attacks have it run other code,
leave the trampoline early, lose its state, or change its pins while it runs.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.v1 import vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4
from vtlab_attacks.control_registers import SMEP_BYPASS
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Run, Transition, observe
from vtlab_attacks.guest import Guest
from vtlab_attacks.state import direct, memory

ICR = 0x40000071  # the synthetic interrupt command register: destination in bits 63:56
INIT, SIPI, NMI = 0x4500, 0x4600, 0x4400
AP = 1
TRAMPOLINE = 0x72000  # vtl0_guest/kernels/selfguard/smp.h
PAGE = 0x60000  # below 1 MiB, nobody's
MARK = 0x800  # in the page that the code runs in
NMI_VECTOR = 2 * 4  # in the interrupt vector table of real mode, which INIT puts at 0
PATIENCE = 10.0  # seconds for the other vCPU to be seen

# mov ax, cs; mov ds, ax
_SEGMENTS = bytes.fromhex("8cc8 8ed8")
# mov dword [MARK], "SNIP"; hlt; jmp $-1
MARKS = _SEGMENTS + bytes.fromhex("66c706") + struct.pack("<H", MARK) + b"SNIP" + bytes.fromhex("f4 ebfd")
# inc dword [MARK]; pause; jmp to inc
COUNTS = _SEGMENTS + bytes.fromhex("66ff06") + struct.pack("<H", MARK) + bytes.fromhex("f390 ebf7")
PINNED = int(Cr4.SMEP | Cr4.SMAP | Cr4.UMIP)

LUTOMIRSKI = "Lutomirski 2020 on CR pinning: SIPI enters real mode without SMEP and SMAP"
SDM = "Intel SDM volume 3, multiple-processor management"


# ------------------------------------------------------------------------------------------------ what CPU 1 holds


def _pins(machine: Machine) -> str:
    registers = machine.registers(AP).registers
    paging = "paging" if registers.cr0 & Cr0.PG else "no paging"
    return f"{paging}, {(registers.cr4 & PINNED).bit_count()}/3 of SMEP, SMAP, UMIP"


def _marked(page: int) -> Callable[[Machine], str]:
    """Whether the code has run, and on which pins."""

    def state(machine: Machine) -> str:
        if memory(machine, page + MARK, 4) != b"SNIP":
            return "attacker's code has not run"
        return f"attacker's code ran with {_pins(machine)}"

    return state


def _counting(machine: Machine) -> str:
    """Whether the code goes on."""
    if not any(memory(machine, PAGE + MARK, 4) or b""):
        return "attacker's code does not run"
    return f"attacker's code runs with {_pins(machine)}"


def _refusals(machine: Machine) -> list[str]:
    """Of CPU 1's own, which nobody tells the driver."""
    verdicts = machine.events(("verdict",), until_now=True)
    resolutions = [event.verdict.resolution for event in verdicts if event.vp_index == AP]
    return [one.reason for one in resolutions if one.action == vcpu_pb2.ACTION_DENY]


# ---------------------------------------------------------------------------------------------------------- attacks


def start(place: Callable[[Driver, Attempts], None], messages: tuple[int, ...], state: Callable[[Machine], str]) -> Run:
    """Takes CPU 1 offline in the kernel's way, prepares something and sends messages to it."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        driver.cpu_offline(AP)
        before, known = state(machine), len(_refusals(machine))

        def steps(attempts: Attempts) -> None:
            place(driver, attempts)
            for message in messages:
                if not attempts.step(driver.call, symbols["wrmsr"], ICR, AP << 56 | message):
                    return
            deadline = time.monotonic() + PATIENCE
            while not attempts.denials and state(machine) == before and time.monotonic() < deadline:
                time.sleep(0.01)
                attempts.denials += [f"CPU {AP}: {reason}" for reason in _refusals(machine)[known:]]

        return observe(f"CPU {AP}", lambda: state(machine), steps, symbols)

    return run


def _code(page: int, code: bytes) -> Callable[[Driver, Attempts], None]:
    def place(driver: Driver, attempts: Attempts) -> None:
        attempts.step(driver.write_bytes, direct(page), code)

    return place


def _nmi_handler(driver: Driver, attempts: Attempts) -> None:
    attempts.step(driver.write_bytes, direct(PAGE), MARKS)
    attempts.step(driver.write, direct(NMI_VECTOR), PAGE >> 4 << 16, 4)


def init_running(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def steps(attempts: Attempts) -> None:
        if attempts.step(driver.call, symbols["wrmsr"], ICR, AP << 56 | INIT):
            deadline = time.monotonic() + PATIENCE
            while machine.registers(AP).registers.cr0 & Cr0.PG and time.monotonic() < deadline:
                time.sleep(0.01)

    return observe(f"CPU {AP}", lambda: _pins(machine), steps, symbols)


def clear_smep(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    def held() -> int:
        return int(machine.registers(AP).registers.cr4)

    def steps(attempts: Attempts) -> None:
        attempts.step(driver.call_on, AP, symbols["gadget_mov_cr4"], held() & ~Cr4.SMEP)

    return observe(
        f"CR4.SMEP of CPU {AP}", lambda: int(bool(held() & Cr4.SMEP)), steps, symbols, lambda _, after: not after
    )


def _attack(name: str, sentence: str, source: str, run: Run) -> Attack:
    return Attack(name, sentence, source, run, vp_count=2)


OWN_PAGE = (INIT, SIPI | PAGE >> 12, SIPI | PAGE >> 12)
OWN_TRAMPOLINE = (INIT, SIPI | TRAMPOLINE >> 12)
TRANSITION_ATTACKS = [
    _attack(
        "ap-without-smep",
        "Starts another vCPU, whose control registers INIT has cleared, with code of its own",
        LUTOMIRSKI,
        start(_code(PAGE, MARKS), OWN_PAGE, _marked(PAGE)),
    ),
    _attack(
        "ap-unpinned-window",
        "Starts another vCPU with code that never turns paging on, and lets it run",
        LUTOMIRSKI,
        start(_code(PAGE, COUNTS), OWN_PAGE, _counting),
    ),
    _attack(
        "ap-trampoline-replaced",
        "Replaces the trampoline by its own code and has another vCPU start with it",
        LUTOMIRSKI,
        start(_code(TRAMPOLINE, MARKS), OWN_TRAMPOLINE, _marked(TRAMPOLINE)),
    ),
    _attack(
        "ap-nmi-in-trampoline",
        "Has another vCPU leave the trampoline at its first instruction: by an NMI, to a handler of real mode",
        f"{LUTOMIRSKI}; {SDM}",
        start(_nmi_handler, (INIT, NMI, SIPI | TRAMPOLINE >> 12), _marked(PAGE)),
    ),
    _attack("init-running-ap", "Sends INIT to a vCPU that runs, which clears its pins", LUTOMIRSKI, init_running),
    _attack("cr4-on-cpu1", "Clears CR4.SMEP of another vCPU", SMEP_BYPASS, clear_smep),
]


# ------------------------------------------------------------------------------------------------------ transitions


def _held(machine: Machine) -> tuple[int, ...]:
    """What pins are about, and where the vCPU's tables lie."""
    state = machine.registers(AP)
    registers = state.registers
    tables = state.gdtr.base, state.idtr.base, state.tr.base
    return registers.cr0, registers.cr3, registers.cr4, registers.efer, *tables


def restart(from_power_up: bool) -> Callable[[Guest], tuple[Guest, Evidence]]:
    """Takes CPU 1 offline and online; complete if it holds what it held before, and works for the kernel again."""

    def run(guest: Guest) -> tuple[Guest, Evidence]:
        machine, driver, symbols = guest.machine, guest.driver, guest.symbols
        banner = symbols["driver_banner"]
        before = _held(machine)
        seen = driver.read_on(AP, banner)
        driver.cpu_offline(AP)
        if from_power_up:
            driver.call(symbols["wrmsr"], ICR, AP << 56 | INIT)
        driver.cpu_online(AP)
        after = _held(machine)
        reached = after == before and driver.read_on(AP, banner) == seen
        shown = [" ".join(map(hex, one)) for one in (before, after)]
        return guest, Evidence(f"CR0, CR3, CR4, EFER, GDTR, IDTR, TR of CPU {AP}", *shown, reached, False)

    return run


TRANSITIONS = [
    Transition("ap-start", "Starts another vCPU from where power-up leaves it: INIT, then SIPI", SDM, restart(True), 2),
    Transition(
        "cpu-offline-online",
        "Takes another vCPU offline, which halts for good, and online again",
        "Linux CPU hotplug",
        restart(False),
        2,
    ),
]
