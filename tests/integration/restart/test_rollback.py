"""Somebody puts back what the VMM or the monitor kept earlier, while they are away: refused, and nothing opens."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.restart.checks import TIMEOUT, goes_on, stopped
from tests.waiting import wait_until
from vmm.chaos import guest
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab
from vtlab.errors import VtlabError
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2

FAILED = vmm_pb2.MACHINE_STATE_FAILED


def journal_of(lab: LocalLab) -> Path:
    return lab.directory / "vmm" / "journal.sqlite"


def journal_now(lab: LocalLab) -> bytes:
    """The journal of a VMM that runs, as one file."""
    with closing(sqlite3.connect(journal_of(lab))) as live, closing(sqlite3.connect(":memory:")) as copy:
        live.backup(copy)
        return copy.serialize()


def put_back(lab: LocalLab, journal: bytes) -> None:
    for path in journal_of(lab).parent.glob("journal.sqlite*"):
        path.unlink()
    journal_of(lab).write_bytes(journal)


def sealed_bytes(lab: LocalLab, observer: Observer, gpa: int) -> bytes:
    """A page of ram.ro, as VTL1 and whoever maps it see it."""
    with (lab.directory / "vmm" / "machines" / observer.machine.name / "ram.ro").open("rb") as file:
        file.seek(gpa)
        return file.read(guest.PAGE)


@pytest.mark.parametrize("roles", [[Role.VMM], [Role.VMM, Role.MONITOR]], ids=["vmm", "vmm and monitor"])
def test_an_old_journal_is_refused(lab: LocalLab, roles: list[Role]) -> None:
    """In it the machine is not guarded yet: with its word for it every page is writable and no write is judged."""
    kept: list[bytes] = []
    observer = Observer(lab, 2, on_ready=lambda: kept.append(journal_now(lab)))
    try:
        goes_on(observer)
        with stopped(lab, *roles):
            put_back(lab, kept[0])
        machine = observer.machine.info()
        assert machine.state == FAILED
        assert "the journal: is an old one: it ends with transaction" in machine.reason
        assert sealed_bytes(lab, observer, guest.SEALED) == guest.SEALED_PATTERN
    finally:
        observer.close()


def test_an_old_journal_of_a_guarded_machine_is_refused(lab: LocalLab, observer: Observer) -> None:
    goes_on(observer)
    journal = journal_now(lab)
    goes_on(observer)
    observer.machine.pause()
    with stopped(lab, Role.VMM):
        put_back(lab, journal)
    machine = observer.machine.info()
    assert (machine.state, machine.vtl1_enabled) == (FAILED, True)
    assert "the journal: is an old one" in machine.reason
    with pytest.raises(VtlabError):
        observer.machine.write_memory(guest.SEALED, b"open")
    assert sealed_bytes(lab, observer, guest.SEALED) == guest.SEALED_PATTERN


def test_after_a_full_stop_an_old_journal_only_begins_anew(lab: LocalLab, observer: Observer) -> None:
    """VTL0's CPU is gone, and so is all that was protected: RAM is zeroed before anything runs."""
    goes_on(observer)
    journal = journal_now(lab)
    goes_on(observer)
    with stopped(lab, Role.VMM, Role.MONITOR, Role.GUEST):
        put_back(lab, journal)
    machine = observer.machine.info()
    assert machine.state == FAILED or machine.generation == 2, machine
    assert "old one" in machine.reason or "crashed" in machine.reason
    if machine.state != FAILED:
        goes_on(observer, resets=1)


@pytest.mark.parametrize(
    "roles", [[Role.MONITOR], [Role.VMM, Role.MONITOR], [Role.VMM, Role.MONITOR, Role.GUEST]], ids=len
)
def test_an_old_sealed_store_is_refused(lab: LocalLab, roles: list[Role]) -> None:
    """In it VTL1 has no policy yet. The machine begins anew, in zeroed RAM, and says why; not even that is believed
    which the operator set."""
    store, log = lab.directory / "monitor" / "sealed", lab.directory / "monitor.log"
    kept: list[bytes] = []
    observer = Observer(lab, 2, on_ready=lambda: kept.append(store.read_bytes()))
    try:
        goes_on(observer)
        refusals = log.read_text().count("the sealed store is an old one")
        with stopped(lab, *roles):
            store.write_bytes(kept[0])
        wait_until(lambda: "the sealed store is an old one" in observer.machine.info().reason, TIMEOUT)
        assert log.read_text().count("the sealed store is an old one") == refusals + 1
        machine = observer.machine.info()
        assert (machine.generation, machine.vtl1_enabled) == (2, False)
    finally:
        observer.close()
