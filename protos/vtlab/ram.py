"""Guest RAM as files of whole pages.

A machine has three files of the same size, addressed by guest-physical address: `ram.rw` (pages that VTL0 may write),
`ram.ro` (pages sealed against VTL0) and `private` (pages of VTL1). The nested table of a level chooses the file for
each page, so a level can touch only what it could open: the guest process opens `ram.rw` read-write and `ram.ro`
read-only, and never opens `private` (docs/architecture.md, "Memory").
"""

from __future__ import annotations

import mmap
import os
import shutil
import stat
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


# Beside them where both levels run guest code: its lock says which level runs (vtl0_guest.cpu.level_turns).
TURN_FILE = "turn"

# Below the VMM's state folder: a folder a machine, with its images and links to its memory files.
MACHINES = "machines"


class Store(Enum):
    """Folders below the VMM's state folder that hold the memory files of all machines, one a right of VTL0's process.

    File rights that are given before a machine is there (vtlab.confinement) can only be about a folder.
    """

    WRITABLE = "ram/vtl0-writes"
    SEALED = "ram/vtl0-reads"
    PRIVATE = "ram/vtl1"


_STORES = {
    RamFile.WRITABLE.value: Store.WRITABLE,
    TURN_FILE: Store.WRITABLE,
    RamFile.SEALED.value: Store.SEALED,
    RamFile.PRIVATE.value: Store.PRIVATE,
}


def store_folder(state: Path, store: Store) -> Path:
    return state / store.value


def create_stores(state: Path) -> None:
    """Makes what is missing of them and of MACHINES. Who may be among the others passes through, and finds no names."""
    for name in (MACHINES, str(Path(Store.WRITABLE.value).parent), *(store.value for store in Store)):
        folder = state / name
        folder.mkdir(exist_ok=True)
        folder.chmod(folder.stat().st_mode & stat.S_ISGID | 0o751)


def link_to_stores(directory: Path, state: Path, names: Iterable[str]) -> None:
    """Has the files of those names that are then made in a machine's folder lie in the stores of that state folder."""
    for name in names:
        store = _STORES[name]
        target = store_folder(state, store) / f"{directory.name}.{name}"
        target.unlink(missing_ok=True)
        (directory / name).symlink_to(os.path.relpath(target, directory))


def remove_machine(directory: Path) -> None:
    """Removes a machine's folder and its memory files, wherever they lie; what is gone already is no error."""
    for name in _STORES:
        path = directory / name
        if path.is_symlink():
            Path(os.path.realpath(path)).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def create_ram_files(directory: Path, size: int) -> None:
    """Creates the three files, zero-filled. Raises FileExistsError if the machine already has memory."""
    for file in RamFile:
        _create(directory / file.value, size, MODES[file])


def create_turn_file(directory: Path) -> None:
    """One zero page that both levels may write. Raises FileExistsError."""
    _create(directory / TURN_FILE, PAGE_SIZE, 0o666)


def _create(path: Path, size: int, mode: int) -> None:
    descriptor = os.open(os.path.realpath(path), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, mode)
        os.ftruncate(descriptor, size)
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
