"""Numbered enters of one vCPU at one level: each is executed once, a repeated one is answered with the kept exit.

The contract (VcpuService.Run): enters count from 1; a repeated number is answered with the same exit and does nothing
twice, also on a new stream. Both levels use this; what executes an enter stays ignorant of numbers. Exits are bytes
(vtlab.run_messages).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vtlab.errors import Conflict
from vtlab.run_messages import numbered
from vtlab.v1 import vcpu_pb2

Execute = Callable[[vcpu_pb2.Enter], bytes]


class Session:
    """The last enter of one vCPU and its exit.

    `answer` may be called from any thread: a repeated number that arrives while the first is still executing waits for
    it. `running` is the number being executed, 0 if none; it may be read without waiting, to match a Kick.
    """

    def __init__(self, name: str, execute: Execute) -> None:
        """Args: `name` is the subject of errors, "vCPU 0 of VTL1"; `execute` runs an enter to its exit."""
        self.running = 0
        self._last = 0
        self._name = name
        self._execute = execute
        self._lock = threading.Lock()
        self._enter: vcpu_pb2.Enter | None = None
        self._exit: bytes | None = None
        self._restored = False

    @property
    def last(self) -> int:
        """Number of the last enter that was accepted, 0 if none."""
        return self._last

    @property
    def kept(self) -> tuple[int, bytes, bytes]:
        """The last enter that has an answer, for a store: number, enter and exit, serialized."""
        enter, exit_ = self._enter, self._exit
        if enter is None or exit_ is None:
            return 0, b"", b""
        return enter.sequence, enter.SerializeToString(), exit_

    def restore(self, last: int, enter: bytes, exit_: bytes) -> None:
        """Goes on from what `kept` said once. Enters since then changed nothing and may be missing: see answer()."""
        self._last, self._restored = last, True
        self._enter = vcpu_pb2.Enter.FromString(enter) if last else None
        self._exit = exit_ if last else None

    @property
    def last_enter(self) -> vcpu_pb2.Enter:
        """The last enter that was accepted, as it came; empty if there was none. Never waits."""
        return self._enter or vcpu_pb2.Enter()

    def answer(self, enter: vcpu_pb2.Enter) -> bytes:
        """Executes the enter, or returns the kept exit of a repeated one. The Exit carries the enter's number.

        Raises:
            Conflict: the number is neither the last nor the next, or it is repeated with another content.
            Whatever `execute` raises; the number is then used up and its repetition is refused too.
        """
        with self._lock:
            sequence, last = enter.sequence, self._last
            if sequence == last and last:
                return self._kept(enter)
            if sequence != last + 1 and not (self._restored and sequence > last):
                raise Conflict(self._name, f"enter {sequence} after enter {last}")
            self._restored = False
            self._enter, self._exit = enter, None
            self._last = self.running = sequence
            try:
                exit_ = self._execute(enter)
            finally:
                self.running = 0
            self._exit = answer = numbered(exit_, sequence)
            return answer

    def _kept(self, enter: vcpu_pb2.Enter) -> bytes:
        if enter != self._enter:
            raise Conflict(self._name, f"enter {enter.sequence} was repeated with another content")
        if self._exit is None:
            raise Conflict(self._name, f"enter {enter.sequence} failed")
        return self._exit
