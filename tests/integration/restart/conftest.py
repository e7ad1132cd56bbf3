"""A laboratory whose processes die where a test says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.restart import faults
from vmm import launcher
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab, launch
from vmm.supervisor import Budget


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "armed"


@pytest.fixture(scope="module")
def lab(fault_file: Path) -> Iterator[LocalLab]:
    """Three processes that die where a test says so, and are restarted as often as the tests need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, str(fault_file))
        patch.setattr(launcher, "SERVERS", dict.fromkeys(launcher.SERVERS, faults.__name__))
        with launch(budget=Budget(deaths=1000)) as running:
            yield running


@pytest.fixture
def observer(lab: LocalLab) -> Iterator[Observer]:
    made = Observer(lab, 2)
    yield made
    made.close()
