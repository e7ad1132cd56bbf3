"""One virtual processor of a machine: its number at both levels and what its next enter carries.

The Enter that leaves _admit() is complete (resolution of the open exit, then every update that others posted), and
nothing else changes that vCPU. Updates leave in a transaction: a restarted VMM knows from the journal and from the
number of the last enter that the level has seen what is still to be sent (vmm.ledger).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from vmm import plain
from vmm.gate import Gate
from vmm.intercept_filter import Watched
from vmm.ledger import Ledger
from vmm.level import Level
from vmm.vtl import VTL0, VTL1, VpVtl
from vtlab.v1 import vcpu_pb2
from vtlab.v1.journal_pb2 import VcpuRecord
from vtlab.v1.vcpu_pb2 import Enter, Exit, InterceptFilter, Resolution, Update

Answer = TypeVar("Answer")

_RESUME = vcpu_pb2.ENTER_REASON_RESUME


def _cause(enter: Enter) -> tuple[int, int]:
    return enter.cause_vp_index, enter.cause


def _names(update: Update) -> tuple[str | None, int]:
    return update.WhichOneof("change"), update.register.name or update.msr.index


def _place_of_older(waiting: list[Update], update: Update) -> int | None:
    """Where a value of the same register or MSR waits, with nothing but registers and MSRs behind it."""
    for position in range(len(waiting) - 1, -1, -1):
        older = waiting[position]
        if not (older.HasField("register") or older.HasField("msr")):
            return None
        if _names(older) == _names(update):
            return position
    return None


class Processor:
    """State of one vCPU that belongs to the VMM.

    Attributes:
        index: VP index.
        vtl: its virtual trust levels.
        watched: what VTL1 wants to see of VTL0 on this vCPU.
        resumed: number of the last enter of VTL0.
        suspended: how the open exit of each level ends when that level goes on; for levels that are not active.
    """

    def __init__(
        self,
        index: int,
        guest: Level,
        monitor: Level | None,
        gate: Gate,
        vtl: VpVtl,
        serving: threading.RLock | None = None,
        commit: Callable[[], object] = lambda: None,
        ledger: Ledger | None = None,
    ) -> None:
        """The last three are of the board: the lock of who serves exits, Board.commit, and the ledger."""
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
        self._serving = serving or threading.RLock()
        self._commit = commit
        self._ledger = ledger or Ledger()
        self._touch = self._ledger.touch
        self._first: Enter | None = None
        self._found_inside = False
        self._answer = Enter()
        self._settled = Enter()
        self._reopened: Enter | None = None
        self._pending: list[Update] = []
        self._pending_upper: list[Update] = []
        self._posted = 0  # how often what waits has changed
        self._stamp: tuple[object, ...] = ()
        self._kept = b""
        self._kept_answer: bytes | None = None
        self._lock = threading.Lock()

    def post(self, *updates: Update, vtl: int = VTL0) -> None:
        """Adds updates to the next enter of a level, in order. Thread-safe; does not make the vCPU exit."""
        with self._lock:
            self._waiting_for(vtl).extend(updates)
            self._posted += 1
        self._touch()

    def post_once(self, update: Update, vtl: int = VTL0) -> None:
        """Adds an update to the next enter of a level, unless the same one waits already. Thread-safe."""
        with self._lock:
            waiting = self._waiting_for(vtl)
            if update not in waiting:
                waiting.append(update)
                self._posted += 1
        self._touch()

    def post_latest(self, update: Update, vtl: int = VTL0) -> None:
        """Adds a register or MSR to the next enter of a level, in place of an older value of it that waits.

        So a level that writes another's registers for ever piles nothing up. An event in between keeps both.
        Thread-safe.
        """
        with self._lock:
            waiting = self._waiting_for(vtl)
            position = _place_of_older(waiting, update)
            if position is None:
                waiting.append(update)
            else:
                waiting[position] = update
            self._posted += 1
        self._touch()

    def _waiting_for(self, vtl: int) -> list[Update]:
        return self._pending_upper if vtl else self._pending

    def waiting_for(self, vtl: int) -> list[Update]:
        """What waits for the next enter of a level, in order. Thread-safe."""
        with self._lock:
            return list(self._waiting_for(vtl))

    @property
    def enters(self) -> tuple[int, int]:
        """How often VTL0 and VTL1 were entered."""
        return self.resumed, self._monitor_sequence

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
        if self._found_inside:  # nothing may be added to an enter that is repeated
            self._found_inside = False
            return
        ready, self._ready = self._ready, None
        if ready is not None:
            self._gate.wait(self.index, ready)
        while True:
            kick_first = self._gate.enter(self.index, enter.sequence, vtl)
            if not self._waiting_for(vtl):
                break
            if self._serving.acquire(blocking=False):
                try:
                    self._leave_with(enter, vtl)
                finally:
                    self._serving.release()
                break
            self._gate.back_out(self.index)  # who serves may wait for this vCPU to be outside
            with self._serving:
                self._leave_with(enter, vtl)
        enter.transactions = self._ledger.transactions
        if kick_first:
            self._entered.kick(self.index, enter.sequence)

    def _leave_with(self, enter: Enter, vtl: int) -> None:
        self._take_waiting(enter, vtl)
        self._answer, self._kept_answer = enter, None
        self._commit()

    def _take_waiting(self, enter: Enter, vtl: int) -> None:
        with self._lock:
            waiting = self._waiting_for(vtl)
            if waiting:
                enter.updates.extend(waiting)
                waiting.clear()
                self._posted += 1

    def answers(self, enter: Enter) -> None:
        """That enter follows from the exit that was served; what waits goes with it. To be committed at once."""
        own = list(enter.updates)
        del enter.updates[:]
        self._take_waiting(enter, self.vtl.active)
        enter.updates.extend(own)
        self._answer, self._settled, self._kept_answer = enter, Enter(), None

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
        self._take_waiting(enter, VTL0)
        self._settled, self._kept_answer = enter, None
        self._commit()
        return self._apply_below(enter)

    def _apply_below(self, enter: Enter) -> Exit:
        self._guest.kick(self.index, enter.sequence)
        return self._guest.enter(enter)

    @property
    def settled(self) -> bool:
        """Nothing waits for VTL0 that would change its registers."""
        resolution = self.suspended[VTL0]
        ended = resolution is None or resolution.action == vcpu_pb2.ACTION_RETRY
        return ended and not self._pending

    def kick(self, sequence: int) -> bool:
        """Makes the enter that is being run exit soon."""
        return self._entered.kick(self.index, sequence)

    def run_monitor(self, enter: Enter) -> Exit:
        """Runs VTL1 as a policy until its next exit; fills in vCPU and number.

        What VTL1 was doing about the same cause when the VMM died is taken up instead.

        Raises:
            PeerUnavailable: there is no monitor, it is gone, or it does not answer in time.
            GuestMisbehaved: see Level.enter.
        """
        reopened, self._reopened = self._reopened, None
        if reopened is not None and enter.cause and _cause(reopened) == _cause(enter):
            return self._require_monitor().enter(reopened)
        self._monitor_sequence += 1
        enter.vp_index = self.index
        enter.sequence = self._monitor_sequence
        enter.transactions = self._ledger.transactions
        return self._require_monitor().enter(enter)

    # ------------------------------------------------------------------------------------------- after a VMM's death

    def record(self) -> bytes:
        """What the journal keeps, a VcpuRecord; made anew only as far as it has changed."""
        halted = self._gate.halted(self.index)
        with self._lock:
            stamp = (plain.stamp(self.vtl), self.watched, *self.suspended, self._posted, *halted)
            if stamp != self._stamp:
                self._stamp, self._kept = stamp, self._levels(halted)
        if self._kept_answer is None:
            answer = VcpuRecord(answer=self._answer, settled=self._settled)
            self._kept_answer = answer.SerializeToString(deterministic=True)
        return self._kept + self._kept_answer  # messages are joined by joining their bytes

    def _levels(self, halted: list[int]) -> bytes:
        """The record but for its last two fields."""
        record = VcpuRecord(
            vtl=plain.dump(self.vtl),
            watched=self.watched.filter,
            pending=self._pending,
            pending_upper=self._pending_upper,
            suspended=self.suspended[VTL0],
            suspended_upper=self.suspended[VTL1],
            halted=halted,
        )
        return record.SerializeToString(deterministic=True)

    def restore(self, record: VcpuRecord) -> None:
        """The inverse of record(). Raises ValueError."""
        plain.load(self.vtl, record.vtl)
        self.watched = Watched(record.watched)
        self._pending[:] = record.pending
        self._pending_upper[:] = record.pending_upper
        self.suspended = [
            record.suspended if record.HasField("suspended") else None,
            record.suspended_upper if record.HasField("suspended_upper") else None,
        ]
        self._answer, self._settled, self._kept_answer = record.answer, record.settled, None
        self._posted += 1

    def reconnect(self, guest: Enter, monitor: Enter | None) -> None:
        """Where the levels stand: decides with which enter the vCPU goes on.

        An answer that the journal has and the level has not seen is sent; else the level's last enter is repeated, and
        its exit served, again or for the first time.

        Args:
            guest, monitor: the last enter that each has accepted, empty if none; None without a monitor.
        """
        self.resumed = guest.sequence
        self._monitor_sequence = monitor.sequence if monitor else 0
        seen = monitor if self.vtl.active == VTL1 and monitor else guest
        if self._answer.sequence == seen.sequence + 1:
            self._first = self._answer
            if self.vtl.active == VTL1:
                self._monitor_sequence = self._first.sequence
            else:
                self.resumed = self._first.sequence
        elif seen.sequence:
            self._first, self._found_inside = seen, True
            self._gate.found_inside(self.index, seen.sequence, self.vtl.active)
        self._reopened = monitor if monitor and monitor.sequence else None

    def first(self) -> Enter:
        """The enter with which its thread begins."""
        first, self._first = self._first, None
        return first or self.resume()

    @property
    def reopened(self) -> Enter | None:
        """The enter of a policy at VTL1 that is not known to be over."""
        return self._reopened

    def run_reopened(self) -> Exit:
        """Its exit. Raises as run_monitor()."""
        reopened, self._reopened = self._reopened, None
        assert reopened is not None, "nothing is open"
        return self._require_monitor().enter(reopened)

    def run_settled(self) -> Exit | None:
        """The exit of a settle() that is not known to be over, if there is one. Raises as settle()."""
        settled, self._settled, self._kept_answer = self._settled, Enter(), None
        if not settled.sequence or settled.sequence < self.resumed:
            return None
        self.resumed = settled.sequence
        return self._apply_below(settled)

    def _require_monitor(self) -> Level:
        assert self._monitor is not None, "VTL1 was enabled without a monitor"
        return self._monitor
