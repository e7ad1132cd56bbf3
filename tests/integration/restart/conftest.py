"""A laboratory whose processes die where a test says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.restart import faults
from vmm import launcher
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab, launch
from vmm.supervisor import Budget


@pytest.fixture(scope="module")
def lab() -> Iterator[LocalLab]:
    """Three processes that die where a test says so, and are restarted as often as the tests need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "SERVERS", dict.fromkeys(launcher.SERVERS, faults.__name__))
        with launch(budget=Budget(deaths=1000)) as running:
            yield running


@pytest.fixture
def observer(lab: LocalLab) -> Iterator[Observer]:
    made = Observer(lab, 2)
    yield made
    made.close()
