"""Two laboratories with an attacker's code in the guest process: one is confined as ever, one is not at all.

The second shows that a step would get through: a test that nothing can fail proves nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.escape import attacker
from vmm import launcher
from vmm.launcher import LocalLab, launch
from vtlab.confinement import bpf, landlock
from vtlab.confinement.confine import LANDLOCK_WANTED, VARIABLE
from vtlab.trust.roles import Role

# In the environment of the laboratory's user.
TOKEN = ("a-password-of-the-", "operators-own-shell")


class Escaped:
    """A laboratory whose guest process does what it is told."""

    def __init__(self, lab: LocalLab) -> None:
        self.lab = lab

    def __call__(self, step: str, *arguments: Any) -> Any:
        """Raises the OSError that the step met."""
        return attacker.ask(self.lab.directory / "guest", self.lab.pids["guest"], step, arguments)


def _laboratory(confinement: str) -> Iterator[Escaped]:
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # while it starts: other laboratories of this worker are as ever
            patch.setattr(launcher, "SERVERS", launcher.SERVERS | {Role.GUEST: attacker.__name__})
            patch.setenv(VARIABLE, confinement)
            patch.setenv("ESCAPE_TEST_TOKEN", "".join(TOKEN))
            running = stack.enter_context(launch())
        yield Escaped(running)


@pytest.fixture(scope="session")
def confined() -> Iterator[Escaped]:
    if landlock.abi() < LANDLOCK_WANTED or not bpf.available():
        pytest.skip(f"this kernel has Landlock {landlock.abi()} and {'a' if bpf.available() else 'no'} seccomp filter")
    yield from _laboratory("required")


@pytest.fixture(scope="session")
def unguarded() -> Iterator[Escaped]:
    yield from _laboratory("off")
