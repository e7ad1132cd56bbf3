"""Attacks, each on a machine of its own, and controls, all on one; and what came of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vtlab.client import Lab, Machine
from vtlab.client.driver import GuestFault, GuestRefusal
from vtlab.errors import VtlabError
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import ACTION_COMMIT
from vtlab_attacks.evidence import Attack, Control, Evidence, Outcome
from vtlab_attacks.guest import boot

DESIGN = "vtl"  # the one that is promised to hold
# What ends an attack before it has evidence: the machine is lost, or a preparation that had to work did not.
BROKEN = (VtlabError, GuestFault, GuestRefusal, ValueError)


@dataclass(frozen=True)
class Result:
    """One attack or control, done once.

    Attributes:
        evidence: None if it could not be carried out; then `error` says why.
        seconds: from the machine's creation to its end.
        verdicts: what the protection said of it; VTL1 with the name of the rule.
        design: the machine's.
    """

    entry: Attack | Control
    protected: bool
    evidence: Evidence | None
    error: str
    seconds: float
    verdicts: tuple[str, ...] = ()
    design: str = DESIGN

    @property
    def as_expected(self) -> bool:
        """Only `vtl` has to hold; of other designs it is enough to know what they do."""
        if self.evidence is None:
            return False
        if self.protected and self.design != DESIGN:
            return isinstance(self.entry, Control) or self.evidence.outcome is not Outcome.UNCLEAR
        if isinstance(self.entry, Control):
            return bool(self.evidence.kept)
        blocked = self.protected or self.entry.impossible_unprotected
        return bool(self.evidence.outcome is (Outcome.BLOCKED if blocked else Outcome.SUCCEEDED))


@dataclass(frozen=True)
class Summary:
    """The figures of a campaign. `named` counts the attacks that say why they are impossible without VTL1."""

    attacks: int = 0
    blocked: int = 0
    succeeded: int = 0
    controls: int = 0
    kept: int = 0
    unprotected_succeeded: int = 0
    named: int = 0
    design: str = DESIGN

    def add(self, result: Result) -> Summary:
        outcome = result.evidence.outcome if result.evidence else None
        if isinstance(result.entry, Control):
            kept = result.evidence is not None and result.evidence.kept
            return replace(self, controls=self.controls + 1, kept=self.kept + kept)
        if not result.protected:
            return replace(
                self,
                unprotected_succeeded=self.unprotected_succeeded + (outcome is Outcome.SUCCEEDED),
                named=self.named + bool(result.entry.impossible_unprotected),
            )
        return replace(
            self,
            attacks=self.attacks + 1,
            blocked=self.blocked + (outcome is Outcome.BLOCKED),
            succeeded=self.succeeded + (outcome is Outcome.SUCCEEDED),
        )

    @property
    def passed(self) -> bool:
        if self.design != DESIGN:
            return self.blocked + self.succeeded == self.attacks
        return (
            self.blocked == self.attacks
            and self.succeeded == 0
            and self.kept == self.controls
            and self.unprotected_succeeded == self.attacks - self.named
        )

    def __str__(self) -> str:
        return (
            f"attacks {self.attacks}, blocked {self.blocked}, succeeded {self.succeeded}; "
            f"controls {self.controls}, kept {self.kept}; unprotected succeeded {self.unprotected_succeeded}"
        )


def verdicts_on(lab: Lab, machine: Machine, design: str = DESIGN) -> tuple[str, ...]:
    """What the machine's protection refused, as "rule: why"."""
    if design != DESIGN:
        kept = machine.events((vmm_pb2.EVENT_KIND_VERDICT,), until_now=True)
        refusals = [event.verdict.resolution for event in kept]
        return tuple(dict.fromkeys(one.reason for one in refusals if one.action != ACTION_COMMIT))
    refused = [one for one in lab.policy.verdicts_so_far(machine) if one.resolution.action != ACTION_COMMIT]
    reasons = [(one.rule, one.resolution.reason.removeprefix(f"{one.rule}: ")) for one in refused]
    return tuple(dict.fromkeys(f"{rule}: {reason}" for rule, reason in reasons))


def run_one(lab: Lab, attack: Attack, protected: bool, design: str = DESIGN) -> Result:
    """On a fresh machine. What goes wrong with the machine itself is part of the result."""
    started = time.monotonic()
    evidence, error = None, ""
    verdicts: tuple[str, ...] = ()
    try:
        with boot(lab, protected, attack.vp_count, design) as guest:
            evidence = attack.run(guest.machine, guest.driver, guest.symbols)
            verdicts = verdicts_on(lab, guest.machine, design) if protected else ()
    except BROKEN as problem:
        error = str(problem)
    return Result(attack, protected, evidence, error, time.monotonic() - started, verdicts, design)


def run_controls(lab: Lab, controls: Sequence[Control], design: str = DESIGN) -> Iterator[Result]:
    """One after the other on one protected machine, where they must not disturb one another either."""
    started = time.monotonic()
    left = [control for control in controls if design == DESIGN or not control.needs_vtl1]
    try:
        with boot(lab, protected=True, design=design) as guest:
            while left:
                evidence = left[0].run(guest.machine, guest.driver, guest.symbols)
                yield Result(left.pop(0), True, evidence, "", time.monotonic() - started, design=design)
                started = time.monotonic()
    except BROKEN as problem:
        for control in left:
            yield Result(control, True, None, str(problem), time.monotonic() - started, design=design)


def run_all(
    lab: Lab,
    attacks: Sequence[Attack],
    controls: Sequence[Control],
    protections: Sequence[bool] = (False, True),
    design: str = DESIGN,
) -> Iterator[list[Result]]:
    """Each attack without and with protection, then the controls with it; one machine at a time."""
    for attack in attacks:
        yield [run_one(lab, attack, protected, design) for protected in protections]
    for result in run_controls(lab, controls, design):
        yield [result]
