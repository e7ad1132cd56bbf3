"""Delivery of exceptions and interrupts: the right gate for the mode, and what happens when delivery itself faults.

Source: Intel SDM volume 3, 6.15 (interrupt 8, table 6-5): benign, contributory and page faults combine to #DF, a
fault while #DF is delivered is a triple fault.
"""

from __future__ import annotations

from vtl0_guest.cpu import gates
from vtl0_guest.cpu.environment import Environment
from vtl0_guest.cpu.faults import GuestFault, Shutdown
from vtl0_guest.cpu.gates import Event
from vtl0_guest.cpu.guest_memory import GuestMemory
from vtlab.x86.registers import Rflags, Vector

_CONTRIBUTORY = frozenset({Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.CP})
_FAULTS_WITH_RF = frozenset(range(32)) - {Vector.DB, Vector.NMI, Vector.BP, Vector.OF, Vector.DF, Vector.MC}
_RF = int(Rflags.RF)


def combine(first: int | None, second: GuestFault) -> GuestFault:
    """The exception to deliver when `second` occurs while vector `first` is delivered (None: an interrupt).

    Raises Shutdown for a fault while #DF is delivered.
    """
    if first == Vector.DF:
        raise Shutdown(f"vector {second.vector} while #DF was delivered")
    first_contributory = first in _CONTRIBUTORY
    second_contributory = second.vector in _CONTRIBUTORY
    second_page = second.vector == Vector.PF
    if (first_contributory and second_contributory) or (first == Vector.PF and (second_contributory or second_page)):
        return GuestFault(Vector.DF, 0)
    return second


def from_fault(fault: GuestFault, rip: int) -> Event:
    return Event(fault.vector, fault.error_code, rip, address=fault.address)


def deliver(environment: Environment, memory: GuestMemory, event: Event) -> None:
    """Enters the handler of `event`. Raises Shutdown, or NestedFault with nothing changed (CR2 apart)."""
    # What faults combine with: the exception under delivery; interrupts are benign.
    first = None if event.software or event.external else event.vector
    while True:
        try:
            _enter(environment, memory, event)
            return
        except GuestFault as fault:
            combined = combine(first, fault)
            first = combined.vector
            # The return address of a fault in delivery is the interrupted instruction, also for INTn.
            event = from_fault(combined, environment.rip)


def _enter(environment: Environment, memory: GuestMemory, event: Event) -> None:
    if event.address is not None:
        environment.set_cr2(event.address)
    # Faults push RFLAGS with RF set, so that a breakpoint on the instruction does not fire again after IRET.
    before = environment.rflags
    hardware = not event.software and not event.external
    if hardware and event.vector in _FAULTS_WITH_RF:
        environment.rflags = before | _RF
    try:
        if not environment.cr(0) & 1:
            gates.real_mode(environment, memory, event)
        elif environment.long_mode:
            gates.long_mode(environment, memory, event)
        else:
            gates.protected_mode(environment, memory, event)
    except BaseException:
        environment.rflags = before
        raise
    environment.set_interrupt_shadow(False)
