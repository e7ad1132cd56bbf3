"""Known holes of the designs, and which red cells they explain. They never decide a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict

from vtlab_matrix.cells import BOOT, Cell, Verdict
from vtlab_matrix.outcome import Outcome


def _red(verdict: Verdict) -> Verdict:
    if not verdict.red or verdict is Verdict.UNCLEAR:
        raise ValueError("a hole explains what succeeded or broke the guest; UNCLEAR is a defect of the evidence")
    return verdict


class Pattern(BaseModel):
    """Cells, by patterns as of fnmatch. Either attacks or transitions have names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    designs: tuple[str, ...]
    attacks: tuple[str, ...] = ()
    transitions: tuple[str, ...] = ()
    after: tuple[str, ...] = ("*",)
    verdicts: tuple[Annotated[Verdict, AfterValidator(_red)], ...] = (Verdict.SUCCEEDED,)

    def fits(self, cell: Cell, verdict: Verdict) -> bool:
        names = self.attacks if cell.kind == "attack" else self.transitions
        return (
            verdict in self.verdicts
            and _any(self.designs, cell.design)
            and _any(names, cell.name)
            and (cell.kind == "transition" or _any(self.after, cell.after or BOOT))
        )


class Hole(BaseModel):
    """One hole.

    Attributes:
        id: short name.
        text: the sentence of docs/designs.md that names it.
        page: anchor of the section that has it.
        source: who says so, with the Message-ID of the mail or the document; empty if it was found here.
        cause: for a hole found here, why it is one.
        cells: what it explains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    text: str
    page: str
    source: str = ""
    cause: str = ""
    cells: tuple[Pattern, ...]

    @property
    def found_here(self) -> bool:
        return not self.source


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class Holes(BaseModel):
    """All of them, the more particular ones first: the first that fits explains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    holes: tuple[Hole, ...]

    @classmethod
    def shipped(cls) -> Holes:
        """Those that come with the package."""
        text = files("vtlab_matrix").joinpath("holes.yaml").read_text(encoding="utf-8")
        return cls.model_validate(yaml.safe_load(text))

    def explain(self, outcome: Outcome) -> Hole | None:
        """What explains a red cell; None for a cell that is not red, or that nothing explains."""
        if not outcome.verdict.red:
            return None
        fitting = (hole for hole in self.holes if any(one.fits(outcome.cell, outcome.verdict) for one in hole.cells))
        return next(fitting, None)
