"""Which cells there are, which are asked for, in which order."""

from __future__ import annotations

from itertools import product

import pytest

from vmm.designs import NAMES
from vtlab.errors import BadArgument
from vtlab_matrix.cells import BOOT, EVERY_ATTACK, EVERY_TRANSITION, Selection, Verdict, plan

MOVES = [BOOT, *EVERY_TRANSITION]


def test_the_full_grid_has_each_cell_once() -> None:
    transitions, attacks = plan(Selection(NAMES))
    assert sorted((one.design, one.name) for one in transitions) == sorted(product(NAMES, MOVES))
    expected = sorted(product(NAMES, EVERY_ATTACK, ["", *EVERY_TRANSITION]))
    assert sorted((one.design, one.name, one.after) for one in attacks) == expected


def test_the_same_seed_gives_the_same_order() -> None:
    assert plan(Selection(NAMES, seed=7)) == plan(Selection(NAMES, seed=7))
    assert plan(Selection(NAMES, seed=7)) != plan(Selection(NAMES, seed=8))


def test_patterns_select() -> None:
    transitions, attacks = plan(
        Selection(NAMES, designs=["vtl"], attacks=["cr4-s*", "text-write"], after=[BOOT, "reset-cf9"], transitions=[])
    )
    assert transitions == []
    assert {one.design for one in attacks} == {"vtl"}
    assert {one.name for one in attacks} == {"cr4-smep", "cr4-smap", "text-write"}
    assert {one.after for one in attacks} == {"", "reset-cf9"}


@pytest.mark.parametrize("option", ["designs", "attacks", "after", "transitions"])
def test_a_pattern_that_matches_nothing_is_named(option: str) -> None:
    with pytest.raises(BadArgument, match=rf"--{option} vtk\*: matches none of "):
        plan(Selection(NAMES, **{option: ["vtk*"]}))


def test_which_verdicts_are_red() -> None:
    assert {one for one in Verdict if not one.red} == {Verdict.BLOCKED, Verdict.KEPT}
