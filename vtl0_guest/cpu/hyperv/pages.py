"""Guest pages that the hypervisor writes: where an MSR says, with the rights of the level that set it."""

from __future__ import annotations

from typing import Protocol

from vtl0_guest.cpu.devices.bus import GeneralProtection
from vtl0_guest.cpu.faults import NestedFault
from vtlab.hyperv.msrs import PAGE_ENABLE, PAGE_NUMBER_SHIFT
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2

_WRITE = vcpu_pb2.ACCESS_KIND_WRITE


class GuestMemory(Protocol):
    """Physical memory of the level (guest_memory.PhysicalMemory). Every method raises NestedFault."""

    def read(self, gpa: int, size: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...

    def check(self, gpa: int, access: vcpu_pb2.AccessKind.ValueType) -> None: ...


class MsrPage:
    """One page behind an MSR of the form enable [0], page number [63:12]; [11:1] are kept as written.

    Attributes:
        msr: as the guest wrote it.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.msr = 0

    @property
    def enabled(self) -> bool:
        return bool(self.msr & PAGE_ENABLE)

    @property
    def gpa(self) -> int:
        return self.msr >> PAGE_NUMBER_SHIFT << PAGE_NUMBER_SHIFT

    def set(self, value: int) -> None:
        """A write to the MSR: a page that is new here is zeroed.

        Raises:
            GeneralProtection: the level may not write that page, or nothing is there. Nothing changed.
        """
        moved = value & PAGE_ENABLE and (not self.enabled or (value ^ self.msr) >> PAGE_NUMBER_SHIFT)
        if moved:
            try:
                self._memory.write(value >> PAGE_NUMBER_SHIFT << PAGE_NUMBER_SHIFT, bytes(PAGE_SIZE))
            except NestedFault:
                raise GeneralProtection(f"page {value >> PAGE_NUMBER_SHIFT:#x} cannot be written") from None
        self.msr = value

    def read(self, offset: int, size: int) -> bytes | None:
        """None where the page is off or the level may not read it now."""
        if not self.enabled:
            return None
        try:
            return self._memory.read(self.gpa + offset, size)
        except NestedFault:
            return None

    def write(self, offset: int, data: bytes) -> bool:
        """False where the page is off or the level may not write it now; nothing is written then."""
        if not self.enabled:
            return False
        try:
            self._memory.write(self.gpa + offset, data)
        except NestedFault:
            return False
        return True

    def writable(self) -> bool:
        """Whether write() would succeed."""
        if not self.enabled:
            return False
        try:
            self._memory.check(self.gpa, _WRITE)
        except NestedFault:
            return False
        return True

    def reset(self) -> None:
        self.msr = 0
