"""One virtual processor of a machine: its number at both levels and what its next enter carries.

run_guest() is the one place through which VTL0 goes on: the Enter that leaves it is complete (resolution of the open
exit, then every update that others posted), and nothing else changes that vCPU. A journal of decisions belongs there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from vmm.gate import Gate
from vmm.intercept_filter import Watched
from vmm.level import Level
from vmm.vtl import VpVtl
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, InterceptFilter, Resolution, Update

_RESUME = vcpu_pb2.ENTER_REASON_RESUME


class Processor:
    """State of one vCPU that belongs to the VMM.

    Attributes:
        index: VP index.
        vtl: its virtual trust levels.
        watched: what VTL1 wants to see of VTL0 on this vCPU.
        resumed: number of the last enter of VTL0.
    """

    def __init__(self, index: int, guest: Level, monitor: Level | None, gate: Gate, vtl: VpVtl) -> None:
        self.index = index
        self.vtl = vtl
        self.watched = Watched(InterceptFilter())
        self.resumed = 0
        self._guest = guest
        self._monitor = monitor
        self._monitor_sequence = 0
        self._gate = gate
        self._pending: list[Update] = []
        self._lock = threading.Lock()

    def post(self, *updates: Update) -> None:
        """Adds updates to the next enter of VTL0, in order. Thread-safe; does not make the vCPU exit."""
        with self._lock:
            self._pending += updates

    @property
    def waiting(self) -> int:
        """Updates that wait for the next enter of VTL0."""
        return len(self._pending)

    def resume(self, resolution: Resolution | None = None, updates: Iterable[Update] = ()) -> Enter:
        """The enter that answers the open exit."""
        self.resumed += 1
        return Enter(vp_index=self.index, sequence=self.resumed, reason=_RESUME, resolution=resolution, updates=updates)

    def run_guest(self, enter: Enter) -> Exit:
        """Runs VTL0 until its next exit.

        Raises:
            Cancelled: the machine is being stopped.
            PeerUnavailable, GuestMisbehaved: see Level.enter.
        """
        kick_first = self._gate.enter(self.index, enter.sequence)
        try:
            if self._pending:
                with self._lock:
                    enter.updates.extend(self._pending)
                    self._pending.clear()
            if kick_first:
                self._guest.kick(self.index, enter.sequence)
            return self._guest.enter(enter)
        finally:
            self._gate.leave(self.index)

    def run_monitor(self, enter: Enter) -> Exit:
        """Runs VTL1 until its next exit; fills in vCPU and number.

        Raises:
            PeerUnavailable: there is no monitor, it is gone, or it does not answer in time.
            GuestMisbehaved: see Level.enter.
        """
        assert self._monitor is not None, "VTL1 was enabled without a monitor"
        self._monitor_sequence += 1
        enter.vp_index = self.index
        enter.sequence = self._monitor_sequence
        return self._monitor.enter(enter)
