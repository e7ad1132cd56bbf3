"""Processes that wait to be told who they are."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.integration.client.test_launcher import TOYS, gone
from tests.waiting import wait_until
from vmm import launcher
from vmm.launcher import LocalLab, launch
from vmm.spare import Blank, Spares
from vtlab.trust.roles import Role

PATIENCE = 60.0


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SERVERS", TOYS)


def children() -> set[int]:
    """Processes of this one that wait for orders, or serve."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def spare_of(lab: LocalLab, before: set[int]) -> int:
    (pid,) = wait_until(lambda: children() - before - set(lab.pids.values()), PATIENCE, "a spare")
    return pid


def test_who_dies_is_replaced_by_the_process_that_waits(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "AFTER_START", 0)
    before = children()
    with launch(directory=tmp_path) as lab:
        for count, role in enumerate((Role.GUEST, Role.VMM, Role.MONITOR, Role.GUEST), 1):
            spare = spare_of(lab, before)
            os.kill(lab.pids[role], signal.SIGKILL)
            assert lab.supervisor.wait_restarted(role, 1 + (count == 4), PATIENCE)
            assert lab.pids[role] == spare
        assert lab.machines() == []
        assert lab.policy.get("any").rules == []
        pids = [*lab.pids.values(), spare_of(lab, before)]
    gone(pids, lab.directory)


def test_a_spare_that_is_gone_costs_nothing_but_time(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "AFTER_START", 0)
    before = children()
    with launch(directory=tmp_path) as lab:
        spare = spare_of(lab, before)
        os.kill(spare, signal.SIGKILL)
        os.kill(lab.pids["vmm"], signal.SIGKILL)
        assert lab.supervisor.wait_restarted(Role.VMM, 1, PATIENCE)
        assert lab.pids["vmm"] != spare
        assert lab.machines() == []


def test_it_holds_nothing_of_anybody(toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But its standard streams and pipes; no socket, no file, no key."""
    monkeypatch.setattr(launcher, "AFTER_START", 0)
    before = children()
    with launch(directory=tmp_path) as lab:
        spare = spare_of(lab, before)
        folder = Path(f"/proc/{spare}/fd")

        def held() -> list[str]:
            named = {int(entry.name): str(entry.readlink()) for entry in folder.iterdir()}
            return [what for number, what in named.items() if number > 2 and not what.startswith("pipe:")]

        wait_until(lambda: not held(), PATIENCE, "only pipes")  # files of modules are open while they are read
        maps = Path(f"/proc/{spare}/maps").read_text()
        assert str(lab.directory) not in maps
        assert str(tmp_path) not in Path(f"/proc/{spare}/environ").read_text()


def test_a_process_without_orders_ends_with_its_parent_s_end_of_the_pipe() -> None:
    blank = Blank(["tests.integration.client.toy", "a module that does not exist"])
    blank._orders.close()
    wait_until(lambda: not blank._process.is_alive(), PATIENCE, "its end")
    assert blank._process.exitcode == 0
    blank.end()


def test_nothing_is_made_once_the_laboratory_ends() -> None:
    before = children()
    spares = Spares(list)
    spares.prepare(3600)
    spares.close()
    spares.prepare(0)
    assert children() == before
