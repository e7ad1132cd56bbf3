"""Whose turn it is: the engines of a machine never run at once, since `lock` is atomic for its own engine only.

Each processor's thread waits here while its processor is inside. One of these threads drives: it runs the turns of all
processors in order, so that going from one to the next costs no change of threads. A turn ends with an exit, when the
processor idles or spins (PAUSE), when another one becomes ready, or after a slice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from vtl0_guest.cpu.level_turns import LevelTurns


class Outcome(Enum):
    """How a turn ended."""

    DONE = auto()  # with an exit
    OVER = auto()  # there is more to run
    IDLE = auto()  # nothing to do until somebody wakes it


class Runner(Protocol):
    """A processor."""

    def begin_turn(self, contended: bool, /) -> None:
        """A turn follows; `contended`: others are ready too. Called with the lock of the turns held: must be quick."""

    @property
    def kicked(self) -> bool:
        """It has to come out before it runs anything."""

    def turn(self) -> Outcome:
        """Runs for a turn. Never raises. No other runner has a turn meanwhile."""

    def end_turn(self) -> None:
        """Makes the present turn end soon. From any thread, with the lock of the turns held."""


class Place(Enum):
    """What a runner is doing."""

    OUT = auto()
    READY = auto()
    RUNNING = auto()
    IDLE = auto()
    DONE = auto()


# Looking a member up in its class takes longer than most of what an exit has to do here.
_OUT, _READY, _RUNNING, _IDLE, _DONE = Place
_TURN_DONE, _TURN_OVER = Outcome.DONE, Outcome.OVER


class Seat:
    """A runner's place in the round."""

    def __init__(self, runner: Runner, lock: threading.Lock) -> None:
        self.runner = runner
        self.place = _OUT
        self.woken = False
        self.kicked = False
        self.changed = threading.Condition(lock)


class Turns:
    """Fair turns for the runners of one machine. Thread-safe.

    Attributes:
        levels: turns between this level and the other one, where both run guest code.
    """

    levels: LevelTurns | None = None

    # Seconds after which a turn ends if others are ready.
    SLICE = 0.001
    # Seconds that are left of a turn in which something ended that another runner may wait for without PAUSE.
    TAIL = 0.00005
    # Slices without anybody waiting after which the time-keeper sleeps.
    _PATIENCE = 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: deque[Seat] = deque()
        self._driven = False
        self._running: Seat | None = None
        self._actions: deque[Callable[[], object]] = deque()
        self._since = 0.0  # time.monotonic() of the present turn's start
        self._ticks = threading.Condition(self._lock)
        self._ticking = False
        self._keeper: threading.Thread | None = None
        self._closed = False

    def seat(self, runner: Runner) -> Seat:
        return Seat(runner, self._lock)

    def run(self, seat: Seat) -> None:
        """Gives a runner turns until one is DONE. One thread a seat."""
        with self._lock:
            if self._driven or self._ready or self._actions:
                self._queue(seat)
                self._preempt()
            else:
                # Nobody else is inside, as nearly always: the first turn needs no round.
                self._driven = True
                self._give_turn(seat)
                if self._actions:
                    self._act()
                self._stop_driving()
            while seat.place is not _DONE:
                if self._ready and not self._driven:
                    self._drive(seat)
                else:
                    seat.changed.wait()
            seat.place = _OUT

    def wake(self, seat: Seat) -> None:
        """There may be something new to do for that runner: others do not finish their slice before it."""
        with self._lock:
            seat.woken = True
            if seat.place is _IDLE:
                self._queue(seat)
                self._preempt()
            elif seat.place is _READY:
                self._preempt()

    def kick(self, seat: Seat) -> None:
        """That runner has to come out."""
        self.wake(seat)

    def between(self, action: Callable[[], object]) -> None:
        """Does something soon while no runner has a turn, on this thread or another one. It must not raise."""
        with self._lock:
            self._actions.append(action)
            if self._driven:
                self._preempt()
                return
            self._driven = True
            self._act()
            self._stop_driving()

    @property
    def busy(self) -> bool:
        """A runner has a turn, or waits for one."""
        return self._running is not None or bool(self._ready)

    def preempt(self) -> None:
        """The present turn ends soon."""
        with self._lock:
            self._preempt()

    def hand_over_soon(self) -> None:
        """The present turn ends after TAIL, if others are ready."""
        with self._lock:
            self._since = min(self._since, time.monotonic() + self.TAIL - self.SLICE)
            self._ticks.notify()

    def close(self) -> None:
        """Ends the time-keeper. No runner has a turn any more."""
        if self.levels is not None:
            self.levels.close()
        with self._lock:
            self._closed = True
            self._ticks.notify_all()
            keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.join()

    def _queue(self, seat: Seat) -> None:
        seat.place = _READY
        self._ready.append(seat)
        if not self._driven:
            seat.changed.notify()
        elif not self._ticking:
            self._ticking = True
            self._ticks.notify()
            if self._keeper is None and not self._closed:
                self._keeper = threading.Thread(target=self._keep_time, name="turns", daemon=True)
                self._keeper.start()

    def _preempt(self) -> None:
        if self._running is not None:
            self._running.runner.end_turn()

    def _drive(self, own: Seat) -> None:
        """Runs turns, with the lock held in between, until the own runner is done or nobody is ready."""
        self._driven = True
        while self._ready and own.place is not _DONE:
            self._act()
            seat = self._ready.popleft()
            self._give_turn(seat)
            if seat.place is _DONE and seat is not own:
                seat.changed.notify()
        self._act()
        self._stop_driving()

    def _give_turn(self, seat: Seat) -> None:
        seat.place, seat.woken = _RUNNING, False
        seat.runner.begin_turn(bool(self._ready))
        self._running = seat
        self._since = time.monotonic()
        self._lock.release()
        levels = self.levels
        try:
            if levels is None:
                outcome = seat.runner.turn()
            else:
                levels.acquire()
                try:
                    outcome = seat.runner.turn()
                finally:
                    levels.release()
        finally:
            self._lock.acquire()
            self._running = None
        if outcome is _TURN_DONE:
            seat.place = _DONE
        elif outcome is _TURN_OVER or seat.woken:
            self._queue(seat)
        else:
            seat.place = _IDLE

    def _act(self) -> None:
        while self._actions:
            action = self._actions.popleft()
            self._lock.release()
            try:
                action()
            finally:
                self._lock.acquire()

    def _stop_driving(self) -> None:
        self._driven = False
        if self._ready:
            self._ready[0].changed.notify()

    def _keep_time(self) -> None:
        """Ends turns that last a slice while others are ready. Sleeps when nobody has to wait."""
        quiet = 0
        with self._lock:
            while not self._closed:
                quiet = 0 if self._ready else quiet + 1
                if quiet > self._PATIENCE:
                    self._ticking, quiet = False, 0
                    self._ticks.wait()
                    continue
                left = self._since + self.SLICE - time.monotonic()
                if left <= 0 and self._ready:
                    self._preempt()
                self._ticks.wait(left if left > 0 else self.SLICE)
