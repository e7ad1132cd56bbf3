"""One cell on a machine of its own. What goes wrong with the machine itself is part of what came of it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from vtlab.client import Lab, Machine, serial
from vtlab.client.names import state_name
from vtlab.errors import GuestLost, VtlabError, WrongState
from vtlab_attacks.campaign import BROKEN, DESIGN, verdicts_on
from vtlab_attacks.evidence import Control
from vtlab_attacks.guest import Guest, boot, kernel_symbols
from vtlab_attacks.table import CONTROLS
from vtlab_matrix.cells import BOOT, EVERY_ATTACK, EVERY_TRANSITION, Cell, Verdict
from vtlab_matrix.outcome import Observation, Outcome
from vtlab_matrix.timeline import Line, lines

ENDED = [state_name(state) for state in serial.ENDED]


def lost(problem: Exception) -> bool:
    """Whether it says by the machine's state, not by a clock, that the guest never comes back."""
    return isinstance(problem, GuestLost) or (isinstance(problem, WrongState) and problem.state in ENDED)


class Recorder:
    """Reads what a machine did before it is destroyed.

    Attributes:
        timeline, log, rules: as of Outcome.
        lost: the laboratory could not be asked, so it is not to be used again.
    """

    def __init__(self, lab: Lab, design: str) -> None:
        self._lab = lab
        self._design = design
        self._marks: list[tuple[int, str]] = []
        self.timeline: tuple[Line, ...] = ()
        self.log = ""
        self.rules: tuple[str, ...] = ()
        self.lost = False

    def mark(self, name: str) -> None:
        """A part of the cell begins."""
        self._marks.append((time.time_ns(), name))

    def record(self, machine: Machine) -> None:
        """At the machine's end, however it came."""
        self.log = machine.serial(0)
        try:
            self.timeline = lines(machine.events(until_now=True), self._marks, kernel_symbols())
            self.rules = verdicts_on(self._lab, machine, self._design)
        except VtlabError:
            self.lost = True


class CellRun:
    """A cell while it runs.

    Attributes:
        recorder: of the machine that the verdict is about.
        lost_guest: the machine's own state says that its guest never comes back; the laboratory is none the worse.
    """

    def __init__(self, lab: Lab, cell: Cell, policy: str = "") -> None:
        self._lab = lab
        self._cell = cell
        self._policy = policy
        self.recorder = Recorder(lab, cell.design)
        self._transition: Observation | None = None
        self._broken: tuple[Observation, ...] = ()
        self._kept = 0
        self._attacking = False
        self.lost_guest = False

    def run(self) -> Outcome:
        """Does it once."""
        started = time.monotonic()
        try:
            verdict, evidence = self._attack() if self._cell.kind == "attack" else self._move()
        except BROKEN as problem:
            evidence = Observation(name=self._cell.name, error=str(problem))
            self.lost_guest = lost(problem)
            broken = self.lost_guest or not self._attacking
            verdict = Verdict.GUEST_BROKEN if broken else Verdict.UNCLEAR
        return Outcome(
            cell=self._cell,
            verdict=verdict,
            evidence=evidence,
            transition=self._transition,
            broken=self._broken,
            kept=self._kept,
            rules=self.recorder.rules,
            policy=self._policy,
            seconds=time.monotonic() - started,
            timeline=self.recorder.timeline,
            log=self.recorder.log,
        )

    def _attack(self) -> tuple[Verdict, Observation]:
        cell = self._cell
        attack = EVERY_ATTACK[cell.name]
        transition = EVERY_TRANSITION[cell.after] if cell.after else None
        vp_count = max(attack.vp_count, transition.vp_count if transition else 1)
        with boot(self._lab, True, vp_count, cell.design, policy=self._policy, at_end=self.recorder.record) as started:
            guest = started
            if transition:
                self.recorder.mark(f"transition {transition.name}")
                guest, moved = transition.run(guest)
                self._transition = Observation.of(transition.name, moved)
                if not self._transition.kept:
                    return Verdict.GUEST_BROKEN, Observation(name=cell.name, error="not attempted: no guest is left")
            self.recorder.mark(f"attack {attack.name}")
            self._attacking = True
            evidence = Observation.of(attack.name, attack.run(guest.machine, guest.driver, guest.symbols))
            return evidence.verdict, evidence

    def _move(self) -> tuple[Verdict, Observation]:
        """All that works on a fresh machine of the design has to work after the transition too.

        The first start has nothing before it, so all that the design offers has to work.
        """
        cell = self._cell
        controls = [control for control in CONTROLS if cell.design == DESIGN or not control.needs_vtl1]
        transition = None if cell.name == BOOT else EVERY_TRANSITION[cell.name]
        vp_count = transition.vp_count if transition else 1
        worked = {control.name for control in controls}
        if transition:
            with boot(self._lab, True, vp_count, cell.design, policy=self._policy) as fresh:
                worked = {one.name for one in _try(fresh, controls) if one.kept}
        with boot(self._lab, True, vp_count, cell.design, policy=self._policy, at_end=self.recorder.record) as started:
            guest = started
            if transition:
                self.recorder.mark(f"transition {transition.name}")
                guest, moved = transition.run(guest)
                evidence = Observation.of(transition.name, moved)
            else:
                evidence = Observation(name=BOOT, what="kernel", before="off", after="waits for commands", reached=True)
            self.recorder.mark("legitimate operations")
            tried = _try(guest, controls) if evidence.reached else []
        self._broken = tuple(one for one in tried if one.name in worked and not one.kept)
        self._kept = sum(one.kept for one in tried)
        return Verdict.KEPT if evidence.kept and not self._broken else Verdict.GUEST_BROKEN, evidence


def _try(guest: Guest, controls: Sequence[Control]) -> list[Observation]:
    """Legitimate operations one after the other; where the guest is lost, the rest is too."""
    tried: list[Observation] = []
    error = ""
    for control in controls:
        one = Observation(name=control.name, error=error)
        if not error:
            try:
                evidence = control.run(guest.machine, guest.driver, guest.symbols)
                one = Observation.of(control.name, evidence)
            except BROKEN as problem:
                error = str(problem)
                one = Observation(name=control.name, error=error)
        tried.append(one)
    return tried


def run_cell(lab: Lab, cell: Cell, seed: int = 0, policy: str = "") -> tuple[Outcome, bool]:
    """Runs a cell; what came of it, and whether the laboratory is fit for another one.

    Args:
        lab: whose levels serve no machine.
        seed: what is random in the cell follows from it and the cell.
        policy: in place of the guest's own, for experiments.
    """
    random.seed(f"{seed} {cell}")
    one = CellRun(lab, cell, policy)
    outcome = one.run()
    return outcome, not one.recorder.lost and (one.lost_guest or not outcome.evidence.error)


def not_run(cell: Cell, because: Outcome) -> Outcome:
    """An attack after a transition that broke the guest: nothing is left to attack, and the evidence is there."""
    return Outcome(
        cell=cell,
        verdict=Verdict.GUEST_BROKEN,
        evidence=Observation(name=cell.name, error=f"not attempted: {because.cell} leaves no guest"),
        transition=because.evidence,
        broken=because.broken,
    )
