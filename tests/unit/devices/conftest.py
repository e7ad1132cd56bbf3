"""The machine of the device tests."""

from __future__ import annotations

import pytest

from tests.unit.devices.bench_machine import Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()
