"""Figures: samples of one run, their median and quartiles, and the goal that the median is held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what was measured.
        unit: "ratio", "us", "pages/s" or "s".
        samples: each pair of the interleaved measurements gives one.
        goal: what the median must reach, or None where the figure only explains another.
        at_least: whether more is better.
        detail: the quantities behind it, for people.
    """

    name: str
    unit: str
    samples: list[float]
    goal: float | None = None
    at_least: bool = False
    detail: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile; both are the sample where there is only one."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def passed(self) -> bool | None:
        """Whether the median reaches the goal; None without a goal."""
        if self.goal is None:
            return None
        return self.median >= self.goal if self.at_least else self.median <= self.goal

    def as_json(self) -> dict[str, Any]:
        """All of it, with median and quartiles beside the samples."""
        low, high = self.quartiles
        return asdict(self) | {"median": self.median, "quartiles": [low, high], "passed": self.passed}


@dataclass
class Paired:
    """Two quantities measured in turn, so that what slows the machine slows both.

    Attributes:
        first, second: what each turn gave, in the order of the turns.
    """

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """First divided by second, turn by turn."""
        return [a / b for a, b in zip(self.first, self.second, strict=True)]

    @property
    def differences(self) -> list[float]:
        """First minus second, turn by turn."""
        return [a - b for a, b in zip(self.first, self.second, strict=True)]


def in_turn(first: Callable[[], float], second: Callable[[], float], turns: int) -> Paired:
    """Measures both `turns` times; which goes first changes with each turn."""
    paired = Paired()
    for turn in range(turns):
        if turn % 2:
            b = second()
            a = first()
        else:
            a = first()
            b = second()
        paired.first.append(a)
        paired.second.append(b)
    return paired
