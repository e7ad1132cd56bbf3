"""The figures: what is measured against what, and the goal of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import guest, vtl
from tests.bench.echo import EchoClient, EchoServer, microseconds
from tests.bench.machines import Run, create, in_machine, on_bare_engine, ticks_per_second
from tests.bench.measure import Figure, Paired, in_turn
from vmm.chaos.run import p95, recoveries
from vmm.launcher import launch
from vtlab.client import Lab
from vtlab.trust.certificates import ensure_trust
from vtlab.trust.roles import Role
from vtlab.v1.vcpu_pb2 import ACTION_COMPLETE, ENTER_REASON_RESUME, Enter, Resolution, RunRequest, RunResponse
from vtlab_attacks.table import ATTACKS
from vtlab_matrix.cells import Cell
from vtlab_matrix.laboratory import Task
from vtlab_matrix.workers import Workers

LARGE_RAM = 1 << 30  # room for vtl.PAGES pages with a gap after each
WORKLOADS = {"compute": guest.COMPUTE, "paging and memory traffic": guest.MEMORY}
# Bodies to compare with the bare engine, each with its goal; without one where the body is an extreme.
AGAINST_BARE = {
    "compute": (guest.COMPUTE, 0.95),
    "paging and memory traffic": (guest.MEMORY, 0.80),
    "four instructions a block": (guest.BRANCHES, None),
    "each access to another page of 16 MiB": (guest.WALKS, None),
}
ROUNDS = 20  # of a body in one run of an image; the first ones warm the translations up
EXIT_ROUNDS = 10
KILLS = 4  # of each role, a turn
MATRIX_CELLS = 24


@dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Attributes:
        lab: three processes that run.
        trust: trust folder of the echoes.
        folder: for their sockets.
        turns: how often each pair is measured.
        frequency: TSC ticks a second.
    """

    lab: Lab
    trust: Path
    folder: Path
    turns: int
    frequency: float


def against_bare_engine(setting: Setting) -> Iterator[Figure]:
    """Guest speed in the laboratory divided by that of the same bytes on Unicorn alone."""
    for name, (body, goal) in AGAINST_BARE.items():
        image = guest.build(body, ROUNDS)

        computed: set[bytes] = set()

        def bare(image: guest.FlatImage = image, computed: set[bytes] = computed) -> float:
            return _best(on_bare_engine(image), computed)

        def ours(image: guest.FlatImage = image, computed: set[bytes] = computed) -> float:
            return _best(in_machine(setting.lab, image), computed)

        paired = in_turn(bare, ours, setting.turns)
        if len(computed) > 1:
            raise RuntimeError(f"{name}: the machine and the bare engine computed different things")
        yield Figure(
            f"guest speed, {name}, to bare Unicorn", "ratio", paired.ratios, goal, True, _times(setting, paired)
        )


def under_protection(setting: Setting) -> Iterator[Figure]:
    """Guest speed with many pages sealed divided by that without, and how fast they were sealed."""
    for kind, sealing in (("contiguous", vtl.contiguous()), ("scattered", vtl.scattered())):
        seconds: list[float] = []
        for name, body in WORKLOADS.items():
            plain = guest.build(body, ROUNDS)
            sealed = guest.build(body, ROUNDS, vtl.prologue(sealing), sealing.data)

            def unprotected(image: guest.FlatImage = plain) -> float:
                return _best(in_machine(setting.lab, image, LARGE_RAM))

            def protected(image: guest.FlatImage = sealed) -> float:
                run = in_machine(setting.lab, image, LARGE_RAM, vtl1=True)
                seconds.append(run.sealing / setting.frequency)  # noqa: B023 - read in this pass of the loop
                return _best(run)

            paired = in_turn(unprotected, protected, setting.turns)
            title = f"guest speed, {name}, {vtl.PAGES:,} pages sealed {kind}, to unsealed"
            yield Figure(title, "ratio", paired.ratios, 0.95, True, _times(setting, paired))
        rates = [vtl.PAGES / taken for taken in seconds]
        detail = f"{median(seconds):.2f} s for {vtl.PAGES:,} pages, asked for by the guest"
        yield Figure(f"pages sealed a second, {kind}", "pages/s", rates, 100_000, True, detail)


def round_trips(setting: Setting) -> Iterator[Figure]:
    """An exit and a VTL call with its return, through all processes, against bare echoes of the same bytes."""
    exits = guest.build(vtl.EXIT_BODY, EXIT_ROUNDS)
    calls = guest.build(vtl.VTL_CALL_BODY, EXIT_ROUNDS, vtl.prologue(vtl.nothing()), vtl.nothing().data)
    sizes = _message_sizes(setting, exits)
    with (
        EchoServer(setting.folder, setting.trust, Role.GUEST, sizes.exit) as guest_echo,
        EchoServer(setting.folder, setting.trust, Role.MONITOR, sizes.exit) as monitor_echo,
    ):
        to_guest = EchoClient(guest_echo, setting.trust, sizes.enter)
        to_monitor = EchoClient(monitor_echo, setting.trust, sizes.exit)
        count = EXIT_ROUNDS * vtl.EXITS
        try:
            one = in_turn(
                lambda: _each(setting, in_machine(setting.lab, exits)),
                lambda: microseconds([to_guest], count),
                setting.turns,
            )
            two = in_turn(
                lambda: _each(setting, in_machine(setting.lab, calls, vtl1=True)),
                lambda: microseconds([to_guest, to_monitor], count // 2),
                setting.turns,
            )
        finally:
            to_guest.close()
            to_monitor.close()
    detail = f"{median(one.first):.0f} us against {median(one.second):.0f} us for {sizes.enter} + {sizes.exit} bytes"
    yield Figure("exit, guest to VMM to guest, to one bare echo", "ratio", one.ratios, 1.25, False, detail)
    yield Figure("what an exit adds to the echo", "us", one.differences, 45, False)
    detail = f"{median(two.first):.0f} us against {median(two.second):.0f} us"
    yield Figure("VTL call and return, three processes, to two bare echoes", "ratio", two.ratios, 1.2, False, detail)


def start(setting: Setting) -> Iterator[Figure]:
    """From nothing to the end of the first guest instructions: three new processes, a machine, its image."""
    image = guest.build("nop", 1)
    seconds = []
    for _ in range(setting.turns):
        begin = time.perf_counter()
        with launch() as lab:
            in_machine(lab, image)
            seconds.append(time.perf_counter() - begin)
    yield Figure("start of three processes to the first guest instruction", "s", seconds, 2.0, False)


def recovery(setting: Setting) -> Iterator[Figure]:
    """From the kill -9 of one of the three processes until every vCPU of a guest under protection has gone on."""
    by_role = recoveries(setting.turns * KILLS)
    for role, seconds in by_role.items():
        yield Figure(f"recovery of the {role}, killed", "s", seconds, detail=f"p95 {p95(seconds):.2f} s")
    every = [taken for seconds in by_role.values() for taken in seconds]
    yield Figure("recovery of one process, p95", "s", [p95(every)], 1.0, False, f"of {len(every)} kills")


def matrix(setting: Setting) -> Iterator[Figure]:
    """The same cells of the attack matrix by one worker and by two, each with a laboratory that is up."""
    tasks = [Task(Cell(design="vtl", kind="attack", name=attack.name)) for attack in ATTACKS[:MATRIX_CELLS]]

    def seconds(jobs: int) -> float:
        with Workers(jobs, launch) as workers:
            _run_all(workers, tasks[:jobs])
            begin = time.perf_counter()
            _run_all(workers, tasks)
            return time.perf_counter() - begin

    paired = in_turn(lambda: seconds(1), lambda: seconds(2), setting.turns)
    one, two = (median(taken) / len(tasks) for taken in (paired.first, paired.second))
    detail = f"{one:.3f} s a cell with one, {two:.3f} s with two"
    yield Figure("attack matrix, one job to two", "ratio", paired.ratios, 1.7, True, detail)


def _run_all(workers: Any, tasks: list[Any]) -> None:
    red = [outcome for outcome in workers.run(tasks) if outcome.verdict.red]
    if red:
        raise RuntimeError(f"{red[0].cell}: {red[0].verdict}: {red[0].evidence}")


MEASUREMENTS: dict[str, Callable[[Setting], Iterator[Figure]]] = {
    "bare": against_bare_engine,
    "exits": round_trips,
    "protection": under_protection,
    "start": start,
    "recovery": recovery,
    "matrix": matrix,
}


def setting_of(lab: Lab, folder: Path, turns: int) -> Setting:
    """Measures the clock, makes certificates for the echoes and puts the setting together."""
    return Setting(lab, ensure_trust(folder / "trust"), folder, turns, ticks_per_second())


@dataclass(frozen=True)
class _Sizes:
    enter: int
    exit: int


def _message_sizes(setting: Setting, image: guest.FlatImage) -> _Sizes:
    """Bytes of an exit of the measured kind, as the VMM recorded one, and of an enter that answers it."""
    with create(setting.lab, image) as machine:
        machine.start()
        exits = (event.exit for event in machine.events(kinds=["exit"]))
        exit_ = next(exit_ for exit_ in exits if exit_.HasField("hypercall"))
    enter = Enter(sequence=exit_.sequence + 1, reason=ENTER_REASON_RESUME)
    enter.resolution.CopyFrom(Resolution(action=ACTION_COMPLETE, value=2))
    return _Sizes(RunRequest(enter=enter).ByteSize(), RunResponse(exit=exit_).ByteSize())


def _best(run: Run, computed: set[bytes] | None = None) -> float:
    """The fastest round: what can be done when nothing else wants the processor. Adds what was computed to a set."""
    if computed is not None:
        computed.add(run.memory)
    return float(min(run.rounds))


def _each(setting: Setting, run: Run) -> float:
    """Microseconds of one exit or call, as a mean over the rounds."""
    return sum(run.rounds) / len(run.rounds) / vtl.EXITS / setting.frequency * 1e6


def _times(setting: Setting, paired: Paired) -> str:
    first, second = (median(values) / setting.frequency * 1e3 for values in (paired.first, paired.second))
    return f"{first:.1f} ms against {second:.1f} ms a round"
