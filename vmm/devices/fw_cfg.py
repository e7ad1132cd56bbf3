"""QEMU's firmware configuration device, with DMA (QEMU: docs/specs/fw_cfg.rst, hw/nvram/fw_cfg.c, standard-headers).

Selector at 0x510 (16 bit), data at 0x511 (8 bit), DMA address at 0x514 (two big-endian 32-bit halves, the low one
starts the transfer). A guest that programs it makes a device of the host write its memory: exactly what must not bypass
VTL1, so every transfer goes through Memory with VTL0's rights. A refused one sets the error bit and changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag

from vmm.memory import WRITE, Memory
from vtlab.errors import VtlabError
from vtlab.v1.vcpu_pb2 import Update
from vtlab.v1.vmm_pb2 import DeviceEvent

SELECTOR_PORT = 0x510
DATA_PORT = 0x511
DMA_PORTS = range(0x514, 0x51C)
DMA_SIGNATURE = b"QEMU CFG"

# A file that the guest may read and write: bytes of its own choice, for a device to put anywhere.
SCRATCH_NAME = "opt/vtlab/scratch"
SCRATCH_SIZE = 4096


class Key(IntEnum):
    """Selector values."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_SIZE = 0x03
    NB_CPUS = 0x05
    MAX_CPUS = 0x0F
    FILE_DIRECTORY = 0x19
    FIRST_FILE = 0x20


class Control(IntFlag):
    """Low half of the control word of a DMA request; SELECT takes the key from the high half."""

    ERROR = 1 << 0
    READ = 1 << 1
    SKIP = 1 << 2
    SELECT = 1 << 3
    WRITE = 1 << 4


_REQUEST = struct.Struct(">IIQ")  # control, length in bytes, guest-physical address
_ADDRESS_SIZE = 8
_STATE = struct.Struct(f"<QQ{_ADDRESS_SIZE}s")  # selector, offset, DMA address as far as it is written
# Bytes that one transfer may touch.
MAX_TRANSFER = 1 << 20


class FwCfg:
    """One device of one machine."""

    ports = (SELECTOR_PORT, DATA_PORT, *DMA_PORTS)

    def __init__(
        self,
        memory: Memory,
        vp_count: int,
        log: Callable[[DeviceEvent], None],
        files: dict[str, bytes] | None = None,
        vtl: int = 0,
    ) -> None:
        """A device without a guest's code behind it.

        Args:
            files: further read-only files, by name of at most 55 bytes.
            vtl: level whose rights its DMA has.
        """
        self._memory = memory
        self._vtl = vtl
        self._log = log
        names = {SCRATCH_NAME: bytes(SCRATCH_SIZE), **(files or {})}
        keys = {name: Key.FIRST_FILE + number for number, name in enumerate(sorted(names))}
        directory = struct.pack(">I", len(names)) + b"".join(
            struct.pack(">IHH56s", len(names[name]), key, 0, name.encode()) for name, key in keys.items()
        )
        self._items: dict[int, bytearray] = {
            Key.SIGNATURE: bytearray(b"QEMU"),
            Key.ID: bytearray(struct.pack("<I", 0b11)),  # the traditional interface and DMA
            Key.RAM_SIZE: bytearray(struct.pack("<Q", memory.size)),
            Key.NB_CPUS: bytearray(struct.pack("<H", vp_count)),
            Key.MAX_CPUS: bytearray(struct.pack("<H", vp_count)),
            Key.FILE_DIRECTORY: bytearray(directory),
            **{key: bytearray(names[name]) for name, key in keys.items()},
        }
        self._writable = {keys[SCRATCH_NAME]}
        self._selected = 0
        self._offset = 0
        self._address = bytearray(_ADDRESS_SIZE)

    def read(self, port: int, size: int) -> int:
        if port == DATA_PORT:
            return int.from_bytes(self._take(size), "little")
        if port in DMA_PORTS:
            start = port - DMA_PORTS.start
            return int.from_bytes(DMA_SIGNATURE[start : start + size].ljust(size, b"\0"), "little")
        return 0

    def write(self, port: int, size: int, value: int) -> tuple[Update, ...]:
        if port == SELECTOR_PORT:
            self._select(value & 0xFFFF)
        elif port in DMA_PORTS:
            start = port - DMA_PORTS.start
            raw = value.to_bytes(size, "little")[: len(self._address) - start]
            self._address[start : start + len(raw)] = raw
            if start + len(raw) == len(self._address):
                self._transfer(int.from_bytes(self._address, "big"))
                self._address = bytearray(_ADDRESS_SIZE)
        return ()

    def save(self) -> bytes:
        written = b"".join(bytes(self._items[key]) for key in sorted(self._writable))
        return _STATE.pack(self._selected, self._offset, bytes(self._address)) + written

    def restore(self, state: bytes) -> None:
        if len(state) != _STATE.size + sum(len(self._items[key]) for key in self._writable):
            raise ValueError(f"{len(state)} bytes")
        self._selected, self._offset, address = _STATE.unpack_from(state)
        self._address = bytearray(address)
        start = _STATE.size
        for key in sorted(self._writable):
            size = len(self._items[key])
            self._items[key][:] = state[start : start + size]
            start += size

    def _select(self, key: int) -> None:
        self._selected, self._offset = key, 0

    def _take(self, size: int) -> bytes:
        """The next bytes of the selected item; zeros past its end."""
        data = self._items.get(self._selected, bytearray())[self._offset : self._offset + size]
        self._offset += size
        return bytes(data).ljust(size, b"\0")

    def _transfer(self, request: int) -> None:
        try:
            control, length, address = _REQUEST.unpack(self._memory.read(request, _REQUEST.size, self._vtl))
        except VtlabError as error:
            self._refused("request", request, _REQUEST.size, error)
            return
        if control & Control.SELECT:
            self._select(control >> 16)
        try:
            ok = self._move(control, length, address)
        except VtlabError as error:
            self._refused("read" if control & Control.READ else "write", address, length, error)
            ok = False
        try:
            self._memory.write(request, struct.pack(">I", 0 if ok else Control.ERROR), self._vtl)
        except VtlabError as error:
            self._refused("answer", request, 4, error)

    def _move(self, control: int, length: int, address: int) -> bool:
        """One transfer; READ before WRITE before SKIP where several are asked for, as in QEMU. False: error bit."""
        if length > MAX_TRANSFER:
            return False
        if control & Control.READ:
            self._memory.check(address, length, WRITE, self._vtl)
            self._memory.write(address, self._take(length), self._vtl)
            self._log(DeviceEvent(device="fw_cfg", what="read", gpa=address, size=length))
        elif control & Control.WRITE:
            item = self._items.get(self._selected, bytearray())
            if self._selected not in self._writable or self._offset + length > len(item):
                return False
            item[self._offset : self._offset + length] = self._memory.read(address, length, self._vtl)
            self._offset += length
            self._log(DeviceEvent(device="fw_cfg", what="write", gpa=address, size=length))
        elif control & Control.SKIP:
            self._offset += length
        return True

    def _refused(self, what: str, gpa: int, size: int, error: VtlabError) -> None:
        self._log(DeviceEvent(device="fw_cfg", what=f"{what}: {error.detail}", gpa=gpa, size=size, refused=True))
