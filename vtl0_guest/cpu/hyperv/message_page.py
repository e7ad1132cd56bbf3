"""The SIMP page and the queues before it: one slot for each SINT, filled in order, never over a message unread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vtl0_guest.cpu.hyperv.pages import GuestMemory, MsrPage
from vtlab.hyperv.synic import (
    MESSAGE_PENDING,
    SINT_COUNT,
    SLOT_FLAGS_OFFSET,
    SLOT_SIZE,
    SlotHeader,
    encode_message,
)


class Message(NamedTuple):
    """A message on its way.

    Attributes:
        payload: gives the bytes at the moment of delivery (a timer's tells it).
        left: called when it leaves the queue, delivered or not.
        drop_if_busy: not worth waiting.
    """

    type: int
    origin: int
    payload: Callable[[], bytes]
    left: Callable[[], None]
    drop_if_busy: bool = False


class MessagePage(MsrPage):
    """SIMP with a queue for each SINT."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self._queues: list[deque[Message]] = [deque() for _ in range(SINT_COUNT)]

    def queue(self, sint: int, message: Message) -> None:
        self._queues[sint].append(message)

    def cancel(self, sint: int, message: Message) -> None:
        """Takes back what has not been delivered; does nothing if it has."""
        queue = self._queues[sint]
        for index, queued in enumerate(queue):
            if queued is message:
                del queue[index]
                return

    def waiting(self) -> Iterator[int]:
        """SINTs whose queue is not empty."""
        return (sint for sint, queue in enumerate(self._queues) if queue)

    def waits(self, sint: int) -> bool:
        return bool(self._queues[sint])

    def deliver(self, sint: int, *, receptive: bool) -> bool:
        """Moves the first message to the slot if it is free, and says in the slot whether more wait.

        Args:
            receptive: the SINT takes messages now. If not, only those not worth waiting leave, undelivered.

        Returns:
            Whether a message was written.
        """
        queue = self._queues[sint]
        delivered = receptive and self._fill(sint, queue)
        # What is left of the queue's head found the slot taken or the SINT closed.
        for message in [message for message in queue if message.drop_if_busy]:
            queue.remove(message)
            message.left()
        if queue and receptive:
            self._announce_more(sint)
        return delivered

    def _fill(self, sint: int, queue: deque[Message]) -> bool:
        raw = self.read(sint * SLOT_SIZE, 16)
        if not queue or raw is None or SlotHeader.decode(raw).type or not self.writable():
            return False
        message = queue.popleft()
        self.write(sint * SLOT_SIZE, encode_message(message.type, message.origin, message.payload()))
        message.left()
        return True

    def _announce_more(self, sint: int) -> None:
        """MessagePending: the guest must write EOM once it has emptied the slot."""
        at = sint * SLOT_SIZE + SLOT_FLAGS_OFFSET
        flags = self.read(at, 1)
        if flags is not None and not flags[0] & MESSAGE_PENDING:
            self.write(at, bytes([flags[0] | MESSAGE_PENDING]))

    def reset(self) -> None:
        """Everything queued is gone, as after a reset of the processor."""
        super().reset()
        queues, self._queues = self._queues, [deque() for _ in range(SINT_COUNT)]
        for queue in queues:
            for message in queue:
                message.left()
