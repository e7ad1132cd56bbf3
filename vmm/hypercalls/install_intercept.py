"""HvCallInstallIntercept: VTL1 asks to see accesses of VTL0 to an I/O port. Guests have no other type (openvmm)."""

from __future__ import annotations

from vmm.hypercalls.cr_intercepts import apply_intercepts
from vmm.hypercalls.table import Call, Reply
from vmm.vtl import VTL0, VTL1
from vtlab.hyperv.hypercalls import PARTITION_SELF
from vtlab.hyperv.layouts import InstallInterceptInput
from vtlab.hyperv.status import HvStatus

INSTALL_INTERCEPT_FAILS = (
    HvStatus.INVALID_PARTITION_ID,
    HvStatus.INVALID_VTL_STATE,
    HvStatus.ACCESS_DENIED,
    HvStatus.INVALID_PARAMETER,
)
_IO_PORT = 0
_ACCESS_BITS = 3  # read and write; none of them takes the intercept away
_LAST_PORT = 0xFFFF


def install_intercept(call: Call) -> Reply:
    """The port is the parameter. It holds on every VP that has VTL1."""
    request = InstallInterceptInput.decode(call.header)
    if request.partition != PARTITION_SELF:
        return Reply(HvStatus.INVALID_PARTITION_ID)
    if not call.board.vtl.has(VTL1):
        return Reply(HvStatus.INVALID_VTL_STATE)
    if call.vtl == VTL0:
        return Reply(HvStatus.ACCESS_DENIED)
    if request.kind != _IO_PORT or request.access & ~_ACCESS_BITS or request.parameter > _LAST_PORT:
        return Reply(HvStatus.INVALID_PARAMETER)
    for processor in call.board.processors:
        ports = processor.vtl.ports
        (ports.add if request.access else ports.discard)(request.parameter)
        apply_intercepts(processor)
    return Reply(HvStatus.SUCCESS)
