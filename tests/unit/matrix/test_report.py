"""What is made of outcomes: whether the run is good, JSON, JUnit, tables, explanations."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from pydantic import ValidationError
from rich.console import Console

from tests.unit.matrix.made import attack, transition
from vtlab_matrix import terminal
from vtlab_matrix.cells import Verdict
from vtlab_matrix.holes import Hole, Holes, Pattern
from vtlab_matrix.junit import junit
from vtlab_matrix.outcome import Observation
from vtlab_matrix.report import Report

HOLE = Hole(
    id="unpinned",
    text="Nothing pins it.",
    page="none",
    source="a mail",
    cells=(Pattern(designs=("none",), attacks=("cr*",), verdicts=(Verdict.SUCCEEDED,)),),
)
HOLES = Holes(holes=(HOLE,))
GOOD = (attack(), transition(), attack(Verdict.SUCCEEDED, "none"))
RED = [Verdict.SUCCEEDED, Verdict.GUEST_BROKEN, Verdict.UNCLEAR]
EXPLAINED = (Verdict.SUCCEEDED, Verdict.GUEST_BROKEN)


def test_a_good_run() -> None:
    assert Report(GOOD, HOLES).passed


def test_a_run_of_nothing_is_not_good() -> None:
    assert not Report((), HOLES).passed


@pytest.mark.parametrize("verdict", RED)
def test_nothing_excuses_a_red_cell_of_vtl1(verdict: Verdict) -> None:
    everything = Holes(
        holes=(HOLE.model_copy(update={"cells": (Pattern(designs=("*",), attacks=("*",), verdicts=EXPLAINED),)}),)
    )
    report = Report((*GOOD, attack(verdict, name="cr4-smep")), everything)
    assert not report.passed
    assert [one.cell.name for one in report.unexplained] == ["cr4-smep"]


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("cr0-wp", Verdict.UNCLEAR), ("cr0-wp", Verdict.GUEST_BROKEN), ("text-write", Verdict.SUCCEEDED)],
)
def test_a_red_cell_that_nothing_explains_fails_the_run(name: str, verdict: Verdict) -> None:
    assert not Report((*GOOD, attack(verdict, "none", name, "reset-cf9")), HOLES).passed


def test_an_explanation_for_a_cell_that_was_blocked_is_unused() -> None:
    report = Report((attack(Verdict.BLOCKED, "none"), transition(design="none")), HOLES)
    assert report.passed
    assert report.explanations == {}
    assert "explanation" not in report.as_json()["cells"][0]


@pytest.mark.parametrize("verdict", [Verdict.BLOCKED, Verdict.KEPT, Verdict.UNCLEAR])
def test_no_hole_may_explain_what_went_well_or_is_not_known(verdict: Verdict) -> None:
    with pytest.raises(ValidationError, match="a hole explains what succeeded or broke the guest"):
        Pattern(designs=("none",), attacks=("*",), verdicts=(verdict,))


def test_verdicts_follow_from_the_state_alone() -> None:
    def verdict(**fields: object) -> Verdict:
        return Observation(name="x", **fields).verdict

    assert verdict(reached=True, denial="#GP") is Verdict.SUCCEEDED
    assert verdict(intact=True, denial="#GP") is Verdict.BLOCKED
    assert verdict(intact=True) is Verdict.UNCLEAR
    assert verdict(denial="#GP") is Verdict.UNCLEAR
    assert verdict(intact=True, denial="#GP", error="lost") is Verdict.UNCLEAR


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_shipped_holes_are_sentences_of_the_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "designs.md").read_text()
    anchors = {anchor(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")}
    holes = Holes.shipped().holes
    assert len({hole.id for hole in holes}) == len(holes)
    for hole in holes:
        assert f"| {hole.text} |" in page, hole.id
        assert hole.page in anchors, hole.id
        assert bool(hole.source) != bool(hole.cause), hole.id


def test_json() -> None:
    report = Report(GOOD, HOLES, 2.0, 5).as_json()
    assert json.loads(json.dumps(report)) == report
    assert report["summary"] == {"vtl": {"BLOCKED": 1, "KEPT": 1}, "none": {"SUCCEEDED": 1}}
    cell = report["cells"][0]
    assert {"design", "kind", "name", "after", "verdict", "evidence", "seconds"} <= set(cell)
    assert cell["evidence"] == {
        "what": "CR0.WP",
        "before": "1",
        "after": "1",
        "intact": True,
        "denial": "#GP(0x0) at <here>",
    }
    assert report["cells"][2]["explanation"] == {
        "hole": "unpinned",
        "text": "Nothing pins it.",
        "page": "docs/designs.md#none",
        "source": "a mail",
    }


def test_junit() -> None:
    odd = attack(Verdict.UNCLEAR, name="cr4-smep", evidence=Observation(name="cr4-smep", error="line\x00one"))
    root = ET.fromstring(junit(Report((*GOOD, odd), HOLES)))
    assert [(suite.get("name"), suite.get("tests"), suite.get("failures")) for suite in root] == [
        ("vtl", "3", "1"),
        ("none", "1", "0"),
    ]
    (failure,) = root.iter("failure")
    assert failure.get("message") == "UNCLEAR: cr4-smep: line\N{REPLACEMENT CHARACTER}one"


@pytest.mark.parametrize("width", [40, 200])
def test_the_table_has_each_mark(width: int) -> None:
    out = io.StringIO()
    odd = attack(Verdict.UNCLEAR, name="cr4-smep")
    terminal.show(Report((*GOOD, odd), HOLES), Console(file=out, width=width))
    text = out.getvalue()
    assert text.count("cr4-smep") >= 2
    assert "vtl: 1 blocked, 0 succeeded; 1 kept, 0 guest broken; 1 unclear" in text.replace("\n", " ") or width == 40
    for mark, _style in terminal.MARKS.values():
        assert mark in text
