"""The table of hypercalls, and how one is served: decode, check, act, write back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vmm.board import Board
from vmm.hypercalls import abi
from vmm.hypercalls.rules import OPENVMM, Facts, Profile
from vmm.processor import Processor
from vtlab.errors import VtlabError
from vtlab.hyperv.hypercalls import HypercallCode, encode_result
from vtlab.hyperv.status import HvStatus
from vtlab.v1.vcpu_pb2 import Exit


@dataclass(frozen=True, slots=True)
class Call:
    """A hypercall whose buffers are in bounds.

    Attributes:
        vtl: the caller's level.
        exit: as it exited.
        header: input of the fixed size.
        elements: of a rep call, from the start index on.
    """

    board: Board
    processor: Processor
    vtl: int
    exit: Exit
    profile: Profile
    header: bytes
    elements: Sequence[bytes] = ()

    def facts(self) -> Facts:
        vps = tuple(processor.vtl for processor in self.board.processors)
        return Facts(self.board.vtl, vps, self.processor.index, self.vtl)


class Reply(NamedTuple):
    """`reps` counts the elements done in this call; `output` is theirs, or that of a simple call."""

    status: HvStatus
    output: bytes = b""
    reps: int = 0


class Row(NamedTuple):
    shape: abi.Shape
    serve: Callable[[Call], Reply]


class Hypercalls:
    """The calls that a machine offers."""

    def __init__(self, rows: dict[HypercallCode, Row], profile: Profile = OPENVMM) -> None:
        self._rows: dict[int, Row] = {int(code): row for code, row in rows.items()}
        self._profile = profile

    def serve(self, board: Board, processor: Processor, vtl: int, exit_: Exit, request: abi.Request) -> int:
        """The result value. Never raises for anything that a guest can put into a call."""
        row = self._rows.get(request.value & 0xFFFF)
        if row is None:
            return encode_result(HvStatus.INVALID_HYPERCALL_CODE)
        value = abi.decode(request)
        shape = row.shape
        status = abi.check_input_value(value, shape, strict_reserved=self._profile.strict_reserved)
        if status:
            return encode_result(status, value.rep_start)
        data = abi.read_input(board.memory, request, value, shape, vtl)
        if isinstance(data, HvStatus):
            return encode_result(data, value.rep_start)
        step = shape.element_in
        starts = range(shape.header + value.rep_start * step, len(data), step) if shape.rep else ()
        elements = [data[start : start + step] for start in starts]
        call = Call(board, processor, vtl, exit_, self._profile, data[: shape.header], elements)
        reply = row.serve(call)
        if reply.output and not self._write_back(board, request, shape, value.rep_start, reply, vtl):
            return encode_result(HvStatus.INVALID_HYPERCALL_INPUT, value.rep_start)
        return encode_result(reply.status, value.rep_start + reply.reps if shape.rep else 0)

    @staticmethod
    def _write_back(
        board: Board, request: abi.Request, shape: abi.Shape, rep_start: int, reply: Reply, vtl: int
    ) -> bool:
        """A simple call gives output only on success, a rep call that of the elements it did."""
        if reply.status and not shape.rep:
            return True
        try:
            board.memory.write(request.output + rep_start * shape.element_out, reply.output, vtl)
        except VtlabError:
            return False  # the call itself took the right away: it was checked before
        return True
