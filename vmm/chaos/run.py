"""Faults one after another, by a seed, and what must hold after each."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmm.chaos.observer import PATIENCE, Findings, Observer
from vmm.chaos.relay import Relay
from vmm.launcher import LocalLab, launch
from vmm.supervisor import Budget
from vtlab.errors import TimedOut, VtlabError
from vtlab.trust.roles import Role

# Seconds that a process is stopped or a channel held up, at most; VTL1 may take 10 to answer.
_LONGEST_PAUSE = 1.5
# Seconds of undisturbed work before a fault, at most.
_LONGEST_WAIT = 0.3
_LEVELS = (Role.GUEST, Role.MONITOR)


def p95(seconds: Collection[float]) -> float:
    """The one that 95 % do not exceed; 0 without any."""
    ordered = sorted(seconds)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0


@dataclass
class Report:
    """What a run came to.

    Attributes:
        faults: injected so far.
        guest_kills: of them, those that killed the guest process.
        recoveries: seconds from the death of one process until every vCPU had gone on.
    """

    findings: Findings
    faults: int = 0
    guest_kills: int = 0
    recoveries: list[float] = field(default_factory=list)

    @property
    def p95(self) -> float:
        """Of the recoveries."""
        return p95(self.recoveries)

    @property
    def good(self) -> bool:
        return self.findings.good and len(self.findings.resets) <= self.guest_kills

    def figures(self) -> dict[str, int | float]:
        """What the last line of a run says, by name; the recovery in seconds."""
        found = self.findings
        counts = {"faults": self.faults, "guest kills": self.guest_kills, "resets": len(found.resets)}
        counts |= {"lost": found.lost, "doubled": found.doubled, "windows": found.windows}
        return {**counts, "recovery p95": round(self.p95, 2)}

    def line(self) -> str:
        """The last line of a run."""
        *counts, (last, seconds) = self.figures().items()
        return f"chaos: {', '.join(f'{name} {count}' for name, count in counts)}, {last} {seconds:.2f} s"


class Chaos:
    """One laboratory that things happen to."""

    def __init__(self, lab: LocalLab, relays: dict[Role, Relay], observer: Observer, seed: int) -> None:
        self.report = Report(observer.findings)
        self._lab = lab
        self._relays = relays
        self._observer = observer
        self._random = random.Random(seed)
        self._faults: tuple[tuple[int, str, Callable[[], object]], ...] = (
            (5, "kill vmm", lambda: self.kill(Role.VMM)),
            (5, "kill monitor", lambda: self.kill(Role.MONITOR)),
            (2, "kill guest", lambda: self.kill(Role.GUEST)),
            (2, "kill vmm and monitor", lambda: self.kill(Role.VMM, Role.MONITOR)),
            (1, "kill guest and one more", lambda: self.kill(Role.GUEST, self._one(Role.VMM, Role.MONITOR))),
            (1, "kill all three", lambda: self.kill(*Role.__members__.values())),
            (2, "stop vmm", lambda: self._stop(Role.VMM)),
            (2, "stop monitor", lambda: self._stop(Role.MONITOR)),
            (1, "stop guest", lambda: self._stop(Role.GUEST)),
            (2, "cut a channel", self._cut),
            (2, "hold up a channel", lambda: self._hold(self._one(*_LEVELS))),
            (1, "kill while a channel is cut", self._kill_and_cut),
        )

    def fault(self) -> str:
        """Injects one, waits until the guest goes on, and checks. Returns what it was, and how long all of it took.

        Raises:
            TimedOut: a process does not come back, or the guest does not go on.
        """
        time.sleep(self._random.uniform(0, _LONGEST_WAIT))
        weights = [weight for weight, _, _ in self._faults]
        ((_, name, inject),) = self._random.choices(self._faults, weights)
        self.report.faults += 1
        started = time.monotonic()
        inject()
        self._observer.wait_progress(1)
        self._observer.check()
        return f"{name}, {time.monotonic() - started:.2f} s"

    def kill(self, *roles: Role) -> None:
        """Kills them at once and waits until they are back and every vCPU has gone on. Raises VtlabError."""
        local = [role for role in roles if role in self._lab.supervisor.processes]
        before = {role: self._lab.supervisor.restarts(role) for role in local}
        self.report.guest_kills += Role.GUEST in local
        started = time.monotonic()
        for role in local:
            os.kill(self._lab.pids[role], signal.SIGKILL)
        for role, count in before.items():
            if not self._lab.supervisor.wait_restarted(role, count + 1, PATIENCE):
                raise TimedOut(role.value, f"was not restarted in {PATIENCE:g} s", seconds=PATIENCE)
        if self._lab.supervisor.failure is not None:
            raise self._lab.supervisor.failure
        self._observer.wait_progress(1)
        if len(local) == 1:
            self.report.recoveries.append(time.monotonic() - started)

    def _stop(self, role: Role) -> None:
        pid = self._lab.pids[role]
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self._random.uniform(0, _LONGEST_PAUSE))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _one(self, *roles: Role) -> Role:
        return self._random.choice(roles)

    def _cut(self) -> None:
        self._relays[self._one(*_LEVELS)].cut()

    def _hold(self, role: Role) -> None:
        self._relays[role].hold()
        try:
            time.sleep(self._random.uniform(0, _LONGEST_PAUSE))
        finally:
            self._relays[role].release()

    def _kill_and_cut(self) -> None:
        self._cut()
        self.kill(self._one(Role.VMM, Role.MONITOR))


@contextlib.contextmanager
def laboratory() -> Iterator[tuple[LocalLab, dict[Role, Relay]]]:
    """Three processes, restarted as often as need be, whose VMM reaches the levels by relays."""
    relays: dict[Role, Relay] = {}

    def between(role: Role, address: str) -> str:
        target = Path(address.removeprefix("unix:"))
        listen = target.with_name(f"r-{target.name}")
        relays[role] = Relay(listen, target)
        return f"unix:{listen}"

    try:
        with launch(budget=Budget(deaths=1 << 20, attempts=10), between=between) as lab:
            yield lab, relays
    finally:
        for relay in relays.values():
            relay.close()


def run(faults: int, seed: int, processors: int = 2, told: Callable[[int, str, Report], object] = print) -> Report:
    """So many faults, or fewer if the machine does not survive one; then something is lost.

    Args:
        told: is given number and name of each fault when it is over, and the report so far.

    Raises:
        VtlabError: the laboratory does not start.
    """
    with laboratory() as (lab, relays):
        observer = Observer(lab, processors)
        chaos = Chaos(lab, relays, observer, seed)
        try:
            for number in range(1, faults + 1):
                name = chaos.fault()
                told(number, name, chaos.report)
            observer.close()
        except VtlabError as error:
            if chaos.report.findings.good:
                chaos.report.findings.find("lost", f"the machine: {error}; {observer.state()}")
        return chaos.report


def recoveries(rounds: int, processors: int = 2) -> dict[Role, list[float]]:
    """Each role killed so often, in turn: the seconds until every vCPU had gone on, by role.

    Raises:
        VtlabError: the laboratory does not start or come back.
        RuntimeError: something was lost, doubled or open.
    """
    roles = (Role.VMM, Role.MONITOR, Role.GUEST)
    with laboratory() as (lab, relays):
        observer = Observer(lab, processors)
        chaos = Chaos(lab, relays, observer, seed=0)
        for _ in range(rounds):
            for role in roles:
                chaos.kill(role)
                observer.check()
        observer.close()
    if not chaos.report.good:
        raise RuntimeError(f"recovery: {'; '.join(observer.findings.problems)}")
    return {role: chaos.report.recoveries[place :: len(roles)] for place, role in enumerate(roles)}
