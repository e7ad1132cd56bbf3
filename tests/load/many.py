"""`python -m tests.load.many`: many machines at once, many readers of their events, and whether all of them get on.

Each machine has three processes of its own and runs the guest of the chaos runs, guarded, which keeps attempting what
it may not. Ends with 1 if a machine stood still, an event was lost without a word, or memory grew without end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.load.processes import mib, private
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab, launch

_START = 600.0  # seconds for all to start, on a machine that has little time for it
_INTERVAL = 5.0  # seconds between two looks at progress
_CLIENTS_OF_A_PROCESS = 250
# How much the processes of one machine may grow over the run, all together: the event log fills up in it.
MOST_GROWTH = 64 << 20


@dataclass
class One:
    """A machine.

    Attributes:
        rounds: of its guest, at each look.
        work: exceptions that its guest has taken and lines that it has written, some dozens a round.
        memory: bytes that its three processes have for themselves, at each look.
    """

    lab: LocalLab
    observer: Observer
    rounds: list[int]
    work: list[int]
    memory: list[int]

    def look(self) -> None:
        self.rounds.append(sum(status.rounds for status in self.observer.statuses()))
        self.work.append(sum(status.faults + status.logged for status in self.observer.statuses()))
        self.memory.append(sum(private(pid) for pid in self.lab.pids.values()))

    @property
    def stood_still(self) -> int:
        """Intervals in which nothing was done."""
        return sum(now == then for then, now in zip(self.work, self.work[1:], strict=False))


@contextlib.contextmanager
def machines(count: int, vcpus: int) -> Iterator[list[One]]:
    """So many, working."""

    def start(_number: int) -> One:
        lab = stack.enter_context(launch(timeout=_START))
        observer = Observer(lab, vcpus)
        stack.callback(observer.close)
        return One(lab, observer, [], [], [])

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        yield list(pool.map(start, range(count)))


@contextlib.contextmanager
def watchers(made: list[One], clients: int, slow: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes with that many clients in all, each with its first event."""
    labs = [
        {"vmm": one.lab.addresses.vmm, "trust": str(one.lab.addresses.trust), "vm": one.observer.machine.name}
        for one in made
    ]
    shares: list[list[dict[str, Any]]] = []
    left = clients
    while left:
        share = min(left, _CLIENTS_OF_A_PROCESS)
        counts = [share // len(labs) + (number < share % len(labs)) for number in range(len(labs))]
        shares.append(
            [
                lab | {"clients": count, "slow": round(count * slow)}
                for lab, count in zip(labs, counts, strict=True)
                if count
            ]
        )
        left -= share
    processes = []
    with contextlib.ExitStack() as stack:
        for share_ in shares:
            command = [sys.executable, "-m", "tests.load.watchers"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdin is not None
            process.stdin.write(json.dumps(share_) + "\n")
            process.stdin.flush()
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the clients did not start")
        yield processes


def findings(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Ends the clients; what each of them saw."""
    seen = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        assert process.stdout is not None
        seen += json.loads(process.stdout.readline())
    return seen


def run(count: int, clients: int, seconds: float, vcpus: int, slow: float) -> bool:
    begun = time.monotonic()
    with machines(count, vcpus) as made:
        print(f"{count} machines work after {time.monotonic() - begun:.0f} s", flush=True)
        quiet = _rates(made, min(seconds, 10.0))
        with watchers(made, clients, slow) as processes:
            print(f"{clients} clients have their first events after {time.monotonic() - begun:.0f} s", flush=True)
            for one in made:
                one.rounds.clear()
                one.work.clear()
                one.memory.clear()
            started = time.monotonic()
            while time.monotonic() < started + seconds:
                for one in made:
                    one.look()
                time.sleep(_INTERVAL)
            for one in made:
                one.look()
            took = time.monotonic() - started
            client_memory = sum(private(process.pid) for process in processes)
            seen = findings(processes)
        for one in made:
            one.observer.check()
        return report(made, seen, took, quiet, client_memory)


def _rates(made: list[One], seconds: float) -> float:
    """Rounds a second of all machines, before anybody watches."""
    for one in made:
        one.look()
    started = time.monotonic()
    time.sleep(seconds)
    for one in made:
        one.look()
    return sum(one.rounds[-1] - one.rounds[0] for one in made) / (time.monotonic() - started)


def report(made: list[One], seen: list[dict[str, Any]], took: float, quiet: float, client_memory: int) -> bool:
    """Prints the figures; True if all is as it must be."""
    slow, fast = [one for one in seen if one["slow"]], [one for one in seen if not one["slow"]]
    done = [one.rounds[-1] - one.rounds[0] for one in made]
    still = sum(one.stood_still for one in made)
    growth = max(one.memory[-1] - one.memory[0] for one in made)
    problems = [text for one in made for text in one.observer.findings.problems]
    silent = sum(one["silent"] + one["backwards"] for one in seen)
    ended = [f"{one['vm']}: {one['error']}" for one in seen if one["error"]]
    print(
        f"guests: {min(done)} to {max(done)} rounds each in {took:.0f} s, {sum(done) / took:.0f} a second in all "
        f"({quiet:.0f} without clients), {still} intervals of {_INTERVAL:g} s without progress, "
        f"{len(problems)} problems"
    )
    for name, group in (("fast", fast), ("slow", slow)):
        if group:
            events, told = sum(one["events"] for one in group), sum(one["told"] for one in group)
            rate = f"{events / took:.0f} a second"
            print(f"{name} clients: {len(group)}, {events} events ({rate}), told of {told} that they missed")
    print(f"events: lost without a word {silent}, streams that ended early {len(ended)} {ended[:1] or ''}")
    print(
        f"memory of a machine's three processes: {mib(max(one.memory[0] for one in made))} MiB at most at the start, "
        f"{mib(max(max(one.memory) for one in made))} at most, growth {mib(growth)}; clients: {mib(client_memory)} MiB"
    )
    good = not (still or silent or ended or problems) and growth < MOST_GROWTH and min(done) > 0
    print(f"load: {len(made)} machines, {len(seen)} clients: {'good' if good else 'BAD'}")
    for text in problems[:10]:
        print(f"  {text}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.load.many", description=__doc__)
    parser.add_argument("--machines", type=int, default=16)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--slow", type=float, default=0.1, help="share of the clients that read slowly")
    given = parser.parse_args()
    return 0 if run(given.machines, given.clients, given.seconds, given.vcpus, given.slow) else 1


if __name__ == "__main__":
    sys.exit(main())
