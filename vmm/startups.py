"""INIT and SIPI where VTL1 is guest code: it has no path for them, so they are dropped where it is (TLFS).

    the VP has VTL1 enabled                          -> dropped: it starts by HvCallStartVirtualProcessor alone
    VsmPartitionConfig has DenyLowerVtlStartup       -> dropped: VTL0 stops and starts nobody
    else                                             -> delivered

All profiles agree on that. The core asks about each message of VTL0 from HvCallEnablePartitionVtl on.
"""

from __future__ import annotations

from vmm.board import Answer, Board
from vmm.processor import Processor
from vmm.vtl import VTL1
from vtlab.errors import GuestMisbehaved
from vtlab.hyperv.vsm import PartitionConfig
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit, Resolution

_DELIVERED = Resolution(action=vcpu_pb2.ACTION_COMMIT)


def serve(board: Board, processor: Processor, exit_: Exit) -> Answer:
    """Answers the exit for one message. Where VTL1 is no guest code nobody but a policy may allow it.

    Raises:
        GuestMisbehaved: the target is no VP of the machine.
    """
    if not board.guest_code:
        return processor.resume(Resolution(action=vcpu_pb2.ACTION_DENY))
    target = exit_.startup.target_vp
    if target >= len(board.processors):
        raise GuestMisbehaved(f"VTL0 of {board.vm}", f"sends INIT or SIPI to VP {target}")
    if board.processors[target].vtl.has(VTL1):
        return processor.resume(_dropped(f"VP {target} has VTL1"))
    if board.vtl.config & PartitionConfig.DENY_LOWER_VTL_STARTUP:
        return processor.resume(_dropped("DenyLowerVtlStartup"))
    return processor.resume(_DELIVERED)


def _dropped(reason: str) -> Resolution:
    return Resolution(action=vcpu_pb2.ACTION_SKIP, reason=reason)
