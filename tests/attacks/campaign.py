"""Attacks and controls run one by one, each on a machine of its own, and what came of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from vtlab.client import Lab
from vtlab.errors import VtlabError
from vtlab_attacks.evidence import Attack, Control, Evidence, Outcome
from vtlab_attacks.guest import boot

WORKERS = 2


@dataclass(frozen=True)
class Result:
    """One attack or control, done once.

    Attributes:
        evidence: None if it could not be carried out; then `error` says why.
        seconds: from the machine's creation to its end.
    """

    entry: Attack | Control
    protected: bool
    evidence: Evidence | None
    error: str
    seconds: float

    @property
    def as_expected(self) -> bool:
        if self.evidence is None:
            return False
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


def run_one(lab: Lab, entry: Attack | Control, protected: bool) -> Result:
    """On a fresh machine. What goes wrong with the machine itself is part of the result."""
    started = time.monotonic()
    evidence, error = None, ""
    try:
        with boot(lab, protected) as guest:
            evidence = entry.run(guest.machine, guest.driver, guest.symbols)
    except (VtlabError, ValueError) as problem:
        error = str(problem)
    return Result(entry, protected, evidence, error, time.monotonic() - started)


def run_all(
    lab: Lab,
    jobs: Sequence[tuple[Attack | Control, Sequence[bool]]],
    on_start: Callable[[Attack | Control], None] = lambda entry: None,
) -> Iterator[tuple[Result, ...]]:
    """Runs each job's attack or control once for each of its protections; a few jobs at a time, results in order."""
    cancelled = threading.Event()

    def work(entry: Attack | Control, protections: Sequence[bool]) -> tuple[Result, ...]:
        if cancelled.is_set():
            return ()
        on_start(entry)
        return tuple(run_one(lab, entry, protected) for protected in protections)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="attack") as pool:
        futures: list[Future[tuple[Result, ...]]] = [pool.submit(work, *job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        finally:
            cancelled.set()
