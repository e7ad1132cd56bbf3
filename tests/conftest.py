"""Fixtures are dimensions: one choice each, with a default that a test overrides by parametrising it.

`lab` lives as long as the test session of a worker (three real processes); `machine` lives for one test. Nothing is
done at import, so collecting the unit tests costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from vtlab.client import Lab, Machine

# How long an example takes says more of the machine than of the code: no example has a deadline.
settings.register_profile("vtlab", deadline=None)
settings.load_profile("vtlab")


@pytest.fixture(scope="session")
def worker(worker_id: str) -> str:
    """Part of every name that two workers could share ("master" without xdist)."""
    return worker_id


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The three processes, for all tests of this worker."""
    from vmm.launcher import launch

    with launch() as running:
        yield running


@pytest.fixture
def image() -> Path:
    """The guest to boot."""
    from vtl0_guest.kernels import selfguard_image

    return selfguard_image()


@pytest.fixture
def protection() -> bool:
    """Whether the guest deprivileges itself and VTL1 is on offer."""
    return True


@pytest.fixture
def ram() -> int:
    """Bytes of guest RAM."""
    return 64 << 20


@pytest.fixture
def machine(lab: Lab, image: Path, protection: bool, ram: int) -> Iterator[Machine]:
    """A created machine, not yet started; destroyed after the test."""
    with lab.create(image, ram=ram, command_line=f"heki={int(protection)}", vtl1=protection) as created:
        yield created
