"""PATCH_TEXT: kernel text changes only to bytes that were listed in the measured image. VTL1 writes them itself."""

from __future__ import annotations

import errno
from typing import NamedTuple

from vtl1_monitor.memory import GuestMemory
from vtl1_monitor.services.call import Call, Refused
from vtlab.ram import PAGE_SIZE
from vtlab.services import HEKI_PATCH
from vtlab.v1 import vcpu_pb2

INT3 = b"\xcc"
NOPS = {
    1: b"\x90",
    2: b"\x66\x90",
    3: b"\x0f\x1f\x00",
    4: b"\x0f\x1f\x40\x00",
    5: b"\x0f\x1f\x44\x00\x00",
}
"""No-operations of each size (SDM volume 2, NOP)."""


class Patch(NamedTuple):
    """Guest-physical target and its new bytes."""

    gpa: int
    code: bytes


def patch_text(call: Call) -> int:
    """(pa of heki_patch, pa of the page that has its rest or 0)."""
    machine = call.machine
    patch = read_patch(machine.memory, call.first, call.second)
    check_listed(patch, machine.kdata.patches)
    machine.memory.write_sealed(patch.gpa, patch.code)
    first, last = patch.gpa // PAGE_SIZE, (patch.gpa + len(patch.code) - 1) // PAGE_SIZE
    invalidate = vcpu_pb2.InvalidateCode(gfns=range(first, last + 1))
    call.updates.append(vcpu_pb2.Update(invalidate_code=invalidate))
    return 0


def read_patch(memory: GuestMemory, pa: int, second_pa: int) -> Patch:
    """Copies the structure once. Raises Refused (-EINVAL) if it is malformed, GuestFault."""
    in_page = min(HEKI_PATCH.size, PAGE_SIZE - pa % PAGE_SIZE)
    if (in_page < HEKI_PATCH.size) != bool(second_pa) or second_pa % PAGE_SIZE:
        raise Refused(errno.EINVAL, f"heki_patch at {pa:#x} with second page {second_pa:#x}")
    data = memory.read(pa, in_page)
    if in_page < HEKI_PATCH.size:
        data += memory.read(second_pa, HEKI_PATCH.size - in_page)
    target, second_target, size, code = HEKI_PATCH.unpack(data)
    if not 1 <= size <= len(code):
        raise Refused(errno.EINVAL, f"patch of {size} bytes")
    crosses = target % PAGE_SIZE + size > PAGE_SIZE
    expected = (target // PAGE_SIZE + 1) * PAGE_SIZE if crosses else 0
    # The image is loaded in one piece, so the second page of listed text is the next one and no other.
    if second_target != expected:
        raise Refused(errno.EINVAL, f"patch at {target:#x}: second page {second_target:#x}, not {expected:#x}")
    return Patch(target, code[:size])


def check_listed(patch: Patch, listed: dict[tuple[int, int], set[bytes]]) -> None:
    """Raises Refused: -ENOENT if nothing is listed there, -EACCES if these bytes are not."""
    if patch.code == INT3 and any(gpa == patch.gpa for gpa, _ in listed):
        return
    allowed = listed.get((patch.gpa, len(patch.code)))
    if allowed is None:
        raise Refused(errno.ENOENT, f"no patch of {len(patch.code)} bytes is listed at {patch.gpa:#x}")
    if patch.code not in allowed:
        raise Refused(errno.EACCES, f"{patch.code.hex(' ')} is not listed at {patch.gpa:#x}")
