"""The debug-exit port of test kernels (QEMU's isa-debug-exit): a write ends the run with its value."""

from __future__ import annotations

from vtl0_guest.cpu.devices.bus import Guard
from vtlab.v1 import vcpu_pb2

FIRST_PORT = 0xF4
PORT_COUNT = 4


class DebugExitPort:
    """Ports 0xF4 to 0xF7. Reads give 0."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def read(self, _port: int, _size: int) -> int:
        return 0

    def write(self, _port: int, _size: int, value: int) -> None:
        self._guard.post_exit(vcpu_pb2.DebugExit(value=value))
