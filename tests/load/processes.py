"""Memory of processes, as the kernel counts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Use(NamedTuple):
    """Attributes:
    anonymous: resident bytes that belong to the process alone, RAM files of the guest not counted.
    threads: how many.
    descriptors: open ones.
    """

    anonymous: int
    threads: int
    descriptors: int


def use(pid: int) -> Use:
    """Of one process now. Raises OSError if it is gone."""
    folder = Path("/proc") / str(pid)
    resident, shared = (int(word) for word in (folder / "statm").read_text().split()[1:3])
    return Use((resident - shared) * _PAGE, _entries(folder / "task"), _entries(folder / "fd"))


def _entries(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


def resident(pid: int) -> int:
    """Resident bytes, all that it maps included. Raises OSError if it is gone."""
    return int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) * _PAGE


def mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
