"""What must hold after a death."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.integration.restart import faults
from tests.waiting import wait_until
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab
from vtlab.trust.roles import Role

TIMEOUT = 60.0


def goes_on(observer: Observer, resets: int = 0) -> None:
    observer.wait_progress(2)
    observer.check()
    assert observer.findings.problems == []
    assert len(observer.findings.resets) == resets, observer.findings.resets


def dies(lab: LocalLab, role: Role, before: int) -> None:
    assert lab.supervisor.wait_restarted(role, before + 1, TIMEOUT), "it lives"
    assert lab.supervisor.failure is None


@contextmanager
def restarted(lab: LocalLab, *roles: Role) -> Iterator[None]:
    """Those roles die within the block, and are back at its end."""
    before = {role: lab.supervisor.restarts(role) for role in roles}
    yield
    for role, count in before.items():
        dies(lab, role, count)


@contextmanager
def stopped(lab: LocalLab, *roles: Role) -> Iterator[None]:
    """Within the block none of those roles runs, and what they keep can be changed; at its end they are back."""
    held = [lab.directory / role / faults.HELD for role in roles]
    pids = {role: lab.pids[role] for role in roles}
    for path in held:
        path.touch()
    try:
        with restarted(lab, *roles):
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: all(lab.pids[role] != pid for role, pid in pids.items()), TIMEOUT)
            yield
            for path in held:
                path.unlink()
    finally:
        for path in held:
            path.unlink(missing_ok=True)
