"""What an attacker finds who runs native code in the guest process: its descriptors, its mappings, its limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.launcher import LocalLab
from vtlab.client import Lab, Machine
from vtlab.ram import RamFile


def process(lab: Lab, role: str) -> Path:
    assert isinstance(lab, LocalLab)
    return Path("/proc") / str(lab.pids[role])


def opened(of: Path) -> list[str]:
    return [str(entry.readlink()) for entry in (of / "fd").iterdir()]


@pytest.mark.parametrize("role", ["vmm", "guest", "monitor"])
def test_no_crash_leaves_memory_in_a_file(lab: Lab, role: str) -> None:
    limits = (process(lab, role) / "limits").read_text().splitlines()
    core = next(line.split() for line in limits if line.startswith("Max core file size"))
    assert core[4:6] == ["0", "0"]


def test_nothing_of_vtl1_is_open_or_mapped_in_the_guest_process(lab: Lab, machine: Machine) -> None:
    machine.start()
    machine.registers()
    guest, monitor = process(lab, "guest"), process(lab, "monitor")
    if not os.access(monitor / "map_files", os.R_OK):
        pytest.skip("only root sees what a process holds that cannot be dumped; tests from inside look too")
    private = f".{RamFile.PRIVATE.value}"
    assert any(private in line for line in (monitor / "maps").read_text().splitlines()), "the monitor maps it"
    mapped = (guest / "maps").read_text().splitlines()
    assert [line for line in mapped if line.endswith(private)] == []
    assert [line for line in mapped if line.endswith(f".{RamFile.SEALED.value}") and "w" in line.split()[1]] == []
    assert any(line.endswith(f".{RamFile.SEALED.value}") for line in mapped)
    wanted = [name for name in opened(guest) if name.endswith((private, ".key", "journal", "sealed", "monitor.log"))]
    assert wanted == []
