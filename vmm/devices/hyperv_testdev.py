"""The test device of kvm-unit-tests' Hyper-V images: makes SINT routes and connections (QEMU: hyperv_testdev.c).

One 32-bit port, 0x3000, write-only: SINT [7:0], VP index [15:8], command [23:16], connection ID [31:24]. What names a
processor, a SINT or a route that is not there does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from vmm.connections import Connections, EventPort, MessagePort
from vtlab.hyperv.synic import SINT_COUNT
from vtlab.v1.vcpu_pb2 import SynicInterrupt, Update

NAME = "hyperv-testdev"
PORT = 0x3000


class Command(IntEnum):
    ROUTE_CREATE = 1
    ROUTE_DESTROY = 2
    ROUTE_SET = 3
    MESSAGES_CREATE = 4
    MESSAGES_DESTROY = 5
    EVENTS_CREATE = 6
    EVENTS_DESTROY = 7


class _Order(NamedTuple):
    sint: int
    vp_index: int
    connection: int


class HypervTestDevice:
    """One device of one machine."""

    ports = (PORT,)

    def __init__(self, connections: Connections, vp_count: int, tell: Callable[[int, Update], None]) -> None:
        """`tell` gives an update to a VP, and has it come soon."""
        self._connections = connections
        self._vp_count = vp_count
        self._tell = tell
        self._routes: set[tuple[int, int]] = set()
        self._commands: dict[int, Callable[[_Order], None]] = {
            Command.ROUTE_CREATE: lambda order: self._routes.add((order.vp_index, order.sint)),
            Command.ROUTE_DESTROY: lambda order: self._routes.discard((order.vp_index, order.sint)),
            Command.ROUTE_SET: self._set,
            Command.MESSAGES_CREATE: self._connect_messages,
            Command.MESSAGES_DESTROY: lambda order: connections.disconnect_messages(order.connection),
            Command.EVENTS_CREATE: self._connect_events,
            Command.EVENTS_DESTROY: lambda order: connections.disconnect_events(order.connection),
        }

    def read(self, _port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, _port: int, size: int, value: int) -> tuple[Update, ...]:
        order = _Order(value & 0xFF, value >> 8 & 0xFF, value >> 24 & 0xFF)
        command = self._commands.get(value >> 16 & 0xFF)
        if size == 4 and command and order.sint < SINT_COUNT and order.vp_index < self._vp_count:
            command(order)
        return ()

    def _set(self, order: _Order) -> None:
        if (order.vp_index, order.sint) in self._routes:
            self._tell(order.vp_index, Update(synic_interrupt=SynicInterrupt(sint=order.sint)))

    def _connect_messages(self, order: _Order) -> None:
        self._connections.connect_messages(order.connection, MessagePort(order.vp_index, order.sint))

    def _connect_events(self, order: _Order) -> None:
        """The event flag has the number of the connection."""
        port = EventPort(order.vp_index, order.sint, order.connection, 1)
        self._connections.connect_events(order.connection, port)

    def save(self) -> bytes:
        return json.dumps(sorted(self._routes)).encode()

    def restore(self, state: bytes) -> None:
        try:
            routes = {(vp_index, sint) for vp_index, sint in json.loads(state)}
        except TypeError as error:
            raise ValueError(str(error)) from None
        self._routes.clear()  # the table of commands holds on to the set
        self._routes |= routes
