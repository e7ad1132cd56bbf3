"""How a service changes protections: it yields what it asks for and goes on when every vCPU has it.

def service(call) -> Steps:
    yield from protect(memory, changes)   # raises ProtectFailed if the VMM reports an HV_STATUS
    return 0
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from vtl1_monitor.memory import GuestMemory
from vtl1_monitor.rights import Change, Scattered
from vtlab.hyperv.status import HvStatus
from vtlab.v1 import vcpu_pb2

Protect = vcpu_pb2.Protect
Request = vcpu_pb2.Protect | vcpu_pb2.StateRequest
Steps = Generator[Request, int, int]
"""What a service is: yields Protect and is sent the status (0 or an HV_STATUS), or StateRequest and finds the answer in
Call.state; returns the result for R8."""


_WHY: dict[int, str] = {HvStatus.OPERATION_DENIED: "VTL0's hypercall page hides one of the pages"}


class ProtectFailed(Exception):
    """The VMM could not apply a protection. What holds now is unknown, so the machine fails closed."""

    def __init__(self, status: int) -> None:
        why = _WHY.get(status, f"status {status:#x}")
        super().__init__(f"protection was not applied: {why}")
        self.status = status


def protect(
    memory: GuestMemory, changes: Sequence[Change], scattered: Sequence[Scattered] = ()
) -> Generator[Protect, int, None]:
    """Asks for the changes and records them. Asks nothing if they hold already."""
    message = memory.protect_message(changes, scattered)
    if message is not None:
        status = yield message
        if status:
            raise ProtectFailed(status)
    memory.record(changes, scattered)
