"""Processes that wait to be told who they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.integration.client.test_launcher import TOYS, gone
from tests.waiting import wait_until
from vmm import launcher
from vmm.launcher import launch
from vmm.spare import Blank, Spares
from vtlab.trust.roles import Role

PATIENCE = 60.0


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SERVERS", TOYS)


@pytest.fixture
def spares(monkeypatch: pytest.MonkeyPatch) -> list[Spares]:
    """Of the laboratories that the test starts, which have them at once."""
    made: list[Spares] = []

    class Known(Spares):
        def __init__(self, modules: Callable[[], Sequence[str]]) -> None:
            super().__init__(modules)
            made.append(self)

    monkeypatch.setattr(launcher, "AFTER_START", 0)
    monkeypatch.setattr(launcher, "Spares", Known)
    return made


def pid_of(spares: list[Spares]) -> int:
    spare = wait_until(lambda: spares[-1]._spare, PATIENCE, "a spare")
    assert isinstance(spare, Blank)
    return int(spare._process.pid)


def test_who_dies_is_replaced_by_the_process_that_waits(toys: None, tmp_path: Path, spares: list[Spares]) -> None:
    with launch(directory=tmp_path) as lab:
        for count, role in enumerate((Role.GUEST, Role.VMM, Role.MONITOR, Role.GUEST), 1):
            spare = pid_of(spares)
            os.kill(lab.pids[role], signal.SIGKILL)
            assert lab.supervisor.wait_restarted(role, 1 + (count == 4), PATIENCE)
            assert lab.pids[role] == spare
        assert lab.machines() == []
        assert lab.policy.get("any").rules == []
        pids = [*lab.pids.values(), pid_of(spares)]
    gone(pids, lab.directory)


def test_a_spare_that_is_gone_costs_nothing_but_time(toys: None, tmp_path: Path, spares: list[Spares]) -> None:
    with launch(directory=tmp_path) as lab:
        spare = pid_of(spares)
        os.kill(spare, signal.SIGKILL)
        os.kill(lab.pids["vmm"], signal.SIGKILL)
        assert lab.supervisor.wait_restarted(Role.VMM, 1, PATIENCE)
        assert lab.pids["vmm"] != spare
        assert lab.machines() == []


def test_it_holds_nothing_of_anybody(toys: None, tmp_path: Path, spares: list[Spares]) -> None:
    """But its standard streams and pipes; no socket, no file, no key."""
    with launch(directory=tmp_path) as lab:
        spare = pid_of(spares)
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
    spares = Spares(list)
    spares.prepare(3600)
    spares.close()
    spares.prepare(0)
    spares._make()
    assert spares._spare is None
