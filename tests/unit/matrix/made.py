"""Outcomes as a run would have them, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vtlab_matrix.cells import Cell, Verdict
from vtlab_matrix.laboratory import Task
from vtlab_matrix.outcome import Observation, Outcome
from vtlab_matrix.timeline import Line


def attack(
    verdict: Verdict = Verdict.BLOCKED, design: str = "vtl", name: str = "cr0-wp", after: str = "", **fields: Any
) -> Outcome:
    seen = Observation(name=name, what="CR0.WP", before="1", after="1", intact=True, denial="#GP(0x0) at <here>")
    cell = Cell(design=design, kind="attack", name=name, after=after)
    return Outcome(cell=cell, verdict=verdict, evidence=fields.pop("evidence", seen), **fields)


def transition(verdict: Verdict = Verdict.KEPT, design: str = "vtl", name: str = "boot", **fields: Any) -> Outcome:
    seen = Observation(name=name, what="kernel", before="off", after="runs", reached=verdict is Verdict.KEPT)
    cell = Cell(design=design, kind="transition", name=name)
    return Outcome(cell=cell, verdict=verdict, evidence=fields.pop("evidence", seen), **fields)


TIMELINE = (
    Line(at=0, kind="mark", text="attack cr0-wp"),
    Line(at=3, kind="exit", text="CR0 0x80010033 -> 0x80000033 at gadget_mov_cr0"),
    Line(at=4, kind="verdict", text="deny (cr0: <pinned>)", times=2),
)


class Runner:
    """Runs nothing: every cell comes out as told, KEPT or BLOCKED if nothing is told of it."""

    def __init__(self, *told: Outcome) -> None:
        self._told = {one.cell: one for one in told}
        self.ran: list[Cell] = []

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        for task in tasks:
            cell = task.cell
            self.ran.append(cell)
            usual = attack(design=cell.design, name=cell.name, after=cell.after)
            if cell.kind == "transition":
                usual = transition(design=cell.design, name=cell.name)
            yield self._told.get(cell, usual).model_copy(update={"policy": task.policy})
