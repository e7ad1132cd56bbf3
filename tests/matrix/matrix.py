"""A run of the matrix: transitions first, attacks where a guest is left, one result whatever the order was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from vtlab_matrix.cells import BOOT, EVERY_ATTACK, EVERY_TRANSITION, Cell, Selection, Verdict, plan
from vtlab_matrix.journal import Journal
from vtlab_matrix.laboratory import Task
from vtlab_matrix.outcome import Outcome
from vtlab_matrix.run import not_run


class Runner(Protocol):
    """Who runs cells: vtlab_matrix.workers or vtlab_matrix.cluster."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]: ...


def run_matrix(
    selection: Selection, runner: Runner, journal: Journal, on_outcome: Callable[[Outcome], None]
) -> list[Outcome]:
    """Runs the cells that the journal does not have.

    Args:
        on_outcome: hears of each cell, in the order in which they end.

    Returns:
        All outcomes, in the order of the tables.
    """
    transitions, attacks = plan(selection)
    done: list[Outcome] = []

    def take(cells: Sequence[Cell]) -> None:
        for outcome in [journal.done[cell] for cell in cells if cell in journal.done]:
            done.append(outcome)
            on_outcome(outcome)
        for outcome in runner.run(Task(cell) for cell in cells if cell not in journal.done):
            journal.add(outcome)
            done.append(outcome)
            on_outcome(outcome)

    take(transitions)
    broken = {
        (one.cell.design, one.cell.name): one
        for one in done
        if one.verdict is Verdict.GUEST_BROKEN and not one.evidence.kept
    }
    take([cell for cell in attacks if (cell.design, cell.after) not in broken])
    for cell in attacks:
        if (cell.design, cell.after) in broken:
            done.append(not_run(cell, broken[cell.design, cell.after]))
            on_outcome(done[-1])
    return sorted(done, key=lambda outcome: _place(outcome, selection.known))


def _place(outcome: Outcome, designs: Sequence[str]) -> tuple[int, bool, int, int]:
    cell = outcome.cell
    moves = ["", BOOT, *EVERY_TRANSITION]
    names = [BOOT, *EVERY_TRANSITION, *EVERY_ATTACK]
    return designs.index(cell.design), cell.kind == "attack", names.index(cell.name), moves.index(cell.after)
