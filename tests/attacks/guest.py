"""The machine that attacks run on: selfguard with its modules, guarded or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vtlab.client import Lab, Machine, filters
from vtlab.client.driver import READY, Driver
from vtlab.client.serial import read_first
from vtlab.client.symbols import Symbols
from vtlab.errors import GuestLost
from vtlab_attacks.kernels import file, images, kernel, kernel_symbols, operators_policy

RAM = 64 << 20
DISK = 16 << 20
BOOT_TIMEOUT = 60.0  # seconds
# What a kernel says last that does not start.
GAVE_UP = re.compile(r"selfguard: (stopped|deprivileging failed[^\n]*)\n")


@dataclass(frozen=True)
class Guest:
    """A machine whose guest waits for commands. `protected`: it asks for its own protection at each start, in the way
    that `design` has for it."""

    machine: Machine
    driver: Driver
    symbols: Symbols
    protected: bool
    design: str = "vtl"


# design -> what the kernel's option `protect` calls it.
_PROTECT = {"mmio-device": "mmio"}


def tampered(module: bytes) -> bytes:
    """A signed module with one bit of its code changed: the value that its entry returns."""
    at = module.index(bytes.fromhex("0d60"))
    return module[:at] + bytes([module[at] ^ 1]) + module[at + 1 :]


def modules(command_line: str = "heki=1") -> list[tuple[bytes, str]]:
    """What the guest's commands can load, by name: modules, and kernels that are told the same as this one."""
    signed = file("module.signed.elf").read_bytes()
    unsigned = file("module.elf").read_bytes()
    return [(signed, "good"), (unsigned, "unsigned"), (tampered(signed), "tampered"), *images(command_line)]


@contextmanager
def boot(
    lab: Lab,
    protected: bool,
    vp_count: int = 1,
    design: str = "vtl",
    *,
    policy: str = "",
    at_end: Callable[[Machine], None] | None = None,
) -> Iterator[Guest]:
    """A started machine of a design, destroyed at the end.

    What the design has to protect with is on offer either way; only a protected guest takes it.

    Its RAM is a PC's: a RESET does not clear it, unless VTL1 wants that.

    Args:
        policy: an operator's, in place of the guest's own.
        at_end: gets the machine before it is destroyed, however its guest ended.

    Raises:
        TimedOut, WrongState, GuestLost: the guest did not come up; what it said is in the message.
    """
    symbols = kernel_symbols()
    line = f"protect={_PROTECT.get(design, design)}" if protected else "heki=0"
    with lab.create(
        kernel(),
        ram=RAM,
        disk=DISK,
        vp_count=vp_count,
        command_line=line,
        modules=modules(line),
        design=design,
        filters=filters.pinning() if protected and design == "cr-filter" else None,
        keep_memory_on_reset=True,
    ) as machine:
        held = operators_policy.set(policy)
        try:
            if policy:
                lab.policy.set(machine, policy)
            machine.start()
            log = machine.serial_reader(0)
            came, said = read_first([(log, READY), (log, GAVE_UP)], BOOT_TIMEOUT)
            if came == 1:
                raise GuestLost(f"machine '{machine.name}'", f"says: {said.splitlines()[-1]}")
            yield Guest(machine, Driver(machine), symbols, protected, design)
        finally:
            operators_policy.reset(held)
            if at_end:
                at_end(machine)
