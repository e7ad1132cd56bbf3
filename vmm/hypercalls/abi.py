"""The hypercall ABI: from registers to a bounded request, or to the status that it fails with (TLFS, "Hypercall
Interface"; facts about the order of the checks from openvmm's hv1_hypercall).

Everything here but read_input() is pure.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.memory import WRITE, Memory
from vtlab.errors import VtlabError
from vtlab.hyperv.convention import Request
from vtlab.hyperv.hypercalls import InputValue, decode_input_value
from vtlab.hyperv.status import HvStatus
from vtlab.ram import PAGE_SIZE

FAST_INPUT_SIZE = 16
# RDX, R8 and XMM0 to XMM5: input, then output from the next multiple of 16.
XMM_SIZE = FAST_INPUT_SIZE + 6 * 16


class Shape(NamedTuple):
    """What a call takes and gives, in bytes.

    `element_in` and `element_out` are of a rep call, which has one; `fast` allows input in registers; `variable` allows
    a variable header (its size comes with the call); `columns` are the parts of an element where each part of all
    elements stands together, aligned to its size.
    """

    header: int
    output: int = 0
    element_in: int = 0
    element_out: int = 0
    fast: bool = True
    variable: bool = False
    columns: tuple[int, ...] = ()

    @property
    def rep(self) -> bool:
        return self.element_in > 0


def check_input_value(value: InputValue, shape: Shape, *, xmm: bool = False, no_repetitions: bool = False) -> HvStatus:
    """The checks that need the input value alone.

    Args:
        xmm: the XMM registers came with the call.
        no_repetitions: a rep call may have a rep count of 0.
    """
    bad = HvStatus.INVALID_HYPERCALL_INPUT
    if value.variable_header and not shape.variable:
        return bad
    if shape.rep:
        if value.rep_start >= value.rep_count and not (no_repetitions and not value.rep_count and not value.rep_start):
            return bad
    elif value.rep_count or value.rep_start:
        return bad
    room = XMM_SIZE if xmm else FAST_INPUT_SIZE
    if value.fast and not (shape.fast and fast_output(value, shape) + output_size(value, shape) <= room):
        return bad
    return HvStatus.SUCCESS


def whole_xmm(xmm: bytes) -> bytes:
    """XMM0 to XMM5 as they came with the call: all of them or, from a guest process that leaves some out, none."""
    return xmm if len(xmm) == XMM_SIZE - FAST_INPUT_SIZE else b""


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


def input_size(value: InputValue, shape: Shape) -> int:
    """Bytes of headers and all elements, those before the start index included."""
    size = shape.header + 8 * value.variable_header
    if not shape.columns:
        return size + value.rep_count * shape.element_in
    for width in shape.columns:
        size = _align(size, width) + value.rep_count * width
    return size


def fast_output(value: InputValue, shape: Shape) -> int:
    """Where the output of a fast call begins, in bytes from RDX; the input's end where there is no output."""
    size = input_size(value, shape)
    return _align(size, 16) if output_size(value, shape) else size


def output_size(value: InputValue, shape: Shape) -> int:
    return shape.output + value.rep_count * shape.element_out


def split_elements(data: bytes, value: InputValue, shape: Shape) -> list[bytes]:
    """The elements from the start index on, each as it would stand in rows of `element_in` bytes."""
    if not shape.rep:
        return []
    numbers = range(value.rep_start, value.rep_count)
    start = shape.header + 8 * value.variable_header
    if not shape.columns:
        step = shape.element_in
        return [data[start + number * step : start + (number + 1) * step] for number in numbers]
    elements = [b""] * len(numbers)
    for width in shape.columns:
        start = _align(start, width)
        elements = [
            element.ljust(_align(len(element), width), b"\0") + data[start + number * width :][:width]
            for element, number in zip(elements, numbers, strict=True)
        ]
        start += value.rep_count * width
    return elements


def check_buffer(gpa: int, size: int) -> HvStatus:
    """A buffer lies in one page and is 8-byte aligned."""
    if gpa % PAGE_SIZE + size > PAGE_SIZE:
        return HvStatus.INVALID_HYPERCALL_INPUT
    if gpa % 8:
        return HvStatus.INVALID_ALIGNMENT
    return HvStatus.SUCCESS


def read_input(
    memory: Memory, request: Request, value: InputValue, shape: Shape, vtl: int, xmm: bytes = b""
) -> bytes | HvStatus:
    """The input bytes, read once, after checking that the output can be written; both with the caller's rights."""
    out = output_size(value, shape)
    size = input_size(value, shape)
    if value.fast:
        return ((request.input | request.output << 64).to_bytes(FAST_INPUT_SIZE, "little") + xmm)[:size]
    status = check_buffer(request.input, size)
    if status:
        return status
    if out:
        status = check_buffer(request.output, out)
        if status:
            return status
    try:
        if out:
            memory.check(request.output, out, WRITE, vtl)
        return memory.read(request.input, size, vtl)
    except VtlabError:
        return HvStatus.INVALID_HYPERCALL_INPUT


def decode(request: Request) -> InputValue:
    return decode_input_value(request.value)
