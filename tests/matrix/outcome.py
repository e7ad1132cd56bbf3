"""What came of a cell: its verdict, what it rests on, and what the machine did meanwhile."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from vtlab_attacks.evidence import Evidence
from vtlab_matrix.cells import Cell, Verdict
from vtlab_matrix.timeline import Line


class Observation(BaseModel):
    """State of the machine around one operation, as vtlab_attacks.evidence has it."""

    model_config = ConfigDict(frozen=True)

    name: str
    what: str = ""
    before: str = ""
    after: str = ""
    reached: bool = False
    intact: bool = False
    denial: str = ""
    error: str = ""  # why it could not be carried out

    @classmethod
    def of(cls, name: str, evidence: Evidence) -> Observation:
        return cls(
            name=name,
            what=evidence.what,
            before=evidence.before,
            after=evidence.after,
            reached=evidence.reached,
            intact=evidence.intact,
            denial=evidence.denial,
        )

    @property
    def kept(self) -> bool:
        """For a legitimate operation: it had its effect and nobody objected."""
        return self.reached and not self.denial and not self.error

    @property
    def verdict(self) -> Verdict:
        """For an attack."""
        if self.reached:
            return Verdict.SUCCEEDED
        return Verdict.BLOCKED if self.intact and self.denial and not self.error else Verdict.UNCLEAR

    def __str__(self) -> str:
        if self.error:
            return f"{self.name}: {self.error}"
        return f"{self.what}: {self.before} → {self.after}" + (f"; {self.denial}" if self.denial else "")


class Outcome(BaseModel):
    """A cell that ran.

    Attributes:
        evidence: of the attack, or of the transition that the cell is about.
        transition: of the transition before an attack.
        broken: legitimate operations that worked before the transition and not after it.
        kept: how many worked.
        rules: what the protection refused, "rule: why".
        seconds: from the creation of its first machine to the end of its last.
        earlier: why it was done once more: what broke the laboratory of the first time.
        policy: what was in place of the guest's own, as of Task.
        timeline, log: exits and decisions after the boot, and what the guest's kernel said.
    """

    model_config = ConfigDict(frozen=True)

    cell: Cell
    verdict: Verdict
    evidence: Observation
    transition: Observation | None = None
    broken: tuple[Observation, ...] = ()
    kept: int = 0
    rules: tuple[str, ...] = ()
    seconds: float = 0.0
    earlier: str = ""
    policy: str = ""
    timeline: tuple[Line, ...] = ()
    log: str = ""

    def summary(self) -> dict[str, Any]:
        """For `--json`: the cell, its verdict and what it rests on."""
        evidence: dict[str, Any] = self.evidence.model_dump(exclude={"name"}, exclude_defaults=True)
        if self.transition is not None:
            evidence["transition"] = self.transition.model_dump(exclude_defaults=True)
        if self.broken:
            evidence["broken"] = [one.model_dump(exclude_defaults=True) for one in self.broken]
        if self.cell.kind == "transition":
            evidence["kept"] = self.kept
        if self.rules:
            evidence["rules"] = list(self.rules)
        if self.earlier:
            evidence["earlier"] = self.earlier
        summary: dict[str, Any] = self.cell.model_dump()
        return summary | {
            "verdict": self.verdict.value,
            "evidence": evidence,
            "seconds": round(self.seconds, 3),
        }
