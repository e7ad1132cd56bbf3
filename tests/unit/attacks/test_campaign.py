"""The figures of the demo, and when it passes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vmm.cli.telling import ConsoleTeller
from vtlab_attacks.campaign import Result, Summary
from vtlab_attacks.evidence import Attack, Control, Evidence, Run
from vtlab_attacks.table import ATTACKS, CONTROLS

RUN: Run = CONTROLS[0].run
POSSIBLE = Attack("a", "does", "somebody", RUN)
IMPOSSIBLE = Attack("b", "does", "somebody", RUN, "no VTL1")
CONTROL = Control("c", "does", RUN)

CHANGED = Evidence("x", "0", "1", True, False)
BLOCKED = Evidence("x", "0", "0", False, True, "#GP(0x0)")
UNCLEAR = Evidence("x", "0", "0", False, True)

GOOD = [
    Result(POSSIBLE, False, CHANGED, "", 0.1),
    Result(POSSIBLE, True, BLOCKED, "", 0.1),
    Result(IMPOSSIBLE, False, BLOCKED, "", 0.1),
    Result(IMPOSSIBLE, True, BLOCKED, "", 0.1),
    Result(CONTROL, True, CHANGED, "", 0.1),
]


def summarize(results: list[Result]) -> Summary:
    summary = Summary()
    for result in results:
        summary = summary.add(result)
    return summary


def test_all_as_it_must() -> None:
    summary = summarize(GOOD)
    assert summary.passed
    assert all(result.as_expected for result in GOOD)
    assert str(summary) == "attacks 2, blocked 2, succeeded 0; controls 1, kept 1; unprotected succeeded 1"


@pytest.mark.parametrize(
    ("index", "evidence"),
    [
        (0, BLOCKED),
        (0, None),
        (1, CHANGED),
        (1, UNCLEAR),
        (1, None),
        (2, CHANGED),
        (3, UNCLEAR),
        (4, BLOCKED),
        (4, None),
    ],
)
def test_one_thing_otherwise_fails_it(index: int, evidence: Evidence | None) -> None:
    results = list(GOOD)
    old = results[index]
    results[index] = Result(old.entry, old.protected, evidence, "lost", old.seconds)
    assert not results[index].as_expected
    assert not summarize(results).passed


def test_the_last_line_is_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    teller = ConsoleTeller(Console(file=io.StringIO()))
    teller.begin(1)
    teller.results(GOOD[:2])
    teller.end()
    teller.summary(summarize(GOOD), 1.5)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "demo: attacks 2, blocked 2, succeeded 0; controls 1, kept 1; unprotected succeeded 1"


def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 24
    assert len(CONTROLS) >= 8
    assert sum(bool(attack.impossible_unprotected) for attack in ATTACKS) <= 4
    assert all(attack.sentence and attack.source for attack in ATTACKS)
    every = [entry.name for entry in [*ATTACKS, *CONTROLS]]
    assert len(set(every)) == len(every)
