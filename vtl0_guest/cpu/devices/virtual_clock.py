"""Virtual time: it moves with the blocks of code that the guest runs, and by jumps while nothing runs.

A block is a run of instructions up to a branch, as the engine translates them. Where an exit splits one, its rest
counts as another; so time passes for a guest that only polls a device.
"""

from __future__ import annotations

from typing import Protocol

BLOCK_NANOSECONDS = 20
TSC_HZ = 1e9
# Where the wall clock starts: 2025-01-01 00:00 UTC, in seconds since 1970.
EPOCH = 1735689600.0


class BlockCounter(Protocol):
    """An engine that counts."""

    @property
    def blocks_left(self) -> int:
        """Of those granted."""
        ...

    def grant(self, blocks: int, /) -> None:
        """So many may run from now on."""
        ...


class VirtualClock:
    """A Clock (devices/clock.py). Moved by whoever runs the turns, on one thread at a time."""

    tsc_is_host = False

    def __init__(self) -> None:
        self._blocks = 0  # passed before the present grant
        self._granted = 0
        self._counter: BlockCounter | None = None

    @property
    def blocks(self) -> int:
        """Time passed, in blocks."""
        counter = self._counter
        return self._blocks if counter is None else self._blocks + self._granted - counter.blocks_left

    def begin(self, counter: BlockCounter, blocks: int) -> None:
        """A turn: that engine runs, and time with it, until end()."""
        self._granted, self._counter = blocks, counter
        counter.grant(blocks)

    def end(self) -> int:
        """The turn is over. Returns the blocks that it ran."""
        before, self._blocks = self._blocks, self.blocks
        self._counter = None
        return self._blocks - before

    def shorten(self, blocks: int) -> None:
        """The present turn gets no more than `blocks` more."""
        counter = self._counter
        if counter is not None and blocks < counter.blocks_left:
            self._granted -= counter.blocks_left - blocks
            counter.grant(blocks)

    def blocks_until(self, moment: float) -> int:
        """After so many blocks now() is at least `moment`."""
        missing = moment - self.now()
        if missing <= 0:
            return 0
        blocks = int(missing * 1e9 / BLOCK_NANOSECONDS)
        while _seconds(self.blocks + blocks) < moment:
            blocks += 1
        return blocks

    def jump(self, moment: float) -> None:
        """Between turns: lets time pass until `moment`, if that is ahead."""
        self._blocks += self.blocks_until(moment)

    def now(self) -> float:
        return _seconds(self.blocks)

    def wall(self) -> float:
        return EPOCH + self.now()

    def tsc(self) -> int:
        return self.blocks * BLOCK_NANOSECONDS

    def tsc_hz(self) -> float:
        return TSC_HZ


def _seconds(blocks: int) -> float:
    return blocks * BLOCK_NANOSECONDS / 1e9
