"""HvCallSendSyntheticClusterIpi(Ex): a fixed interrupt for a set of VPs, at the caller's level or at another one."""

from __future__ import annotations

import struct

from vmm import vina
from vmm.board import Board
from vmm.hypercalls.table import Call, Reply
from vmm.vtl import HIGHEST_VTL, VTL0, VTL1
from vtlab.hyperv.hypercalls import decode_input_vtl
from vtlab.hyperv.layouts import CLUSTER_IPI_SIZE, ClusterIpi, decode_vp_set
from vtlab.hyperv.status import HvStatus
from vtlab.v1.vcpu_pb2 import ApicInterrupt, Update

CLUSTER_IPI_HEADER_SIZE = CLUSTER_IPI_SIZE + 8
CLUSTER_IPI_EX_HEADER_SIZE = CLUSTER_IPI_SIZE + 16
# Not in a profile that lets VTL0 interrupt a VTL1 of guest code, but a policy is never interrupted.
CLUSTER_IPI_FAILS = (HvStatus.INVALID_PARAMETER, HvStatus.ACCESS_DENIED, HvStatus.INVALID_VTL_STATE)
_FIRST_VECTOR, _LAST_VECTOR = 0x10, 0xFF


def send_cluster_ipi(call: Call) -> Reply:
    """The set is a mask of VPs 0 to 63 at 8."""
    (mask,) = struct.unpack_from("<Q", call.header, CLUSTER_IPI_SIZE)
    return _send(call, {number for number in range(64) if mask >> number & 1})


def send_cluster_ipi_ex(call: Call) -> Reply:
    """The set is an HV_VP_SET at 8, its banks are the variable header."""
    return _send(call, decode_vp_set(call.header[CLUSTER_IPI_SIZE:], call.variable))


def _send(call: Call, targets: set[int] | None) -> Reply:
    request = ClusterIpi.decode(call.header[:CLUSTER_IPI_SIZE])
    wanted = decode_input_vtl(request.input_vtl)
    vtl = wanted.vtl if wanted.explicit else call.vtl
    bad_fields = request.flags or request.reserved or wanted.reserved or targets is None
    if bad_fields or not _FIRST_VECTOR <= request.vector <= _LAST_VECTOR:
        return Reply(HvStatus.INVALID_PARAMETER)
    if vtl > HIGHEST_VTL:
        return Reply(HvStatus.INVALID_PARAMETER)
    if vtl > call.vtl and (call.profile.ipi_to_higher or not call.board.guest_code):
        return Reply(call.profile.ipi_to_higher or HvStatus.ACCESS_DENIED)
    assert targets is not None
    if any(number >= len(call.board.processors) for number in targets):
        return Reply(HvStatus.INVALID_PARAMETER)
    if any(not call.board.processors[number].vtl.has(vtl) for number in targets):
        return Reply(HvStatus.INVALID_VTL_STATE)
    for number in sorted(targets):
        interrupt_level(call.board, number, vtl, Update(apic_interrupt=ApicInterrupt(vector=request.vector)))
    return Reply(HvStatus.SUCCESS)


def interrupt_level(board: Board, vp_index: int, vtl: int, update: Update) -> None:
    """Gives a level of a vCPU something that raises an interrupt there; a higher one preempts a lower one at once."""
    board.processors[vp_index].post_once(update, vtl=vtl)  # a vector that waits already is one interrupt
    if vtl == VTL0:
        vina.notice(board, vp_index)
    if vtl == VTL1 and board.guest_code:
        board.gate.interrupt(vp_index)
    if vtl == VTL0 or board.processors[vp_index].vtl.active == VTL1:
        board.gate.kick(vp_index)
