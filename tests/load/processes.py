"""Memory of processes, as the kernel counts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Use(NamedTuple):
    """Attributes:
    anonymous: resident bytes that belong to the process alone, RAM files of the guest and `translated` not counted.
    translated: resident bytes that it may both write and execute: what engines made of the guest's code. They grow up
        to a bound (vtl0_guest.cpu.engine.TRANSLATED_CODE).
    threads: how many.
    descriptors: open ones.
    """

    anonymous: int
    translated: int
    threads: int
    descriptors: int


def use(pid: int) -> Use:
    """Of one process now. Raises OSError if it is gone."""
    folder = Path("/proc") / str(pid)
    code = translated(pid)
    return Use(private(pid) - code, code, _entries(folder / "task"), _entries(folder / "fd"))


def translated(pid: int) -> int:
    """See Use.translated; 0 for who may not look at the process, which takes root where it is confined."""
    try:
        lines = (Path("/proc") / str(pid) / "smaps").read_text().splitlines()
    except PermissionError:
        return 0
    total, counts = 0, False
    for line in lines:
        name, *words = line.split()
        if not name.endswith(":"):  # begins a mapping: its addresses, then its rights
            counts = words[0].startswith("rwx")
        elif counts and name == "Anonymous:":
            total += int(words[0]) * 1024
    return total


def _entries(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


def private(pid: int) -> int:
    """Resident bytes that belong to the process alone. Raises OSError if it is gone."""
    resident, shared = (int(word) for word in (Path("/proc") / str(pid) / "statm").read_text().split()[1:3])
    return (resident - shared) * _PAGE


def resident(pid: int) -> int:
    """Resident bytes, all that it maps included. Raises OSError if it is gone."""
    return int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) * _PAGE


def mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
