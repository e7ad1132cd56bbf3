"""What a run says as a whole: counts by design, explanations, whether it is good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from vtlab_attacks.campaign import DESIGN
from vtlab_matrix.cells import Cell, Verdict
from vtlab_matrix.holes import Hole, Holes
from vtlab_matrix.outcome import Outcome

PAGE = "docs/designs.md"


class Report:
    """Attributes:
    outcomes: in the order of the tables.
    seconds: of the run.
    seed: of the run.
    """

    def __init__(self, outcomes: Sequence[Outcome], holes: Holes, seconds: float = 0.0, seed: int = 0) -> None:
        self.outcomes = tuple(outcomes)
        self.seconds = seconds
        self.seed = seed
        self._holes = holes

    @cached_property
    def explanations(self) -> dict[Cell, Hole]:
        """Of red cells of designs that are not promised to hold."""
        found = ((one.cell, self._holes.explain(one)) for one in self.outcomes if one.cell.design != DESIGN)
        return {cell: hole for cell, hole in found if hole is not None}

    @property
    def designs(self) -> list[str]:
        return list(dict.fromkeys(one.cell.design for one in self.outcomes))

    def counts(self, design: str) -> Counter[Verdict]:
        return Counter(one.verdict for one in self.outcomes if one.cell.design == design)

    @property
    def unexplained(self) -> list[Outcome]:
        """What makes the run a failure: any red cell of VTL1, and a red one of another design that nobody explains."""
        return [one for one in self.outcomes if one.verdict.red and one.cell not in self.explanations]

    @property
    def passed(self) -> bool:
        return bool(self.outcomes) and not self.unexplained

    def as_json(self) -> dict[str, Any]:
        """One object with `cells`."""
        cells = []
        for outcome in self.outcomes:
            cell = outcome.summary()
            if hole := self.explanations.get(outcome.cell):
                cell["explanation"] = {"hole": hole.id, "text": hole.text, "page": f"{PAGE}#{hole.page}"} | (
                    {"found_here": hole.cause} if hole.found_here else {"source": hole.source}
                )
            cells.append(cell)
        summary = {design: dict(sorted(self.counts(design).items())) for design in self.designs}
        return {
            "seed": self.seed,
            "passed": self.passed,
            "summary": summary,
            "unexplained": len(self.unexplained),
            "seconds": round(self.seconds, 3),
            "cells": cells,
        }

    def sentence(self, design: str) -> str:
        """ "vtl: 120 blocked, 0 succeeded; 8 kept, 0 guest broken; 0 unclear"."""
        count = self.counts(design)
        text = (
            f"{design}: {count[Verdict.BLOCKED]} blocked, {count[Verdict.SUCCEEDED]} succeeded; "
            f"{count[Verdict.KEPT]} kept, {count[Verdict.GUEST_BROKEN]} guest broken"
        )
        return text + (f"; {count[Verdict.UNCLEAR]} unclear" if count[Verdict.UNCLEAR] or design == DESIGN else "")
