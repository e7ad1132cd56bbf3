"""Figures are held against their goals the right way round, and pairs are measured in turn."""

from __future__ import annotations

import json

import pytest

from tests.bench.measure import Figure, in_turn


@pytest.mark.parametrize(
    ("samples", "goal", "at_least", "passed"),
    [
        ([0.9, 0.96, 0.97], 0.95, True, True),
        ([0.9, 0.94, 0.97], 0.95, True, False),
        ([1.0, 1.2, 9.0], 1.25, False, True),
        ([1.0, 1.3, 9.0], 1.25, False, False),
        ([1.0], None, False, None),
    ],
)
def test_the_median_is_held_against_the_goal(
    samples: list[float], goal: float | None, at_least: bool, passed: bool | None
) -> None:
    assert Figure("figure", "ratio", samples, goal, at_least).passed is passed


def test_one_sample_is_its_own_spread() -> None:
    assert Figure("figure", "s", [2.5]).quartiles == (2.5, 2.5)


def test_json_holds_every_sample() -> None:
    figure = Figure("figure", "us", [3.0, 1.0, 2.0], 2.0, detail="three")
    written = json.loads(json.dumps(figure.as_json()))
    assert written["samples"] == [3.0, 1.0, 2.0]
    assert (written["median"], written["quartiles"], written["passed"]) == (2.0, [1.5, 2.5], True)


def test_pairs_alternate_who_goes_first() -> None:
    order: list[str] = []

    def measure(name: str, value: float) -> float:
        order.append(name)
        return value

    paired = in_turn(lambda: measure("a", 6.0), lambda: measure("b", 3.0), 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert paired.ratios == [2.0, 2.0, 2.0]
    assert paired.differences == [3.0, 3.0, 3.0]
