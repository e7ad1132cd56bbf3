"""HvCallPostMessage, HvCallSignalEvent and the test device that makes their connections."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.board import Board
from vmm.connections import BUFFERS, Connections, EventPort, MessagePort
from vmm.devices import optional
from vmm.devices.hyperv_testdev import NAME, PORT, Command, HypervTestDevice
from vmm.exits import serve
from vmm.hypercalls import HYPERCALLS
from vtlab.errors import BadArgument
from vtlab.hyperv.convention import Request
from vtlab.hyperv.hypercalls import HypercallCode, encode_input_value
from vtlab.hyperv.status import HvStatus as S
from vtlab.v1.vcpu_pb2 import Exit, Hypercall, Kicked, SynicEvent, SynicInterrupt, SynicMessage, Update

INPUT = 0x10000
SINT, CONNECTION = 8, 0x10


def posted(board: Board) -> list[Update]:
    """What goes with the next enter or waits for it, but for what writing the input to memory made."""
    processor = board.processors[0]
    return [
        update for update in [*processor._answer.updates, *processor._pending] if not update.HasField("invalidate_code")
    ]


def post(board: Board, connection: int = CONNECTION, type_: int = 1, size: int = 3) -> S:
    board.memory.write(INPUT, struct.pack("<I4xII240s", connection, type_, size, b"abc"))
    request = Request(encode_input_value(HypercallCode.POST_MESSAGE), INPUT, 0, 0, True)
    return status(board, request)


def signal(board: Board, connection: int, number: int = 0, reserved: int = 0) -> S:
    value = connection | number << 32 | reserved << 48
    return status(board, Request(encode_input_value(HypercallCode.SIGNAL_EVENT, fast=True), value, 0, 0, True))


def status(board: Board, request: Request) -> S:
    result = HYPERCALLS.serve(board, board.processors[0], 0, Exit(hypercall=Hypercall()), request)
    assert result is not None
    return S(result & 0xFFFF)


@pytest.fixture
def connected(board: Board) -> Board:
    board.connections.connect_messages(CONNECTION, MessagePort(0, SINT))
    board.connections.connect_events(CONNECTION, EventPort(0, SINT, 0x20, 2))
    return board


def test_a_message_goes_to_its_port(connected: Board) -> None:
    assert post(connected) == S.SUCCESS
    message = SynicMessage(sint=SINT, type=1, origin=CONNECTION, payload=b"abc")
    assert posted(connected) == [Update(synic_message=message)]


def test_equal_messages_are_all_owed(connected: Board) -> None:
    assert [post(connected) for _ in range(3)] == [S.SUCCESS] * 3
    assert len(posted(connected)) == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"connection": 0x11}, S.INVALID_CONNECTION_ID),
        ({"connection": CONNECTION | 1 << 24}, S.INVALID_CONNECTION_ID),
        ({"type_": 0}, S.INVALID_PARAMETER),
        ({"type_": 0x8000_0000}, S.INVALID_PARAMETER),
        ({"size": 241}, S.INVALID_PARAMETER),
        ({"size": 0xFFFF_FFFF}, S.INVALID_PARAMETER),
        ({"size": 240}, S.SUCCESS),
        ({"size": 0}, S.SUCCESS),
    ],
)
def test_statuses_of_post_message(connected: Board, fields: dict[str, int], expected: S) -> None:
    assert post(connected, **fields) == expected
    assert len(posted(connected)) == (expected == S.SUCCESS)


def test_post_message_has_no_fast_form(connected: Board) -> None:
    request = Request(encode_input_value(HypercallCode.POST_MESSAGE, fast=True), CONNECTION, 1, 0, True)
    assert status(connected, request) == S.INVALID_HYPERCALL_INPUT


def test_buffers_run_out_and_come_back_with_an_exit(connected: Board) -> None:
    assert [post(connected) for _ in range(BUFFERS + 1)] == [S.SUCCESS] * BUFFERS + [S.INSUFFICIENT_BUFFERS]
    serve(connected, connected.processors[0], Exit(kicked=Kicked(), synic_delivered=[SINT, SINT, 3]))
    assert [post(connected) for _ in range(3)] == [S.SUCCESS, S.SUCCESS, S.INSUFFICIENT_BUFFERS]
    assert len(posted(connected)) == BUFFERS + 2


def test_an_event_sets_its_ports_flag_once(connected: Board) -> None:
    assert signal(connected, CONNECTION, 1) == S.SUCCESS
    assert signal(connected, CONNECTION, 1) == S.SUCCESS
    assert posted(connected) == [Update(synic_event=SynicEvent(sint=SINT, flag=0x21))]


@pytest.mark.parametrize(
    ("connection", "number", "reserved", "expected"),
    [
        (0x1234, 0, 0, S.INVALID_CONNECTION_ID),
        (CONNECTION | 1 << 31, 0, 0, S.INVALID_CONNECTION_ID),
        (CONNECTION, 2, 0, S.INVALID_PARAMETER),
        (CONNECTION, 0, 1, S.INVALID_PARAMETER),
    ],
)
def test_statuses_of_signal_event(connected: Board, connection: int, number: int, reserved: int, expected: S) -> None:
    assert signal(connected, connection, number, reserved) == expected
    assert not posted(connected)


# ------------------------------------------------------------------------------------------------------- test device


def order(command: int, vp_index: int = 0, sint: int = SINT, connection: int = CONNECTION) -> int:
    return connection << 24 | command << 16 | vp_index << 8 | sint


@pytest.fixture
def device(board: Board) -> HypervTestDevice:
    board.spec.devices.append(NAME)
    (made,) = optional.build(board)
    assert isinstance(made, HypervTestDevice)
    return made


def test_its_connections_lead_to_the_processor(board: Board, device: HypervTestDevice) -> None:
    device.write(PORT, 4, order(Command.MESSAGES_CREATE))
    device.write(PORT, 4, order(Command.EVENTS_CREATE, connection=0x20))
    assert post(board) == S.SUCCESS
    assert signal(board, 0x20) == S.SUCCESS
    assert posted(board)[1] == Update(synic_event=SynicEvent(sint=SINT, flag=0x20))
    device.write(PORT, 4, order(Command.MESSAGES_DESTROY))
    device.write(PORT, 4, order(Command.EVENTS_DESTROY, connection=0x20))
    assert post(board) == signal(board, 0x20) == S.INVALID_CONNECTION_ID


def test_a_route_raises_its_sint(board: Board, device: HypervTestDevice) -> None:
    device.write(PORT, 4, order(Command.ROUTE_SET))
    assert not posted(board)  # no route yet
    device.write(PORT, 4, order(Command.ROUTE_CREATE))
    device.write(PORT, 4, order(Command.ROUTE_SET))
    assert posted(board) == [Update(synic_interrupt=SynicInterrupt(sint=SINT))]
    board.processors[0]._pending.clear()
    device.write(PORT, 4, order(Command.ROUTE_DESTROY))
    device.write(PORT, 4, order(Command.ROUTE_SET))
    assert not posted(board)


def test_only_machines_that_ask_have_it(board: Board) -> None:
    assert optional.build(board) == []
    optional.check([NAME])
    with pytest.raises(BadArgument, match="hyperv-testdef"):
        optional.check(["hyperv-testdef"])


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF_FFFF))))
def test_no_order_breaks_it(writes: list[tuple[int, int]]) -> None:
    told: list[tuple[int, Update]] = []
    made = HypervTestDevice(Connections(), 2, lambda vp, update: told.append((vp, update)))
    for size, value in writes:
        made.write(PORT, size, value)
    assert all(vp < 2 and update.synic_interrupt.sint < 16 for vp, update in told)
