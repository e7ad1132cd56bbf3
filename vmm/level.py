"""A level of a machine as the VMM uses it; vmm.peers reaches one in another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vtlab.errors import PeerUnavailable
from vtlab.v1.registers_pb2 import ProcessorState
from vtlab.v1.vcpu_pb2 import AttachRequest, AttachResponse, Enter, Exit


class LevelLost(PeerUnavailable):
    """A level was started anew and holds nothing of the machine any more. It can only be reset."""


class Recoveries:
    """How often a level went away and came back. One writer at a time.

    Attributes:
        seconds: that it took, all together.
        longest: of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = self.longest = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds
        self.longest = max(self.longest, seconds)


class Level(Protocol):
    """The vCPUs of one level: each is entered and exits."""

    @property
    def recoveries(self) -> Recoveries:
        """Since this VMM serves it."""

    @property
    def name(self) -> str:
        """Role and address, for errors."""

    @property
    def vtl(self) -> int:
        """0 or 1."""

    def attach(self, request: AttachRequest) -> AttachResponse | None:
        """Binds the level to a machine. Raises what the level refuses with, or PeerUnavailable."""

    def reconnect(self, request: AttachRequest) -> list[Enter]:
        """For a VMM that has lost what it knew: the last enter of each vCPU, empty where there was none.

        Args:
            request: that of attach().

        Raises:
            LevelLost: the level does not hold that generation of the machine.
            PeerUnavailable: it does not come back within the time that a restart may take.
        """

    def detach(self, vm: str, *, reset: bool = False) -> None:
        """Makes the level forget the machine, but for what outlives a reset if it is one."""

    def enter(self, enter: Enter) -> Exit:
        """Runs a vCPU until it exits.

        Raises:
            PeerUnavailable: the level is gone, or did not answer in time.
            GuestMisbehaved: its answer is not one to this enter.
            Cancelled: hang_up() was called.
        """

    def drive(self, enter: Enter, answer: Callable[[Exit], Enter | None]) -> None:
        """Runs a vCPU from exit to exit, with what `answer` makes of each, until it gives None.

        Costs less than as many calls of enter(), which must not be called for that vCPU meanwhile. Raises as enter(),
        and what `answer` raises; it may be called on another thread.
        """

    def kick(self, vp_index: int, sequence: int) -> bool:
        """Makes that enter exit soon. False if it had exited already, or if the level cannot be reached."""

    def state(self, vp_index: int) -> ProcessorState:
        """Reads a vCPU that is not running."""

    def listen(self, interrupted: Callable[[int, int], None]) -> None:
        """Has `interrupted` called when an interrupt waits for a vCPU that is not entered.

        Its arguments are the VP index and the number of the enter after whose exit the interrupt waits.

        Calls come from another thread; a few may come late or for nothing.
        """

    def hang_up(self) -> None:
        """Who waits in enter() gets Cancelled."""

    def close(self) -> None:
        """Lets go of everything that belongs to this machine."""
