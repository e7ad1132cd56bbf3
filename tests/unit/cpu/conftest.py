"""The machine that the core's tests run on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cpu.machine import RAM_SIZE, Guest
from vtlab.ram import Ram, create_ram_files


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Ram]:
    create_ram_files(tmp_path, RAM_SIZE)
    with Ram(tmp_path, RAM_SIZE, "vtl0") as opened:
        yield opened


@pytest.fixture
def guest(ram: Ram, tmp_path: Path) -> Iterator[Guest]:
    machine = Guest(ram, tmp_path)
    yield machine
    machine.close()
