"""Without a rule, an attack gets through that it stopped. The whole list is `make mutations`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from vtlab.client import Lab
from vtlab_matrix.laboratory import Task
from vtlab_matrix.mutations import run_mutations
from vtlab_matrix.outcome import Outcome
from vtlab_matrix.run import run_cell


class InTurn:
    """One cell after the other, in the laboratory of the tests."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        for task in tasks:
            yield run_cell(self._lab, task.cell, policy=task.policy)[0]


@pytest.mark.parametrize(
    ("rule", "attacks"),
    [
        ("registers: cr4.SMEP must_be_1", {"cr4-smep"}),
        ("msrs: LSTAR", {"msr-lstar"}),
        ("memory: kernel rodata", {"rodata-write"}),
        ("registers: idtr", {"idtr-moved"}),
    ],
)
def test_a_rule_is_needed(lab: Lab, rule: str, attacks: set[str]) -> None:
    tried = {*attacks, "cr0-wp", "text-write"}
    red = run_mutations(InTurn(lab), [rule], lambda _outcome: None, sorted(tried))
    assert {outcome.cell.name for outcome in red[rule]} == attacks
