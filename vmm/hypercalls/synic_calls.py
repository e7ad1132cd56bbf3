"""HvCallPostMessage and HvCallSignalEvent (TLFS, "Inter-Partition Communication")."""

from __future__ import annotations

import struct

from vmm.hypercalls.table import Call, Reply
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.synic import FROM_HYPERVISOR, MAX_PAYLOAD, MessageType
from vtlab.v1.vcpu_pb2 import SynicEvent, SynicMessage, Update

# Connection u32@0, reserved u32, message type u32@8, payload size u32@12, payload 240 @16.
_POST = struct.Struct("<I4xII240s")
POST_MESSAGE_SIZE = _POST.size
POST_MESSAGE_FAILS = (HvStatus.INVALID_PARAMETER, HvStatus.INVALID_CONNECTION_ID, HvStatus.INSUFFICIENT_BUFFERS)
# Connection u32@0, flag number u16@4, reserved u16@6.
_SIGNAL = struct.Struct("<IHH")
SIGNAL_EVENT_SIZE = _SIGNAL.size
SIGNAL_EVENT_FAILS = (HvStatus.INVALID_PARAMETER, HvStatus.INVALID_CONNECTION_ID)


def post_message(call: Call) -> Reply:
    """Queues a message; a receiver that is slow has no buffer left, and is asked to report what it has delivered."""
    connection, type_, size, payload = _POST.unpack(call.header)
    if size > MAX_PAYLOAD or type_ == MessageType.NONE or type_ & FROM_HYPERVISOR:
        return Reply(HvStatus.INVALID_PARAMETER)
    board = call.board
    port = board.connections.message_port(connection)
    if port is None:
        return Reply(HvStatus.INVALID_CONNECTION_ID)
    if not board.connections.take_buffer(port):
        board.gate.kick(port.vp_index)
        return Reply(HvStatus.INSUFFICIENT_BUFFERS)
    message = SynicMessage(sint=port.sint, type=type_, origin=connection, payload=payload[:size])
    board.tell(port.vp_index, Update(synic_message=message))
    return Reply(HvStatus.SUCCESS)


def signal_event(call: Call) -> Reply:
    """Sets an event flag of the receiver."""
    connection, number, reserved = _SIGNAL.unpack(call.header)
    if reserved:
        return Reply(HvStatus.INVALID_PARAMETER)
    port = call.board.connections.event_port(connection)
    if port is None:
        return Reply(HvStatus.INVALID_CONNECTION_ID)
    if number >= port.flags:
        return Reply(HvStatus.INVALID_PARAMETER)
    event = SynicEvent(sint=port.sint, flag=port.first + number)
    call.board.tell(port.vp_index, Update(synic_event=event))
    return Reply(HvStatus.SUCCESS)
