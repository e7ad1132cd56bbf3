"""Machine checks: one bank, one error at a time.

Sources: AMD APM volume 2, chapter 9; Intel SDM volume 3, chapter 16.
"""

from __future__ import annotations

from vtl0_guest.cpu import msrs
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.faults import Shutdown
from vtl0_guest.cpu.gates import Event
from vtlab.v1 import vcpu_pb2
from vtlab.x86.registers import Cr4, Vector

VALID, OVERFLOW = 1 << 63, 1 << 62
_IN_PROGRESS = 4
_RESTART = 3  # RIPV, EIPV
_MCE = int(Cr4.MCE)


def take(context: Context, error: vcpu_pb2.MachineCheck) -> Event:
    """Reports the error in the bank; the exception that follows. Raises Shutdown where there can be none."""
    shadows = context.shadows
    overflow = OVERFLOW if shadows[msrs.MC0_STATUS] & VALID else 0
    shadows[msrs.MC0_STATUS] = error.status | VALID | overflow
    shadows[msrs.MC0_ADDR] = error.address
    if not context.environment.cr(4) & _MCE:
        raise Shutdown("machine check while CR4.MCE is clear")
    if shadows[msrs.MCG_STATUS] & _IN_PROGRESS:
        raise Shutdown("machine check while another one is in progress")
    shadows[msrs.MCG_STATUS] = error.mcg_status & _RESTART | _IN_PROGRESS
    return Event(Vector.MC, None, context.environment.rip, external=True)
