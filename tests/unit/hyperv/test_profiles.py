"""The table of differences, its profiles, and the page that shows it."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path

import pytest

from vtlab.hyperv.profiles import DEFAULT_PROFILE, DIFFERENCES, PROFILES, VsmProfile
from vtlab.hyperv.status import HvStatus

_PAGE = Path(__file__).parents[3] / "docs" / "vsm-profiles.md"


def shown(answer: object) -> str:
    if isinstance(answer, HvStatus):
        return f"{answer.name} ({int(answer):#x})"
    if isinstance(answer, Enum):
        return str(answer.value)
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return str(answer)


def table() -> str:
    lines = [f"| question | {' | '.join(PROFILES)} |", "| --- | --- | --- | --- |"]
    for row in DIFFERENCES:
        answers = " | ".join(shown(getattr(row, name)) for name in PROFILES)
        lines.append(f"| {row.question} | {answers} |")
    return "\n".join(lines)


def test_each_field_is_one_difference() -> None:
    fields = {field.name for field in dataclasses.fields(VsmProfile)} - {"name"}
    assert fields == {row.field for row in DIFFERENCES}
    assert len(DIFFERENCES) == len(fields)


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: row.field)
def test_sources_do_disagree(row: object) -> None:
    assert len({getattr(row, name) for name in PROFILES}) > 1


def test_the_default_is_openvmm() -> None:
    assert DEFAULT_PROFILE is PROFILES["openvmm"]


def test_the_page_shows_the_table() -> None:
    assert table() in _PAGE.read_text(encoding="utf-8")
