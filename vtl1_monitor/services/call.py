"""One VTL call: who calls, with what, and what VTL0 gets besides the result."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from vtl1_monitor.machine import Machine
from vtl1_monitor.steps import Steps
from vtlab.services import Service
from vtlab.v1 import registers_pb2, vcpu_pb2

# Linux's number; Python's errno module has it only on Linux.
EKEYREJECTED = 129
ENOTSUP = 95


class Refused(Exception):
    """The service says no: result -`number` in R8. `reason` is for the verdict log."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number
        self.reason = reason

    def __str__(self) -> str:
        name = {EKEYREJECTED: "EKEYREJECTED", ENOTSUP: "ENOTSUP"}.get(self.number)
        return f"-{name or errno.errorcode.get(self.number, self.number)}: {self.reason}"


@dataclass
class Call:
    """A VTL call being served.

    Attributes:
        first, second, third: arguments (RSI, RDX, R8).
        registers: VTL0's own at the call.
        updates: for VTL0, applied when it resumes.
        resolution: set if VTL0 is not to go on as usual.
        again: it begins anew, since the monitor died in the middle; what it opened is open.
        stand_down: set if another kernel is to go on instead.
        state: VTL0's whole state, once the service has asked for it.
        parks_others: all other vCPUs wait for SIPI from here on.
    """

    machine: Machine
    vp_index: int
    service: int
    registers: registers_pb2.Registers
    updates: list[vcpu_pb2.Update] = field(default_factory=list)
    resolution: vcpu_pb2.Resolution | None = None
    again: bool = False
    stand_down: vcpu_pb2.StandDown | None = None
    state: registers_pb2.ProcessorState = field(default_factory=registers_pb2.ProcessorState)
    parks_others: bool = False

    @property
    def first(self) -> int:
        return self.registers.rsi

    @property
    def second(self) -> int:
        return self.registers.rdx

    @property
    def third(self) -> int:
        return self.registers.r8

    @property
    def name(self) -> str:
        """Of the service, for people."""
        return Service(self.service).name if self.service in list(Service) else f"service {self.service:#x}"

    def as_exit(self) -> vcpu_pb2.Exit:
        """The call as the verdict log has it."""
        return vcpu_pb2.Exit(
            vp_index=self.vp_index,
            origin=vcpu_pb2.ORIGIN_VCPU,
            registers=self.registers,
            hypercall=vcpu_pb2.Hypercall(),
        )


Handler = Callable[[Call], Steps]


def immediate(service: Callable[[Call], int]) -> Handler:
    """A service that asks the VMM for nothing."""

    def steps(call: Call) -> Steps:
        yield from ()
        return service(call)

    return steps
