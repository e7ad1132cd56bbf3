"""Where the threads of the vCPUs pass before each enter of VTL0, and where they can be held.

A vCPU is INSIDE (the guest runs it), BUSY (its exit is being handled, perhaps by VTL1), PARKED (held here with its
next enter ready) or GONE. Moving pages needs that nobody is INSIDE; a client that looks at or changes a vCPU needs all
PARKED: while an exit is open, that vCPU's state cannot change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto

from vtlab.errors import Cancelled, TimedOut, WrongState

# Seconds between kicks of a vCPU that does not come out: a kick can overtake the enter that it is meant for.
_KICK_AGAIN = 0.1
# Seconds for a vCPU to come out, or for its open exit to be answered.
PATIENCE = 30.0


class Place(Enum):
    BUSY = auto()
    INSIDE = auto()
    PARKED = auto()
    GONE = auto()


# Looking a member up in its class takes longer than all else that an exit has to do here.
_BUSY, _INSIDE = Place.BUSY, Place.INSIDE


class Gate:
    """One for all vCPUs of a machine's generation. Thread-safe."""

    def __init__(self, vp_count: int, kick: Callable[[int, int], object]) -> None:
        """:param kick: makes the guest leave (vp_index, sequence) soon; must not block for long."""
        self._kick = kick
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._places = [Place.BUSY] * vp_count
        self._sequences = [0] * vp_count
        self._holds = 0
        # (VP index, VTL): a level that waits in HLT does not hold back the one above it.
        self._halted: set[tuple[int, int]] = set()
        self._interrupted: set[int] = set()
        self._levels = [0] * vp_count
        self._flushing: set[int] = set()
        self._watchers = 0
        self._closed = False

    # ------------------------------------------------------------------------------------- the threads of the vCPUs

    def enter(self, vp_index: int, sequence: int, vtl: int = 0) -> bool:
        """Waits until this vCPU may run; it counts as INSIDE from then on.

        Args:
            vtl: the level that is entered. An interrupt for VTL1 lets VTL0 through although it halts, kicked.

        Returns:
            True if it has to be kicked before it is entered, since it is meant to apply updates and run nothing.

        Raises:
            Cancelled: the machine is being stopped.
        """
        with self._lock:  # the condition's own, without its method calls: every exit comes through here
            while self._holds or self._closed or (self._halted and self._waits(vp_index, vtl)):
                if self._closed:
                    raise Cancelled(f"vCPU {vp_index}", "the machine is being stopped")
                if vp_index in self._flushing:
                    break
                self._places[vp_index] = Place.PARKED
                self._condition.notify_all()
                self._condition.wait()
            self._places[vp_index] = _INSIDE
            self._sequences[vp_index] = sequence
            self._levels[vp_index] = vtl
            return vp_index in self._flushing or (not vtl and vp_index in self._interrupted)

    def _waits(self, vp_index: int, vtl: int) -> bool:
        return (vp_index, vtl) in self._halted and (vtl > 0 or vp_index not in self._interrupted)

    def found_inside(self, vp_index: int, sequence: int, vtl: int = 0) -> None:
        """A VMM that was restarted knows that this enter was made and not whether the vCPU has exited since."""
        with self._lock:
            self._places[vp_index] = Place.INSIDE
            self._sequences[vp_index] = sequence
            self._levels[vp_index] = vtl

    def back_out(self, vp_index: int) -> None:
        """The vCPU was let in and has not been entered; it will come again."""
        with self._lock:
            self._places[vp_index] = Place.BUSY
            self._condition.notify_all()

    def leave(self, vp_index: int) -> None:
        """The vCPU has exited."""
        with self._lock:
            self._places[vp_index] = _BUSY
            self._flushing.discard(vp_index)
            if self._watchers:
                self._condition.notify_all()

    def gone(self, vp_index: int) -> None:
        """The thread of the vCPU ends."""
        with self._condition:
            self._places[vp_index] = Place.GONE
            self._flushing.discard(vp_index)
            self._condition.notify_all()

    def halt(self, vp_index: int, vtl: int = 0) -> None:
        """The vCPU parks at its next enter of that level until wake(): HLT that no interrupt can end."""
        with self._condition:
            self._halted.add((vp_index, vtl))

    def halted(self, vp_index: int) -> list[int]:
        """Levels of the vCPU that wait in HLT."""
        with self._lock:
            return sorted(vtl for vp, vtl in self._halted if vp == vp_index)

    def take_interrupt(self, vp_index: int) -> bool:
        """Whether an interrupt for VTL1 was reported, once."""
        with self._condition:
            waited = vp_index in self._interrupted
            self._interrupted.discard(vp_index)
            return waited

    # ------------------------------------------------------------------------------------------------ everybody else

    def hold(self) -> None:
        """No vCPU enters from now on, until as many calls of release()."""
        with self._condition:
            self._holds += 1
            self._condition.notify_all()

    def release(self) -> None:
        with self._condition:
            self._holds -= 1
            self._condition.notify_all()

    def park(self, patience: float = PATIENCE) -> None:
        """hold(), and waits until every vCPU is parked. Raises TimedOut, and holds nothing then."""
        self.hold()
        try:
            self._await((Place.PARKED, Place.GONE), "its open exit is not answered", patience)
        except TimedOut:
            self.release()
            raise

    def wake(self, vp_index: int, vtl: int = 0) -> None:
        """Ends halt()."""
        with self._condition:
            self._halted.discard((vp_index, vtl))
            self._condition.notify_all()

    def interrupt(self, vp_index: int) -> None:
        """VTL1 has an interrupt to take: VTL0 comes out, also from halt(), and whoever serves its exit switches."""
        with self._condition:
            self._interrupted.add(vp_index)
            inside = self._places[vp_index] is Place.INSIDE and not self._levels[vp_index]
            sequence = self._sequences[vp_index]
            self._condition.notify_all()
        if inside:
            self._kick(vp_index, sequence)

    def wait(self, vp_index: int, ready: Callable[[], bool]) -> None:
        """Blocks a vCPU that is outside until `ready`, an interrupt for its VTL1, or anybody who waits for it to park.

        Raises:
            Cancelled: the machine is being stopped.
        """
        with self._condition:
            while not (ready() or vp_index in self._interrupted or self._holds):
                if self._closed:
                    raise Cancelled(f"vCPU {vp_index}", "the machine is being stopped")
                self._condition.wait()

    def changed(self) -> None:
        """Something that wait() looks at may have changed."""
        with self._condition:
            self._condition.notify_all()

    def kick(self, vp_index: int) -> None:
        """Makes the vCPU come out if it is INSIDE."""
        with self._condition:
            inside = self._places[vp_index] is Place.INSIDE
            sequence = self._sequences[vp_index]
        if inside:
            self._kick(vp_index, sequence)

    def close(self, patience: float = PATIENCE) -> None:
        """Every thread that waits here or comes here gets Cancelled; returns when all have ended.

        Raises:
            TimedOut: a level does not let a vCPU out.
        """
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._await((Place.GONE,), "it does not stop", patience)

    @contextmanager
    def none_inside(self, patience: float = PATIENCE) -> Iterator[None]:
        """No vCPU runs in VTL0 within the block. May be used by the thread of a vCPU that is outside itself.

        Raises:
            TimedOut: a vCPU does not come out.
        """
        self.hold()
        try:
            self._await((Place.BUSY, Place.PARKED, Place.GONE), "the guest does not leave when kicked", patience)
            yield
        finally:
            self.release()

    @contextmanager
    def all_parked(self, patience: float = PATIENCE) -> Iterator[None]:
        """Every vCPU is parked, no exit open, within the block. Not for the threads of vCPUs.

        Raises:
            TimedOut: a vCPU does not come out, or VTL1 does not answer.
        """
        self.park(patience)
        try:
            yield
        finally:
            self.release()

    def flush(self, vp_index: int, patience: float = PATIENCE) -> None:
        """Lets a parked vCPU through once, kicked beforehand, so that its pending updates are applied; parked again.

        Raises:
            WrongState: its thread has ended.
            TimedOut: it does not come back.
        """
        with self._condition:
            if self._places[vp_index] is Place.GONE:
                raise WrongState(f"vCPU {vp_index}", state="ended", operation="apply updates")
            self._flushing.add(vp_index)
            self._places[vp_index] = Place.BUSY
            self._condition.notify_all()
        self._await((Place.PARKED, Place.GONE), "it does not apply updates", patience)

    def _await(self, places: tuple[Place, ...], complaint: str, patience: float) -> None:
        deadline = time.monotonic() + patience
        with self._condition:
            self._watchers += 1
        try:
            while True:
                with self._condition:
                    late = [vp for vp, place in enumerate(self._places) if place not in places]
                    inside = [(vp, self._sequences[vp]) for vp in late if self._places[vp] is Place.INSIDE]
                    if not late:
                        return
                    if time.monotonic() > deadline:
                        raise TimedOut(f"vCPU {late[0]}", f"{complaint} within {patience:g} s", seconds=patience)
                for vp_index, sequence in inside:
                    self._kick(vp_index, sequence)
                with self._condition:
                    if any(self._places[vp] not in places for vp in late):
                        self._condition.wait(_KICK_AGAIN)
        finally:
            with self._condition:
                self._watchers -= 1
