"""I/O ports that no device of the core claims: which device answers, and what an empty port reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vtlab.v1.vcpu_pb2 import Update


class PortDevice(Protocol):
    """A device behind I/O ports."""

    @property
    def ports(self) -> Iterable[int]:
        """Those it answers."""

    def read(self, port: int, size: int) -> int:
        """A value of `size` (1, 2, 4) bytes."""

    def write(self, port: int, size: int, value: int) -> Iterable[Update]:
        """Takes a value; returns what the vCPU that wrote it must be told with its next enter."""

    def save(self) -> bytes:
        """What guests have changed in it; the same state gives the same bytes."""

    def restore(self, state: bytes) -> None:
        """The inverse of save(), on a new device of the same machine. Raises ValueError."""


class PortBus:
    """All port devices of a machine, by port.

    Attributes:
        devices: in the order in which they were added.
    """

    def __init__(self, devices: Iterable[PortDevice]) -> None:
        self.devices: list[PortDevice] = []
        self._devices: dict[int, PortDevice] = {}
        for device in devices:
            self.add(device)

    def add(self, device: PortDevice) -> None:
        """The device answers at its ports from now on."""
        self.devices.append(device)
        self._devices.update(dict.fromkeys(device.ports, device))

    def answers(self, port: int) -> bool:
        """There is a device at that port, and an access may change it."""
        return port in self._devices

    def read(self, port: int, size: int) -> int:
        """An empty port reads all ones, as on a bus that nobody drives."""
        device = self._devices.get(port)
        everything = (1 << 8 * size) - 1
        return device.read(port, size) & everything if device else everything

    def write(self, port: int, size: int, value: int) -> Iterable[Update]:
        """Writes to an empty port are lost."""
        device = self._devices.get(port)
        return device.write(port, size, value) if device else ()
