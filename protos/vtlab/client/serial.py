"""What a machine's serial ports said, gathered in the background, and ways to wait for more."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from vtlab.client.names import state_name
from vtlab.errors import GuestLost, TimedOut, WrongState
from vtlab.v1 import vmm_pb2

ENDED = frozenset({vmm_pb2.MACHINE_STATE_STOPPED, vmm_pb2.MACHINE_STATE_FAILED})

# Resets with not a byte of output between them: the guest does not come back by itself.
SILENT_RESETS = 16

Pattern = str | re.Pattern[str]


def events_of(answer: vmm_pb2.WatchEventsResponse) -> Sequence[vmm_pb2.Event]:
    """The events of an answer, whether batches were asked for or not."""
    return answer.events or [answer.event]


class Observed:
    """State and serial output of one machine as its events told them. All methods are for any thread."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._changed = threading.Condition()
        self._output: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._machine = vmm_pb2.Machine()
        self._failure: Exception | None = None
        self._silent_resets = 0
        self.state_changes = 0
        self.lost = 0
        self.following = 0  # number of the next event; 0 before the first

    def take(self, answer: vmm_pb2.WatchEventsResponse) -> None:
        """Notes what happened and wakes who waits."""
        with self._changed:
            for event in events_of(answer):
                self._note(event)
            self._changed.notify_all()

    def _note(self, event: vmm_pb2.Event) -> None:
        detail = event.WhichOneof("detail")
        if detail == "serial":
            self._output[event.serial.port] += event.serial.data
            self._silent_resets = 0
        elif detail == "state":
            self._silent_resets += event.state.generation > self._machine.generation > 0
            self._machine = event.state
            self.state_changes += 1
        elif detail == "lost":
            self.lost += event.lost.count
        self.following = event.sequence + 1

    def fail(self, error: Exception) -> None:
        """No more events will come: who waits gets the error."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    @property
    def machine(self) -> vmm_pb2.Machine:
        with self._changed:
            return self._machine

    def changed_since(self, count: int) -> bool:
        """True if more state changes were seen than `count`."""
        return self.state_changes > count

    def shows(self, state: vmm_pb2.MachineState.ValueType) -> bool:
        """True if the last state seen is that one."""
        return self._machine.state == state

    def output(self, port: int, start: int = 0) -> bytes:
        """What the port said, from byte `start` on."""
        with self._changed:
            return bytes(self._output[port][start:])

    def wait(
        self, what: str, test: Callable[[], bool], timeout: float, until_end: bool = True, left: float | None = None
    ) -> None:
        """Blocks until test() holds; it runs under the lock, at each change.

        Args:
            what: for the error, "serial output 'ready'".
            test: looks at this object.
            timeout: seconds.
            until_end: give up as soon as the machine has ended, since nothing can come any more.
            left: seconds left of the timeout, where some were spent before this call.

        Raises:
            TimedOut, WrongState, GuestLost if the guest only resets itself any more, or what ended the stream.
        """
        deadline = time.monotonic() + (timeout if left is None else left)
        with self._changed:
            while not test():
                if self._failure is not None:
                    raise self._failure
                if until_end and self._machine.state in ENDED:
                    state = state_name(self._machine.state)
                    detail = f"is {state} ({self._machine.reason or 'no reason given'}), so no {what} can come"
                    raise WrongState(self._subject, detail, state=state, operation="wait")
                if until_end and self._silent_resets >= SILENT_RESETS:
                    reason = self._machine.reason or "no reason given"
                    detail = f"resets itself again and again ({reason}) and says nothing, so no {what} can come"
                    raise GuestLost(self._subject, detail)
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimedOut(self._subject, self._late(what, timeout), seconds=timeout)
                self._changed.wait(remaining)

    def _late(self, what: str, timeout: float) -> str:
        said = "; ".join(
            f"COM{port + 1} last said {bytes(data[-80:]).decode('utf-8', 'replace')!r}"
            for port, data in sorted(self._output.items())
            if data
        )
        lost = f"; {self.lost} events were lost" if self.lost else ""
        return f"no {what} in {timeout:g} s; {said or 'the serial ports said nothing'}{lost}"


class SerialReader:
    """Reads one port from a position of its own.

    Attributes:
        observed: the machine's output.
        position: bytes consumed.
    """

    def __init__(self, observed: Observed, port: int, position: int = 0) -> None:
        self.observed = observed
        self._port = port
        self.position = position

    def peek(self) -> str:
        """What came since the last read; it is not consumed."""
        return self.observed.output(self._port, self.position).decode("latin-1")

    def read(self) -> bytes:
        """What came since the last read, maybe nothing."""
        data = self.observed.output(self._port, self.position)
        self.position += len(data)
        return data

    def read_until(self, pattern: Pattern, timeout: float = 10.0) -> str:
        """Waits for the text or regular expression, and consumes and returns all up to its end.

        Raises:
            TimedOut: it did not come; nothing is consumed.
            WrongState: the machine ended, so it cannot come.
        """
        expression = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        read = ""

        def found() -> bool:
            nonlocal read
            text = self.peek()
            match = expression.search(text)
            if match is None:
                return False
            read = text[: match.end()]
            return True

        self.observed.wait(f"serial output {expression.pattern!r} on COM{self._port + 1}", found, timeout)
        self.position += len(read)
        return read

    def read_line(self, timeout: float = 10.0) -> str:
        """Waits for a whole line and returns it without its end."""
        return self.read_until("\n", timeout).rstrip("\r\n")


def read_first(
    readers: Sequence[tuple[SerialReader, Pattern]],
    timeout: float = 10.0,
    give_up: Callable[[vmm_pb2.Machine], bool] = lambda _machine: False,
) -> tuple[int, str]:
    """Waits for any of several, all of one machine: the index of the one that came, and what it said up to its end.

    Args:
        give_up: of the machine as its last event told it; where it is true first, the answer is -1 and "".

    Raises:
        TimedOut, WrongState: see SerialReader.read_until; nothing is consumed.
    """
    expressions = [re.compile(re.escape(one)) if isinstance(one, str) else one for _, one in readers]
    came = 0

    def found() -> bool:
        nonlocal came
        for index, (reader, _) in enumerate(readers):
            if expressions[index].search(reader.peek()):
                came = index
                return True
        came = -1
        return give_up(readers[0][0].observed.machine)

    what = " or ".join(repr(expression.pattern) for expression in expressions)
    readers[0][0].observed.wait(f"serial output {what}", found, timeout)
    if came < 0:
        return came, ""
    reader, pattern = readers[came]
    return came, reader.read_until(pattern, timeout)
