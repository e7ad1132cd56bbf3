"""What must hold after a death."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
