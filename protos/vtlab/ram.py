"""Guest RAM as files of whole pages.

A machine has three files of the same size, addressed by guest-physical address: `ram.rw` (pages that VTL0 may write),
`ram.ro` (pages sealed against VTL0) and `private` (pages of VTL1). The nested table of a level chooses the file for
each page, so a level can touch only what it could open: the guest process opens `ram.rw` read-write and `ram.ro`
read-only, and never opens `private` (docs/architecture.md, "Memory").
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from types import TracebackType

PAGE_SIZE = 4096


class RamFile(Enum):
    """The files of a machine; the value is the file's name in its memory directory."""

    WRITABLE = "ram.rw"
    SEALED = "ram.ro"
    PRIVATE = "private"


# What each party opens: file -> may it write. A file that is not listed is not opened.
RIGHTS: dict[str, dict[RamFile, bool]] = {
    "vmm": {RamFile.WRITABLE: True, RamFile.SEALED: True, RamFile.PRIVATE: True},
    "vtl0": {RamFile.WRITABLE: True, RamFile.SEALED: False},
    "vtl1": {RamFile.WRITABLE: True, RamFile.SEALED: True, RamFile.PRIVATE: True},
}


# Where each role has a uid of its own, the VMM owns the files, the monitor is their group and the guest is among the
# others. The folder above keeps everybody else away: the launcher's is 0700, the one of deploy/compose.yaml is mounted
# nowhere else.
MODES = {RamFile.WRITABLE: 0o666, RamFile.SEALED: 0o664, RamFile.PRIVATE: 0o660}


def create_ram_files(directory: Path, size: int) -> None:
    """Creates the three files, zero-filled. Raises FileExistsError if the machine already has memory."""
    for file in RamFile:
        descriptor = os.open(directory / file.value, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, MODES[file])
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


# Beside them where both levels run guest code: its lock says which level runs (vtl0_guest.cpu.level_turns).
TURN_FILE = "turn"


def create_turn_file(directory: Path) -> None:
    """One zero page that both levels may write. Raises FileExistsError."""
    descriptor = os.open(directory / TURN_FILE, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o666)
        os.ftruncate(descriptor, PAGE_SIZE)
    finally:
        os.close(descriptor)


def zero_ram_files(directory: Path, size: int, files: Iterable[RamFile] = RamFile) -> None:
    """Makes every byte of the files zero, in place: mappings stay valid and see zeros."""
    for file in files:
        descriptor = os.open(directory / file.value, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != size:
                raise ValueError(f"{directory / file.value}: has {os.fstat(descriptor).st_size} bytes, not {size}")
            with mmap.mmap(descriptor, size) as view:
                view.madvise(mmap.MADV_REMOVE)
        finally:
            os.close(descriptor)


class Ram:
    """The files of one machine, mapped with one party's rights.

    Attributes:
        size: bytes of guest RAM.
        views: file -> its mapping; absent files were not opened at all.
    """

    def __init__(self, directory: Path, size: int, party: str) -> None:
        """Maps the files. Raises OSError if one is missing, ValueError if one has another size."""
        self.size = size
        self.views: dict[RamFile, mmap.mmap] = {}
        for file, writable in RIGHTS[party].items():
            descriptor = os.open(directory / file.value, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            try:
                actual = os.fstat(descriptor).st_size
                if actual != size:
                    raise ValueError(f"{directory / file.value}: has {actual} bytes, not {size}")
                protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
                self.views[file] = mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        for view in self.views.values():
            view.close()
        self.views.clear()

    def __enter__(self) -> Ram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
