"""A laboratory that runs one cell after the other, and is replaced once a cell has hurt it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple, Self

from vtlab.client import Lab
from vtlab.errors import VtlabError
from vtlab_matrix.cells import Cell, Verdict
from vtlab_matrix.outcome import Observation, Outcome
from vtlab_matrix.run import run_cell

Launch = Callable[[], AbstractContextManager[Lab]]


class Task(NamedTuple):
    """What a worker is asked for. `policy`: in place of the guest's own, for experiments."""

    cell: Cell
    policy: str = ""


class Laboratory:
    """Its processes start with the first cell and end with close().

    Attributes:
        lab: their client while they run.
    """

    def __init__(self, launch: Launch, seed: int) -> None:
        """:param launch: starts three processes; their client is its context."""
        self._launch = launch
        self._seed = seed
        self._stack = ExitStack()
        self.lab: Lab | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def run(self, task: Task) -> Outcome:
        """Runs a cell. What was not carried out, since its laboratory broke or was too slow, is done again in another.

        The second outcome counts, and tells of the first.
        """
        first, fit = self._once(task)
        if fit or not first.evidence.error:
            return first
        second, _ = self._once(task)
        return second.model_copy(update={"earlier": first.evidence.error, "seconds": first.seconds + second.seconds})

    def _once(self, task: Task) -> tuple[Outcome, bool]:
        """A laboratory that does not start is what came of it."""
        try:
            if self.lab is None:
                self.lab = self._stack.enter_context(self._launch())
            outcome, fit = run_cell(self.lab, task.cell, self._seed, task.policy)
        except VtlabError as error:
            outcome, fit = lost(task, str(error)), False
        if not fit:
            self.close()
        return outcome, fit

    def close(self) -> None:
        """Ends its processes, if any run."""
        self.lab = None
        self._stack.close()


def lost(task: Task, error: str, seconds: float = 0.0) -> Outcome:
    """A cell whose laboratory broke: nothing can be read of its machine."""
    cell = task.cell
    verdict = Verdict.UNCLEAR if cell.kind == "attack" else Verdict.GUEST_BROKEN
    evidence = Observation(name=cell.name, error=error)
    return Outcome(cell=cell, verdict=verdict, evidence=evidence, seconds=seconds, policy=task.policy)
