"""One virtual processor of a machine: its number at both levels and what its next enter carries.

run() is the one place through which guest code goes on: the Enter that leaves it is complete (resolution of the open
exit, then every update that others posted), and nothing else changes that vCPU. A journal of decisions belongs there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from vmm.gate import Gate
from vmm.intercept_filter import Watched
from vmm.level import Level
from vmm.vtl import VTL0, VTL1, VpVtl
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, InterceptFilter, Resolution, Update

Answer = TypeVar("Answer")

_RESUME = vcpu_pb2.ENTER_REASON_RESUME


class Processor:
    """State of one vCPU that belongs to the VMM.

    Attributes:
        index: VP index.
        vtl: its virtual trust levels.
        watched: what VTL1 wants to see of VTL0 on this vCPU.
        resumed: number of the last enter of VTL0.
        suspended: how the open exit of each level ends when that level goes on; for levels that are not active.
    """

    def __init__(self, index: int, guest: Level, monitor: Level | None, gate: Gate, vtl: VpVtl) -> None:
        self.index = index
        self.vtl = vtl
        self.watched = Watched(InterceptFilter())
        self.resumed = 0
        self.suspended: list[Resolution | None] = [None, None]
        self._guest = guest
        self._monitor = monitor
        self._entered = guest
        self._ready: Callable[[], bool] | None = None
        self._monitor_sequence = 0
        self._gate = gate
        self._pending: list[Update] = []
        self._pending_upper: list[Update] = []
        self._lock = threading.Lock()

    def post(self, *updates: Update, vtl: int = VTL0) -> None:
        """Adds updates to the next enter of a level, in order. Thread-safe; does not make the vCPU exit."""
        with self._lock:
            self._waiting_for(vtl).extend(updates)

    def post_once(self, update: Update, vtl: int = VTL0) -> None:
        """Adds an update to the next enter of a level, unless the same one waits already. Thread-safe."""
        with self._lock:
            waiting = self._waiting_for(vtl)
            if update not in waiting:
                waiting.append(update)

    def _waiting_for(self, vtl: int) -> list[Update]:
        return self._pending_upper if vtl else self._pending

    @property
    def waiting(self) -> int:
        """Updates that wait for the next enter of VTL0."""
        return len(self._pending)

    def resume(
        self,
        resolution: Resolution | None = None,
        updates: Iterable[Update] = (),
        reason: vcpu_pb2.EnterReason.ValueType = _RESUME,
    ) -> Enter:
        """The enter of the active level that answers its open exit."""
        if self.vtl.active == VTL1:
            self._monitor_sequence += 1
            sequence = self._monitor_sequence
        else:
            self.resumed += 1
            sequence = self.resumed
        enter = Enter()  # the constructor takes thrice as long as these lines if a message is among its arguments
        enter.vp_index = self.index
        enter.sequence = sequence
        enter.reason = reason
        if resolution is not None:
            enter.resolution.CopyFrom(resolution)
        if updates:
            enter.updates.extend(updates)
        return enter

    def run(self, enter: Enter) -> Exit:
        """Runs the active level, which is guest code, until its next exit.

        Raises:
            Cancelled: the machine is being stopped.
            PeerUnavailable, GuestMisbehaved: see Level.enter.
        """
        vtl = self.vtl.active
        self._entered = self._guest if vtl == VTL0 else self._require_monitor()
        try:
            self._admit(enter, vtl)
            return self._entered.enter(enter)
        finally:
            self._gate.leave(self.index)

    def _admit(self, enter: Enter, vtl: int) -> None:
        """Waits until the vCPU may run at that level; it counts as inside from then on."""
        ready, self._ready = self._ready, None
        if ready is not None:
            self._gate.wait(self.index, ready)
        kick_first = self._gate.enter(self.index, enter.sequence, vtl)
        self._prepare(self._entered, vtl, enter, kick_first)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """The next enter waits for that first, unless an interrupt for VTL1 comes or somebody holds the gate."""
        self._ready = ready

    def drive(self, enter: Enter, serve: Callable[[Exit], Answer | Enter]) -> Answer:
        """Runs VTL0 from exit to exit, with the enters that `serve` gives, until it gives something else.

        For machines whose VTL1 is no guest code: VTL0 is always the active level between exits. Raises as run().
        """
        endings: list[Answer] = []

        def following(exit_: Exit) -> Enter | None:
            self._gate.leave(self.index)
            answer = serve(exit_)
            if isinstance(answer, Enter):
                self._admit(answer, VTL0)
                return answer
            endings.append(answer)
            return None

        self._admit(enter, VTL0)
        self._guest.drive(enter, following)
        return endings[0]

    def settle(self) -> Exit:
        """Has VTL0 apply what waits for it while VTL1 is active: it exits again before it runs an instruction.

        Its registers can be read then, and updates posted later find the open exit ended.

        Raises:
            PeerUnavailable, GuestMisbehaved: see Level.enter.
        """
        self.resumed += 1
        resolution, self.suspended[VTL0] = self.suspended[VTL0], None
        enter = Enter(vp_index=self.index, sequence=self.resumed, reason=_RESUME, resolution=resolution)
        self._prepare(self._guest, VTL0, enter, True)
        return self._guest.enter(enter)

    @property
    def settled(self) -> bool:
        """Nothing waits for VTL0 that would change its registers."""
        resolution = self.suspended[VTL0]
        ended = resolution is None or resolution.action == vcpu_pb2.ACTION_RETRY
        return ended and not self._pending

    def _prepare(self, level: Level, vtl: int, enter: Enter, kick_first: bool) -> None:
        """Puts what waits into an enter that is about to leave."""
        pending = self._pending_upper if vtl else self._pending
        if pending:
            with self._lock:
                enter.updates.extend(pending)
                pending.clear()
        if kick_first:
            level.kick(self.index, enter.sequence)

    def kick(self, sequence: int) -> bool:
        """Makes the enter that is being run exit soon."""
        return self._entered.kick(self.index, sequence)

    def run_monitor(self, enter: Enter) -> Exit:
        """Runs VTL1 as a policy until its next exit; fills in vCPU and number.

        Raises:
            PeerUnavailable: there is no monitor, it is gone, or it does not answer in time.
            GuestMisbehaved: see Level.enter.
        """
        self._monitor_sequence += 1
        enter.vp_index = self.index
        enter.sequence = self._monitor_sequence
        return self._require_monitor().enter(enter)

    def _require_monitor(self) -> Level:
        assert self._monitor is not None, "VTL1 was enabled without a monitor"
        return self._monitor
