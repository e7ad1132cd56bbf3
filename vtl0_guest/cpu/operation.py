"""An instruction that waits for somebody's decision: what exited, and what each decision does.

Commit uses the values captured here, never a second fetch from guest memory or registers (vcpu.proto, Action).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtl0_guest.cpu.gates import Event
from vtlab.v1 import vcpu_pb2


@dataclass(slots=True)
class Operation:
    """An open exit.

    Attributes:
        exit: the exit with its reason; registers and instruction are added when it leaves.
        commit: does what was judged, with the value given (the captured one, or what REPLACE puts in its place). None:
            the operation cannot be committed here.
        value: what COMMIT passes to `commit`.
        complete: takes the result of an operation done elsewhere. None: there is nothing to complete.
        ends: whether the instruction is over after commit, complete or skip, so that RIP moves on.
        length: decoded length; 0 if unknown.
        code: instruction bytes.
        event: what was being delivered when the nested table refused its frame; RETRY delivers it again.
        shuts_down: whatever is not committed is a shutdown: there is no instruction that could fault instead.
        stays_stopped: only a reset by a client goes on from here.
        refuse: what DENY and SKIP do where there is no instruction to refuse, and the fault is not the default one.
    """

    exit: vcpu_pb2.Exit
    commit: Callable[[int], None] | None = None
    value: int = 0
    complete: Callable[[int], None] | None = None
    ends: bool = True
    length: int = 0
    code: bytes = b""
    stays_stopped: bool = False
    event: Event | None = None
    shuts_down: bool = False
    refuse: Callable[[vcpu_pb2.Resolution], None] | None = None

    @property
    def decidable(self) -> bool:
        """Whether the exit asks for a decision at all: KICKED and OUTPUT, for instance, do not."""
        return self.commit is not None or self.complete is not None or self.event is not None
