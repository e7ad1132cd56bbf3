"""The diagrams in docs/lifecycle.md are what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtlab.client import Lab
from vtlab_matrix.cells import EVERY_TRANSITION, Cell
from vtlab_matrix.diagrams import diagram, recorded
from vtlab_matrix.run import run_cell

PAGE = recorded((Path(__file__).parents[3] / "docs" / "lifecycle.md").read_text())
STALE = "docs/lifecycle.md is stale: run `make lifecycle`"


def test_every_transition_has_one() -> None:
    assert set(PAGE) == set(EVERY_TRANSITION), STALE


@pytest.mark.parametrize("name", EVERY_TRANSITION)
def test_events_come_in_the_order_that_the_page_shows(lab: Lab, name: str) -> None:
    outcome, _ = run_cell(lab, Cell(design="vtl", kind="transition", name=name))
    assert not outcome.verdict.red, outcome
    assert diagram(outcome) == PAGE[name], STALE
