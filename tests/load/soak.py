"""`python -m tests.load.soak --minutes 30`: one machine that works for long, and whether its processes stay small.

The guest is selfguard with two vCPUs, protected: its timer ticks, it calls VTL1's services, loads and changes what its
policy allows, and is attacked with everything that the demo has, turn after turn, on the same machine. Prints once a
minute what each process holds, and beside that how much of the guest's code it keeps translated. Ends with 1 if an
attack succeeded or was unclear, a control failed, the guest or a process did not live through it, or memory grew.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

from tests.load.processes import Use, mib, use
from vmm.launcher import LocalLab, launch
from vtl0_guest.cpu.engine import TRANSLATED_CODE
from vtlab.services import Service
from vtlab_attacks.campaign import BROKEN
from vtlab_attacks.evidence import Outcome
from vtlab_attacks.guest import Guest, boot
from vtlab_attacks.table import ATTACKS, CONTROLS

VPS = 2
_MINUTE = 60.0
# The refused module's bytes stay where it was copied to, in place of those of the control that loads a signed one: from
# the second time on there is no telling by the memory that nothing happened.
_ONCE = frozenset({"module-unsigned", "module-tampered"})
_PINGS = 20  # VTL calls in a turn, beside those of attacks and controls
# Of a process, from the third quarter of the run to the fourth, by the medians of what it holds in each. Before that,
# the logs of events and verdicts fill up to their bounds.
MOST_GROWTH = 2 << 20
# Hooks of an engine are code too, and the kernel gives large pages.
PIECE = 4 << 20


@dataclass
class Soak:
    """Attributes:
    outcomes: of attacks and controls, and what went wrong.
    ticks: timer interrupts of the guest.
    calls: VTL calls made on top of all else.
    uses: of each process, by role, once a minute.
    """

    lab: LocalLab
    guest: Guest
    outcomes: Counter[str] = field(default_factory=Counter)
    ticks: int = 0
    calls: int = 0
    turns: int = 0
    uses: dict[str, list[Use]] = field(default_factory=dict)

    def turn(self) -> None:
        """Every attack and every control once."""
        machine, driver, symbols = self.guest.machine, self.guest.driver, self.guest.symbols
        for attack in ATTACKS:
            if self.turns and attack.name in _ONCE:
                continue
            evidence = attack.run(machine, driver, symbols)
            self.outcomes["attacks"] += 1
            if evidence.outcome is not Outcome.BLOCKED:
                self._wrong(f"{attack.name}: {evidence.outcome.value}")
        for control in CONTROLS:
            evidence = control.run(machine, driver, symbols)
            self.outcomes["controls"] += 1
            if not evidence.kept:
                self._wrong(f"{control.name}: not kept ({evidence.denial})")
        for _ in range(_PINGS):
            driver.vtl(Service.PING)
            self.calls += 1
        ticks = driver.ticks()
        if ticks <= self.ticks:
            self._wrong(f"{ticks} ticks after {self.ticks}")
        self.ticks = ticks
        self.turns += 1

    def _wrong(self, what: str) -> None:
        self.outcomes[f"WRONG {what}"] += 1
        print(f"  {what}", flush=True)

    def look(self, minute: int) -> None:
        """Notes and prints what each process holds."""
        for role, pid in self.lab.pids.items():
            self.uses.setdefault(role, []).append(use(pid))
        now = ", ".join(
            f"{role} {mib(uses[-1].anonymous)} + {mib(uses[-1].translated)} MiB {uses[-1].threads} threads "
            f"{uses[-1].descriptors} files"
            for role, uses in self.uses.items()
        )
        print(f"minute {minute}: {self.turns} turns, {self.ticks} ticks; {now}", flush=True)

    def grown(self) -> dict[str, int]:
        """Bytes, by role, see MOST_GROWTH."""
        growth = {}
        for role, uses in self.uses.items():
            sizes = [one.anonymous for one in uses]
            half, quarter = len(sizes) // 2, -(-len(sizes) // 4)
            growth[role] = int(median(sizes[-quarter:]) - median(sizes[half:-quarter] or sizes[:1]))
        return growth


def run(minutes: float) -> bool:
    with launch() as lab, boot(lab, protected=True, vp_count=VPS) as guest:
        soak = Soak(lab, guest)
        soak.turn()
        started = time.monotonic()
        minute = 0
        try:
            while time.monotonic() < started + minutes * _MINUTE:
                if time.monotonic() >= started + minute * _MINUTE:
                    soak.look(minute)
                    minute += 1
                soak.turn()
        except BROKEN as problem:
            soak._wrong(f"the machine: {problem}")
        soak.look(minute)
        return report(soak, minutes)


def report(soak: Soak, minutes: float) -> bool:
    """Prints the figures; True if all is as it must be."""
    growth = soak.grown()
    restarts = sum(soak.lab.supervisor.restarts(role) for role in soak.lab.supervisor.processes)
    generation = soak.guest.machine.info().generation
    wrong = sum(count for what, count in soak.outcomes.items() if what.startswith("WRONG"))
    for role, uses in soak.uses.items():
        first, last = uses[0], uses[-1]
        print(
            f"{role}: {mib(first.anonymous)} MiB at the start, {mib(last.anonymous)} at the end, "
            f"{growth[role] / 2**20:+.1f} in the last quarter; guest code translated {mib(first.translated)} to "
            f"{mib(last.translated)} MiB; threads {first.threads} to {last.threads}, "
            f"files {first.descriptors} to {last.descriptors}"
        )
    bounded = max(one.translated for uses in soak.uses.values() for one in uses) <= VPS * (TRANSLATED_CODE + PIECE)
    good = not wrong and not restarts and generation == 1 and max(growth.values()) < MOST_GROWTH and bounded
    print(
        f"soak: {minutes:g} minutes, {soak.turns} turns, {soak.outcomes['attacks']} attacks, "
        f"{soak.outcomes['controls']} controls, {soak.calls} VTL calls, {soak.ticks} ticks, {wrong} wrong, "
        f"{restarts} restarts, {generation - 1} resets: {'good' if good else 'BAD'}"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.load.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    return 0 if run(parser.parse_args().minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
