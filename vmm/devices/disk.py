"""A disk: pages that outlive RESET and power-off, and a controller that moves them by DMA with VTL0's rights.

    0x9200  capacity, in pages of 4 KiB (read only)
    0x9204  first page on the disk
    0x9208  number of pages, at most 256
    0x920C  number of the first guest page
    0x9210  write: 1 reads from the disk, 2 writes to it, at once; read: 0 if the last transfer was done, 1 if not

All registers have four bytes. No other machine has this controller: it is what a kernel needs to keep its memory while
the machine is off, and no more. Whoever holds the disk can change it meanwhile (VmmService.WriteDisk): nothing on it is
believed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from vmm.memory import WRITE, Memory
from vtlab.errors import BadArgument, VtlabError
from vtlab.ram import PAGE_SIZE
from vtlab.v1.vcpu_pb2 import Update
from vtlab.v1.vmm_pb2 import DeviceEvent

NAME = "disk"
MAX_SIZE = 1 << 30
BASE = 0x9200
CAPACITY, FIRST, COUNT, PAGE, COMMAND = range(BASE, BASE + 20, 4)
READ_PAGES, WRITE_PAGES = 1, 2
MAX_PAGES = 256
_STATE = struct.Struct("<IIII")


class Disk:
    """The content, in a file of the machine's folder that only the VMM may open."""

    def __init__(self, path: Path, size: int) -> None:
        """Makes it if it is not there. Raises OSError."""
        self.size = size
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Raises BadArgument beyond its end."""
        self._check(offset, size)
        return os.pread(self._descriptor, size, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Raises BadArgument beyond its end."""
        self._check(offset, len(data))
        os.pwrite(self._descriptor, data, offset)

    def _check(self, offset: int, size: int) -> None:
        if offset + size > self.size:
            raise BadArgument("offset", f"{size} bytes at {offset:#x} are not on a disk of {self.size:#x}")


class DiskController:
    """One device of one machine."""

    ports = range(BASE, COMMAND + 4)

    def __init__(self, disk: Disk, memory: Memory, log: Callable[[DeviceEvent], None], vtl: int = 0) -> None:
        """:param vtl: level whose rights its DMA has."""
        self._disk = disk
        self._memory = memory
        self._log = log
        self._vtl = vtl
        self._registers = dict.fromkeys((FIRST, COUNT, PAGE), 0)
        self._failed = 0

    def read(self, port: int, _size: int) -> int:
        if port == CAPACITY:
            return self._disk.size // PAGE_SIZE
        return self._failed if port == COMMAND else self._registers.get(port, 0)

    def write(self, port: int, _size: int, value: int) -> tuple[Update, ...]:
        if port in self._registers:
            self._registers[port] = value
        elif port == COMMAND:
            self._failed = int(not self._transfer(value))
        return ()

    def save(self) -> bytes:
        return _STATE.pack(*self._registers.values(), self._failed)

    def restore(self, state: bytes) -> None:
        if len(state) != _STATE.size:
            raise ValueError(f"{len(state)} bytes")
        *values, self._failed = _STATE.unpack(state)
        self._registers = dict(zip(self._registers, values, strict=True))

    def _transfer(self, command: int) -> bool:
        first, count, page = (self._registers[port] * PAGE_SIZE for port in (FIRST, COUNT, PAGE))
        if command not in (READ_PAGES, WRITE_PAGES) or not 0 < count <= MAX_PAGES * PAGE_SIZE:
            return False
        what = "read" if command == READ_PAGES else "write"
        try:
            if command == READ_PAGES:
                self._memory.check(page, count, WRITE, self._vtl)
                self._memory.write(page, self._disk.read(first, count), self._vtl)
            else:
                self._disk.write(first, self._memory.read(page, count, self._vtl))
        except VtlabError as error:
            self._log(DeviceEvent(device=NAME, what=f"{what}: {error.detail}", gpa=page, size=count, refused=True))
            return False
        self._log(DeviceEvent(device=NAME, what=what, gpa=page, size=count))
        return True
