"""A repeatable order of turns: the same seed, the same guest, the same exits.

The processors have their turns one after the other in a fixed order, each for a number of blocks that the seed draws;
time is virtual and moves with the blocks, so interrupts arrive at the same instruction each time. A processor whose
exit is being served keeps its turn until it is entered again: nobody else runs meanwhile, and no time passes, whatever
the VMM's threads do and however long they take. When all are idle, time jumps to the next deadline.

What comes from outside (serial input, commands of clients) is not part of it. Being kicked is: a processor that has to
come out does so at once, applies what its enter says and runs nothing.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

from vtl0_guest.cpu.devices.virtual_clock import BlockCounter, VirtualClock
from vtl0_guest.cpu.level_turns import LevelTurns
from vtl0_guest.cpu.turns import Outcome, Place, Runner, Seat

# Blocks of a slice, at least and at most.
SHORTEST, LONGEST = 2_000, 20_000


class Schedule:
    """The turns of one machine, in place of vtl0_guest.cpu.turns.Turns. Thread-safe.

    Attributes:
        levels: always None: with another process that runs guest code nothing would be repeatable.
        busy: always False: the host's time means nothing here.
    """

    levels: LevelTurns | None = None
    busy = False

    def __init__(
        self,
        clock: VirtualClock,
        seed: int,
        deadline: Callable[[], float | None],
        let_pass: Callable[[float], object],
    ) -> None:
        """`deadline` is when something is due next; `let_pass` does what is due until a moment of the clock."""
        self._clock = clock
        self._random = random.Random(seed)
        self._deadline = deadline
        self._let_pass = let_pass
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._seats: list[Seat] = []
        self._counters: list[BlockCounter] = []
        self._holder = 0
        self._left = self._draw()  # blocks of the holder's slice
        self._driver: int | None = None  # the thread that runs turns

    def _draw(self) -> int:
        return self._random.randrange(SHORTEST, LONGEST + 1)

    def seat(self, runner: Runner) -> Seat:
        """In the order of the calls."""
        seat = Seat(runner, self._lock)
        self._seats.append(seat)
        return seat

    def count(self, counters: Sequence[BlockCounter]) -> None:
        """The engines of the seats, in their order. To be called before the first run."""
        self._counters = list(counters)

    def run(self, seat: Seat) -> None:
        """Gives turns until that runner is DONE. One thread a seat."""
        with self._lock:
            seat.place = Place.READY
            self._changed.notify_all()
            while seat.place is not Place.DONE:
                if self._driver is not None or not self._drive(seat):
                    self._changed.wait()
            seat.place = Place.OUT

    def wake(self, seat: Seat) -> None:
        """There may be something new to do for that runner, in its turn."""
        with self._lock:
            seat.woken = True
            if seat.place is Place.IDLE:
                seat.place = Place.READY
                self._changed.notify_all()

    def kick(self, seat: Seat) -> None:
        """That runner has to come out now. It must do so without running anything."""
        with self._lock:
            seat.kicked = True
            self._changed.notify_all()

    def rearm(self) -> None:
        """A deadline changed: the present turn must not last beyond it."""
        if self._driver == threading.get_ident():
            moment = self._deadline()
            if moment is not None:
                self._clock.shorten(self._clock.blocks_until(moment))

    def between(self, action: Callable[[], object]) -> None:
        """Nobody needs it: a processor that is not entered keeps its turn, and does its own when it is."""

    def preempt(self) -> None:
        """Only blocks end a turn."""

    def close(self) -> None:
        """No runner has a turn any more."""

    def _drive(self, own: Seat) -> bool:
        """Runs turns, with the lock held in between, until the own runner is done: False if it has to wait first."""
        self._driver = threading.get_ident()
        try:
            while own.place is not Place.DONE:
                seat = self._kicked_out()
                if seat is not None:
                    self._turn(self._seats.index(seat), 0)
                elif self._seats[self._holder].place in (Place.OUT, Place.DONE):
                    return False
                elif self._seats[self._holder].place is Place.IDLE or self._left <= 0:
                    if not self._pass_on():
                        return False
                else:
                    self._left -= self._turn(self._holder, self._left)
            self._changed.notify_all()  # another thread has to drive now
            return True
        finally:
            self._driver = None

    def _kicked_out(self) -> Seat | None:
        for seat in self._seats:
            if seat.kicked and seat.place in (Place.READY, Place.IDLE):
                seat.kicked = False
                if seat.runner.kicked:  # it may have come out since
                    return seat
        return None

    def _pass_on(self) -> bool:
        """The turn goes to the next one that is not idle; if all are, time jumps. False: nothing is ever due."""
        count = len(self._seats)
        for step in range(1, count + 1):
            number = (self._holder + step) % count
            if self._seats[number].place is not Place.IDLE:
                self._holder, self._left = number, self._draw()
                return True
        return self._jump()

    def _jump(self) -> bool:
        moment = self._deadline()
        if moment is None:
            return False
        self._clock.jump(moment)
        self._unlocked(lambda: self._let_pass(self._clock.now()))
        return True

    def _turn(self, number: int, blocks: int) -> int:
        """Returns how much of the slice is used up."""
        seat = self._seats[number]
        moment = self._deadline()
        if blocks and moment is not None:
            blocks = min(blocks, max(1, self._clock.blocks_until(moment)))
        seat.place, seat.woken = Place.RUNNING, False
        others = (other for other in self._seats if other is not seat)
        seat.runner.begin_turn(any(other.place is not Place.IDLE for other in others))
        outcome = Outcome.DONE
        used = 0

        def run() -> None:
            nonlocal outcome, used
            self._clock.begin(self._counters[number], blocks)
            outcome = seat.runner.turn()
            used = self._clock.end()
            due = self._deadline()
            if due is not None and due <= self._clock.now():
                self._let_pass(self._clock.now())

        self._unlocked(run)
        if outcome is Outcome.DONE:
            seat.place = Place.DONE
            self._changed.notify_all()
        elif outcome is Outcome.OVER or seat.woken:
            seat.place = Place.READY
        else:
            seat.place = Place.IDLE
        gave_way = outcome is Outcome.OVER and self._counters[number].blocks_left > 0
        return max(self._left, used) if gave_way else used

    def _unlocked(self, action: Callable[[], object]) -> None:
        self._lock.release()
        try:
            action()
        finally:
            self._lock.acquire()
