"""HvCallFlushVirtualAddressSpace, HvCallFlushVirtualAddressList and their extended forms.

A flush is whole: every translation of the named vCPUs goes, at the level that asked. It is complete when the call
returns, since no vCPU runs while it is posted. VTL1 can lock VTL0's translations: the caller waits then.
"""

from __future__ import annotations

import struct

from vmm.hypercalls.table import Call, Reply
from vmm.processor import Processor
from vmm.vtl import VTL0
from vtlab.hyperv.layouts import ALL_VPS_SET, decode_vp_set
from vtlab.hyperv.status import HvStatus
from vtlab.v1.vcpu_pb2 import FlushTranslations, Update

FLUSH_HEADER_SIZE = 24  # address space u64@0, flags u64@8, processor mask u64@16
FLUSH_EX_HEADER_SIZE = 32  # the same, with the fixed part of an HV_VP_SET @16
_ALL_PROCESSORS, _ALL_SPACES, _NON_GLOBAL, _EXTENDED_RANGES = 1, 2, 4, 8
_SPACE_FLAGS = _ALL_PROCESSORS | _ALL_SPACES | _NON_GLOBAL
_LIST_FLAGS = _SPACE_FLAGS | _EXTENDED_RANGES


def flush_space(call: Call) -> Reply:
    return _flush(call, _SPACE_FLAGS, _mask(call))


def flush_list(call: Call) -> Reply:
    """What the list names is part of what goes."""
    return _flush(call, _LIST_FLAGS, _mask(call))


def flush_space_ex(call: Call) -> Reply:
    return _flush(call, _SPACE_FLAGS, _set(call))


def flush_list_ex(call: Call) -> Reply:
    return _flush(call, _LIST_FLAGS, _set(call))


def _mask(call: Call) -> set[int] | None:
    (mask,) = struct.unpack_from("<Q", call.header, 16)
    return {number for number in range(64) if mask >> number & 1}


def _set(call: Call) -> set[int] | None:
    (form,) = struct.unpack_from("<Q", call.header, 16)
    if form == ALL_VPS_SET:
        return set(range(len(call.board.processors)))
    return decode_vp_set(call.header[16:], call.variable)


def _flush(call: Call, legal: int, targets: set[int] | None) -> Reply:
    (flags,) = struct.unpack_from("<Q", call.header, 8)
    processors = call.board.processors
    if flags & _ALL_PROCESSORS:
        targets = set(range(len(processors)))
    if flags & ~legal or not targets:
        return Reply(HvStatus.INVALID_PARAMETER)
    chosen = [processor for processor in processors if processor.index in targets]
    if call.vtl == VTL0 and any(processor.vtl.tlb_locked for processor in chosen):
        call.processor.wait_until(lambda: not any(one.vtl.tlb_locked for one in chosen))
        return Reply(HvStatus.SUCCESS, again=True)
    _post(call, chosen)
    return Reply(HvStatus.SUCCESS, reps=len(call.elements))


def _post(call: Call, chosen: list[Processor]) -> None:
    update = Update(flush_translations=FlushTranslations())
    if chosen == [call.processor]:
        call.processor.post_once(update, vtl=call.vtl)
        return
    with call.board.gate.none_inside():
        for processor in chosen:
            processor.post_once(update, vtl=call.vtl)
