"""Cells on real laboratories: in parallel, on a cluster, through hangs, deaths and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from tests.waiting import wait_until
from vmm.launcher import LocalLab, launch
from vmm.supervisor import Budget
from vtlab.client import Lab
from vtlab.errors import TimedOut
from vtlab.trust.roles import Role
from vtlab_matrix.cells import Cell, Verdict
from vtlab_matrix.laboratory import Laboratory, Task
from vtlab_matrix.outcome import Outcome
from vtlab_matrix.run import run_cell
from vtlab_matrix.workers import Workers

SMALL = ("--designs", "none,vtl", "--attacks", "cr4-s*", "--after", "boot,reset-cf9", "--transitions", "boot,reset-cf9")
SMALL_CELLS = 2 * (2 + 2 * 2)
TASKS = [
    Task(Cell(design=design, kind="attack", name=name)) for design in ("none", "vtl") for name in ("cr4-smep", "cr0-wp")
]
EXPECTED = {"none": Verdict.SUCCEEDED, "vtl": Verdict.BLOCKED}


def verdicts(outcomes: list[Outcome]) -> dict[Cell, Verdict]:
    return {one.cell: one.verdict for one in outcomes}


def test_a_cell(lab: Lab) -> None:
    cell = Cell(design="vtl", kind="attack", name="cr4-smep", after="reset-cf9")
    outcome, fit = run_cell(lab, cell)
    assert fit
    assert outcome.verdict is Verdict.BLOCKED, outcome
    assert outcome.evidence.what == "CR4.SMEP"
    assert outcome.transition is not None
    assert outcome.transition.kept
    assert any(rule.startswith("cr4: ") for rule in outcome.rules)
    parts = [line.text for line in outcome.timeline if line.kind == "mark"]
    assert parts == ["transition reset-cf9", "attack cr4-smep"]
    assert any(line.kind == "verdict" and line.text.startswith("deny (cr4") for line in outcome.timeline)
    assert outcome.log.count("selfguard: ready") == 2


@pytest.mark.parametrize("name", ["boot", "reset-cf9"])
@pytest.mark.parametrize("design", ["none", "vtl"])
def test_a_transition(lab: Lab, design: str, name: str) -> None:
    outcome, _ = run_cell(lab, Cell(design=design, kind="transition", name=name))
    assert outcome.verdict is Verdict.KEPT, outcome
    assert outcome.kept > 10


def test_a_guest_that_does_not_start_is_a_verdict(lab: Lab) -> None:
    policy = "version: 1\nname: broken\nregisters:\n  cr4: {must_be_1: [LA57]}\n"
    outcome, _ = run_cell(lab, Cell(design="vtl", kind="transition", name="boot"), policy=policy)
    assert outcome.verdict is Verdict.GUEST_BROKEN
    assert outcome.evidence.error or outcome.broken
    assert "selfguard" in outcome.log


def test_in_parallel() -> None:
    with Workers(2, launch) as workers:
        found = verdicts(list(workers.run(TASKS)))
        again = verdicts(list(workers.run(TASKS)))
    assert found == again == {task.cell: EXPECTED[task.cell.design] for task in TASKS}


@contextmanager
def mute_launch() -> Iterator[Lab]:
    """A laboratory that starts and then never answers."""
    time.sleep(600)
    with launch() as lab:
        yield lab


@contextmanager
def deadly_launch() -> Iterator[Lab]:
    """A laboratory that takes its worker with it."""
    if os.getpid():
        os._exit(9)
    yield cast(Lab, None)


@contextmanager
def slow_launch() -> Iterator[Lab]:
    if os.getpid():
        raise TimedOut("guest", "did not start", seconds=1)
    yield cast(Lab, None)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (mute_launch, "no answer within 1 s"),
        (deadly_launch, "its worker ended with code 9"),
        (slow_launch, "guest: did not start"),
    ],
)
def test_a_laboratory_that_breaks_costs_its_cells_alone(how: Any, told: str) -> None:
    with Workers(2, how, limit=1.0 if how is mute_launch else 120.0) as workers:
        outcomes = list(workers.run(TASKS))
    assert {one.cell for one in outcomes} == {task.cell for task in TASKS}
    for outcome in outcomes:
        assert outcome.verdict is Verdict.UNCLEAR
        assert told in outcome.evidence.error


def test_a_broken_laboratory_is_replaced() -> None:
    with Laboratory(partial(launch, budget=Budget(deaths=1)), 0) as laboratory:
        assert laboratory.run(TASKS[-1]).verdict is Verdict.BLOCKED
        assert isinstance(laboratory.lab, LocalLab)
        guest = laboratory.lab.supervisor.processes[Role.GUEST].process
        guest.kill()
        guest.join()
        again = laboratory.run(TASKS[-1])
        assert again.verdict is Verdict.BLOCKED
        assert again.earlier
        assert not laboratory.run(TASKS[-1]).earlier


# -------------------------------------------------------------------------------------------------------- the command


def command(folder: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "vmm.cli.main", "matrix", *SMALL]
    return [*start, "--journal", str(folder / "journal"), "--jobs", "1", *more]


def descendants(pid: int) -> set[int]:
    """Processes that it started, and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def laboratories(pids: set[int]) -> set[Path]:
    """Folders of the laboratories that these processes serve: their logs lie there."""
    logs = [Path(f"/proc/{pid}/fd/1").readlink() for pid in pids if Path(f"/proc/{pid}/fd/1").exists()]
    return {log.parent for log in logs if log.suffix == ".log"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command(tmp_path: Path) -> None:
    page, xml = tmp_path / "page.html", tmp_path / "junit.xml"
    more = ("--json", "--html", str(page), "--junit", str(xml))
    done = subprocess.run(command(tmp_path, *more), capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    report = json.loads(done.stdout)
    assert report["passed"]
    assert len(report["cells"]) == SMALL_CELLS
    red = [cell for cell in report["cells"] if cell["verdict"] == "SUCCEEDED"]
    assert {cell["design"] for cell in red} == {"none"}
    assert all(cell["explanation"]["source"] for cell in red)
    assert page.stat().st_size > 20_000
    assert b"<testsuites" in xml.read_bytes()
    assert not (tmp_path / "journal").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_running_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    journal = tmp_path / "journal"
    running = subprocess.Popen(command(tmp_path, "--json"), stdout=subprocess.PIPE)
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 2, 60)
    pids = descendants(running.pid)
    folders = laboratories(pids)
    assert len(pids) >= 4
    assert folders
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode != 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
    wait_until(lambda: not any(folder.exists() for folder in folders), 60)
    before = journal.read_bytes().count(b"\n") - 1
    assert 0 < before < SMALL_CELLS
    done = subprocess.run(command(tmp_path, "--json"), capture_output=True, check=False, timeout=300)
    assert done.returncode == 0
    assert f"{before} cells are done" in done.stderr.decode()
    assert len(json.loads(done.stdout)["cells"]) == SMALL_CELLS


def test_a_misprint_costs_no_start() -> None:
    wrong = [sys.executable, "-m", "vmm.cli.main", "matrix", "--attacks", "cr5*"]
    done = subprocess.run(wrong, capture_output=True, check=False, timeout=60)
    assert done.returncode == 4
    assert b"--attacks cr5*: matches none of" in done.stderr


# -------------------------------------------------------------------------------------------------------- a cluster


@pytest.mark.timeout(180)
def test_on_a_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip(
        "distributed", reason="dask.distributed is not installed: pip install 'vtlab[dask]'"
    )
    from vtlab_matrix.cluster import Cluster

    local = distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None, host="127.0.0.1", local_directory=str(tmp_path)
    )
    with local, Cluster(local.scheduler_address, launch) as cluster:
        found = verdicts(list(cluster.run(TASKS)))
    assert found == {task.cell: EXPECTED[task.cell.design] for task in TASKS}
