"""The table of hypercalls, and how one is served: decode, check, act, write back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vmm.board import Board
from vmm.hypercalls import abi
from vmm.hypercalls.rules import CallRules, Facts, Rules, rules_of
from vmm.processor import Processor
from vtlab.errors import VtlabError
from vtlab.hyperv.convention import Request
from vtlab.hyperv.hypercalls import HypercallCode, InputValue, encode_result
from vtlab.hyperv.profiles import VsmProfile
from vtlab.hyperv.status import HvStatus
from vtlab.v1 import registers_pb2
from vtlab.v1.registers_pb2 import RegisterValue
from vtlab.v1.vcpu_pb2 import Exit, Update


@dataclass(frozen=True, slots=True)
class Call:
    """A hypercall whose buffers are in bounds.

    Attributes:
        vtl: the caller's level.
        exit: as it exited.
        header: input of the fixed size.
        variable: the variable header.
        elements: of a rep call, from the start index on.
    """

    board: Board
    processor: Processor
    vtl: int
    exit: Exit
    header: bytes
    elements: Sequence[bytes] = ()
    variable: bytes = b""

    @property
    def profile(self) -> VsmProfile:
        """How the machine answers where the sources disagree."""
        return self.board.profile

    @property
    def rules(self) -> CallRules:
        return rules_of(self.board.profile.name)

    def facts(self) -> Facts:
        vps = tuple(processor.vtl for processor in self.board.processors)
        return Facts(self.board.vtl, vps, self.processor.index, self.vtl)


class Reply(NamedTuple):
    """`reps` counts the elements done in this call; `output` is theirs, or that of a simple call.

    `again`: nothing was done; the caller makes the call once more, when what it waits for may have come.
    """

    status: HvStatus
    output: bytes = b""
    reps: int = 0
    again: bool = False


class Row(NamedTuple):
    """A call.

    Attributes:
        columns: replaces the shape in profiles whose elements stand in columns.
        empty: see no_repetitions there.
        rules: its rows in CallRules, if it has some.
        fails: statuses that `serve` gives beside those.
        looks: the call changes nothing of the machine but what it posts and writes to the caller's memory.
    """

    shape: abi.Shape
    serve: Callable[[Call], Reply]
    columns: abi.Shape | None = None
    empty: bool = False
    rules: str = ""
    fails: tuple[HvStatus, ...] = ()
    looks: bool = False

    def statuses(self, profile: str) -> frozenset[HvStatus]:
        """All that the call can give: success, what the ABI refuses, what its rules and its own checks do."""
        rules: Rules = getattr(rules_of(profile), self.rules) if self.rules else ()
        return frozenset({HvStatus.SUCCESS, *_OF_THE_ABI, *self.fails, *(status for _, status in rules if status)})


_OF_THE_ABI = (HvStatus.INVALID_HYPERCALL_INPUT, HvStatus.INVALID_ALIGNMENT)


class Hypercalls:
    """The calls that a machine offers."""

    def __init__(self, rows: dict[HypercallCode, Row]) -> None:
        self._rows: dict[int, Row] = {int(code): row for code, row in rows.items()}

    def statuses(self, profile: str) -> set[tuple[int, HvStatus]]:
        """Every pair of call and status that can be. The VTL switches give none, and are not here."""
        return {(code, status) for code, row in self._rows.items() for status in row.statuses(profile)}

    def serve(self, board: Board, processor: Processor, vtl: int, exit_: Exit, request: Request) -> int | None:
        """The result value, or None if the caller has to make the call again.

        Never raises for anything that a guest can put into a call.
        """
        row = self._rows.get(request.value & 0xFFFF)
        if row is None:
            return encode_result(HvStatus.INVALID_HYPERCALL_CODE)
        profile = board.profile
        value = abi.decode(request)
        shape = row.columns if row.columns is not None and profile.register_columns else row.shape
        xmm = abi.whole_xmm(exit_.hypercall.xmm)
        empty = row.empty and not profile.no_repetitions
        status = abi.check_input_value(value, shape, xmm=bool(xmm), no_repetitions=empty)
        if value.reserved:
            status = status or profile.reserved_input_bits
        if status:
            return encode_result(status, value.rep_start)
        data = abi.read_input(board.memory, request, value, shape, vtl, xmm)
        if isinstance(data, HvStatus):
            return encode_result(data, value.rep_start)
        fixed = shape.header + 8 * value.variable_header
        elements = abi.split_elements(data, value, shape)
        if not row.looks:
            board.ledger.touch()
        call = Call(board, processor, vtl, exit_, data[: shape.header], elements, data[shape.header : fixed])
        reply = row.serve(call)
        if reply.again:
            return None
        if reply.output and not self._write_back(call, request, value, shape, reply):
            return encode_result(HvStatus.INVALID_HYPERCALL_INPUT, value.rep_start)
        return encode_result(reply.status, value.rep_start + reply.reps if shape.rep else 0)

    @staticmethod
    def _write_back(call: Call, request: Request, value: InputValue, shape: abi.Shape, reply: Reply) -> bool:
        """A simple call gives output only on success, a rep call that of the elements it did."""
        if reply.status and not shape.rep:
            return True
        offset = value.rep_start * shape.element_out
        if value.fast:
            xmm = bytearray(abi.whole_xmm(call.exit.hypercall.xmm))
            start = abi.fast_output(value, shape) - abi.FAST_INPUT_SIZE + offset
            xmm[start : start + len(reply.output)] = reply.output
            for number in range(start // 16, -(-(start + len(reply.output)) // 16)):
                call.processor.post(_vector(number, bytes(xmm[16 * number :][:16])), vtl=call.vtl)
            return True
        try:
            call.board.memory.write(request.output + offset, reply.output, call.vtl)
        except VtlabError:
            return False  # the call itself took the right away: it was checked before
        return True


def _vector(number: int, value: bytes) -> Update:
    name = registers_pb2.REGISTER_NAME_XMM0 + number
    return Update(register=RegisterValue(name=name, vector=value))  # type: ignore[arg-type]
