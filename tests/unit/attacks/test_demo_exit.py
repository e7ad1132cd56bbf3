"""Exit codes of the demo's bodies, and its output for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import pytest

from vmm.cli import demo
from vtlab.client import Lab
from vtlab.errors import BadArgument
from vtlab_attacks.campaign import Result
from vtlab_attacks.evidence import Evidence
from vtlab_attacks.table import ATTACKS, CONTROLS

LAB = cast(Lab, None)
NAMES = [ATTACKS[0].name, CONTROLS[0].name]
REACHED = Evidence("CR0.WP", "1", "0", reached=True, intact=False)
BLOCKED = Evidence("CR0.WP", "1", "1", reached=False, intact=True, denial="#GP(0x0) at gadget_mov_cr0")


def outcome(monkeypatch: pytest.MonkeyPatch, protected: Evidence | None) -> None:
    def run_all(lab: Any, attacks: Any, controls: Any, design: str) -> Iterator[list[Result]]:
        verdicts = ("cr0: changes pinned bits",)
        for attack in attacks:
            yield [Result(attack, False, REACHED, "", 0.1), Result(attack, True, protected, "lost", 0.1, verdicts)]
        for control in controls:
            yield [Result(control, True, REACHED, "", 0.1)]

    monkeypatch.setattr(demo, "run_all", run_all)


@pytest.mark.parametrize(("protected", "code"), [(BLOCKED, 0), (REACHED, 1), (None, 1)])
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], protected: Evidence | None, code: int
) -> None:
    outcome(monkeypatch, protected)
    assert demo.attack(LAB, NAMES) == code
    assert ("✘" in capsys.readouterr().out) == bool(code)


def test_lines_tell_state_fault_and_rule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome(monkeypatch, BLOCKED)
    demo.attack(LAB, NAMES)
    text = capsys.readouterr().out
    assert "SUCCEEDED  CR0.WP: 1 → 0" in text
    assert "BLOCKED    CR0.WP: 1 → 1   #GP(0x0) at gadget_mov_cr0" in text
    assert "cr0: changes pinned bits" in text


def test_json_is_one_value_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome(monkeypatch, BLOCKED)
    demo.attack(LAB, NAMES, as_json=True)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(record["kind"], record["protected"]) for record in records] == [
        ("attack", False),
        ("attack", True),
        ("control", True),
    ]
    assert records[1]["outcome"] == "blocked"
    assert records[1]["denial"] == BLOCKED.denial


def test_an_unknown_name_is_at_fault() -> None:
    with pytest.raises(BadArgument) as caught:
        demo.select(["no-such-attack"])
    assert "no-such-attack" in caught.value.subject
