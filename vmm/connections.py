"""Ports and connections of a partition: where HvCallPostMessage and HvCallSignalEvent lead (TLFS, "Inter-Partition
Communication").

There is one partition, so every connection leads back into it. Messages are counted: a port takes as many as its
receiver has buffers for, and gets them back as the receiver's processor reports them delivered (Exit.synic_delivered).
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# Messages that may wait for one SINT of one processor.
BUFFERS = 16


class MessagePort(NamedTuple):
    """Messages go to this SINT of that VP in VTL0."""

    vp_index: int
    sint: int


class EventPort(NamedTuple):
    """Event flag number n of the port is flag `first` + n; there are `flags` of them."""

    vp_index: int
    sint: int
    first: int
    flags: int


class Connections:
    """Connection IDs are 24 bits; messages and events have their own. Thread-safe.

    Attributes:
        changes: how often something changed; what save() gives is the same for as long as this is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: dict[int, MessagePort] = {}
        self._events: dict[int, EventPort] = {}
        self._taken: Counter[MessagePort] = Counter()
        self.changes = 0

    def connect_messages(self, connection: int, port: MessagePort) -> None:
        """Replaces what was there."""
        with self._lock:
            self.changes += 1
            self._messages[connection] = port

    def connect_events(self, connection: int, port: EventPort) -> None:
        with self._lock:
            self.changes += 1
            self._events[connection] = port

    def disconnect_messages(self, connection: int) -> None:
        """What was posted arrives all the same."""
        with self._lock:
            self.changes += 1
            self._messages.pop(connection, None)

    def disconnect_events(self, connection: int) -> None:
        with self._lock:
            self.changes += 1
            self._events.pop(connection, None)

    def message_port(self, connection: int) -> MessagePort | None:
        return self._messages.get(connection)

    def event_port(self, connection: int) -> EventPort | None:
        return self._events.get(connection)

    def take_buffer(self, port: MessagePort) -> bool:
        """False if the receiver has none left."""
        with self._lock:
            if self._taken[port] >= BUFFERS:
                return False
            self.changes += 1
            self._taken[port] += 1
            return True

    def give_back(self, vp_index: int, sints: Iterable[int]) -> None:
        """The processor has delivered a message for each of these SINTs. Other levels' messages were never counted."""
        with self._lock:
            self.changes += 1
            for sint in sints:
                port = MessagePort(vp_index, sint)
                if self._taken[port]:
                    self._taken[port] -= 1

    def save(self) -> bytes:
        """All of it, for restore()."""
        with self._lock:
            return json.dumps([list(part.items()) for part in (self._messages, self._events, self._taken)]).encode()

    def restore(self, state: bytes) -> None:
        """Raises ValueError."""
        try:
            messages, events, taken = json.loads(state)
            with self._lock:
                self.changes += 1
                self._messages = {connection: MessagePort(*port) for connection, port in messages}
                self._events = {connection: EventPort(*port) for connection, port in events}
                self._taken = Counter({MessagePort(*port): count for port, count in taken})
        except TypeError as error:
            raise ValueError(str(error)) from None
