"""One vCPU of a level that runs guest code: between its stream and the core, and the interrupts that wait for it.

Both processes that host a core use it (vtl0_guest, and vtl1_monitor for the guest-code personality).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

from vtlab.errors import BadArgument, Conflict, WrongState
from vtlab.session import Execute, Session
from vtlab.v1 import registers_pb2, vcpu_pb2


class Processor(Protocol):
    """What the core offers for one vCPU (vtl0_guest/cpu/processor.py)."""

    def run(self, enter: vcpu_pb2.Enter) -> bytes:
        """Runs until the next exit, which it gives as a serialized Exit."""
        ...

    def kick(self) -> None:
        """Makes the current run(), or else the next one, exit soon. Thread-safe."""
        ...

    def state(self) -> registers_pb2.ProcessorState:
        """Registers; only while not running."""
        ...


class Vcpu:
    """Executes numbered enters on a processor of the core. Thread-safe.

    Attributes:
        name: "vCPU 0 of VTL0", the subject of its errors.
    """

    def __init__(self, index: int, vtl: int, processor: Processor) -> None:
        self.name = f"vCPU {index} of VTL{vtl}"
        self._index = index
        self._processor = processor
        self._session = Session(self.name, self._execute)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stopping = 0  # threads in stop()
        self._running = 0
        self._exited = 0
        self._kicked = 0
        self._stream = 0

    @property
    def running(self) -> bool:
        """An enter is being executed."""
        return self._running != 0

    @property
    def exited(self) -> int:
        """Number of the last enter that ended."""
        return self._exited

    def stream(self) -> Execute:
        """Begins a stream: what answers each of its enters. A stream that begins later takes over, and this one ends.

        The answering function raises:
            Conflict: another stream took over, or a number is neither the last nor the next.
            BadArgument: an enter is for another vCPU.
        """
        with self._lock:
            self._stream += 1
            stream = self._stream

        def answer(enter: vcpu_pb2.Enter) -> bytes:
            if enter.vp_index != self._index:
                raise BadArgument("vp_index", f"{enter.vp_index} on the stream of {self.name}")
            if stream == self._stream:
                exit_ = self._session.answer(enter)
                if stream == self._stream:
                    return exit_
            raise Conflict(self.name, "another stream took over")

        return answer

    @property
    def last_enter(self) -> vcpu_pb2.Enter:
        """See Session.last_enter."""
        return self._session.last_enter

    def answer(self, enter: vcpu_pb2.Enter) -> bytes:
        """Executes an enter, or repeats the exit of one that was executed. Raises as Session.answer()."""
        return self._session.answer(enter)

    def _execute(self, enter: vcpu_pb2.Enter) -> bytes:
        sequence = enter.sequence
        with self._lock:
            self._running = sequence
            if self._kicked == sequence:
                self._processor.kick()
        try:
            return self._processor.run(enter)
        finally:
            # Without the lock: who waits in stop() has said so before it looks whether something runs.
            self._exited, self._running = sequence, 0
            if self._stopping:
                with self._idle:
                    self._idle.notify_all()

    def kick(self, sequence: int) -> bool:
        """Makes that enter exit soon, also if it has not arrived yet. False if it has exited already."""
        with self._lock:
            if sequence <= self._exited:
                return False
            self._kicked = sequence
            if self._running == sequence:
                self._processor.kick()
            return True

    def stop(self, timeout: float) -> bool:
        """Makes what runs exit, whatever its number, and waits `timeout` seconds for it. True if nothing runs now."""
        with self._idle:
            if self._running:
                self._processor.kick()
            self._stopping += 1
            try:
                return self._idle.wait_for(lambda: not self._running, timeout)
            finally:
                self._stopping -= 1

    def state(self) -> registers_pb2.ProcessorState:
        """Raises WrongState while an enter is being executed."""
        with self._lock:
            if self._running:
                raise WrongState(self.name, state="running", operation="read its state")
            return self._processor.state()


class Wakes:
    """Interrupts that became deliverable on vCPUs that are not entered, for whoever listens (VcpuService.Events)."""

    def __init__(self) -> None:
        self._listeners: list[SimpleQueue[vcpu_pb2.EventsResponse | None]] = []

    @property
    def heard(self) -> bool:
        """Somebody listens."""
        return bool(self._listeners)

    def report(self, vp_index: int, vector: int, after: int) -> None:
        """From any thread. `after`: number of the enter whose exit is open."""
        pending = vcpu_pb2.InterruptPending(vector=vector, after=after)
        for queue in list(self._listeners):
            queue.put(vcpu_pb2.EventsResponse(vp_index=vp_index, interrupt_pending=pending))

    def stream(self, on_end: Callable[[Callable[[], None]], object]) -> Iterator[vcpu_pb2.EventsResponse]:
        """What is reported from now on.

        Args:
            on_end: is given a function that ends the iteration, from any thread; returns False if it should end now.
        """
        queue: SimpleQueue[vcpu_pb2.EventsResponse | None] = SimpleQueue()
        self._listeners.append(queue)
        if on_end(lambda: queue.put(None)) is False:
            queue.put(None)
        try:
            yield from iter(queue.get, None)
        finally:
            self._listeners.remove(queue)

    def close(self) -> None:
        """Ends all streams."""
        for queue in list(self._listeners):
            queue.put(None)
