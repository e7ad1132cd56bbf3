"""What is fuzzed, as a value: makes inputs from a seed, gives them to the code, and names what came of each."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


class Defect(AssertionError):
    """The code did what it may not: the text says what, for which input."""


class Target(ABC):
    """One entry point. One thread."""

    @abstractmethod
    def step(self, rng: random.Random) -> str:
        """Feeds one input; returns the class of what came of it. Raises Defect, or whatever the code let through."""

    def check(self) -> None:  # noqa: B027 - most have nothing to look at
        """Looks at what a single input would be too short for. Raises Defect."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Gives back what it holds."""


def corpus(folder: str) -> list[bytes]:
    """The files kept for a target, by name."""
    return [path.read_bytes() for path in sorted((CORPUS / folder).iterdir())]


def mutated(rng: random.Random, seeds: list[bytes], limit: int = 1 << 16) -> bytes:
    """One of the seeds with a few changes: bits, bytes, numbers at their edges, pieces cut, doubled or swapped in."""
    data = bytearray(rng.choice(seeds)[:limit])
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 9))):
        size = len(data)
        at = rng.randrange(size + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < size:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < size:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            width = rng.choice((2, 4, 8))
            edge = rng.choice((0, 1, -1, 1 << 8 * width - 1, (1 << 8 * width - 1) - 1, rng.getrandbits(8 * width)))
            data[at : at + width] = (edge % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        elif kind == 5:
            other = rng.choice(seeds)
            first = rng.randrange(len(other) + 1)
            data[at : at + rng.randrange(64)] = other[first : first + rng.randrange(64)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(16))
        del data[limit:]
    return bytes(data)
