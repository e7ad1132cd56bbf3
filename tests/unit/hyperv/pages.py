"""A platform with the Hyper-V devices of one processor, on bytes instead of an engine."""

from __future__ import annotations

from vtl0_guest.cpu.devices.bus import Platform
from vtl0_guest.cpu.devices.clock import ManualClock
from vtl0_guest.cpu.devices.platform import build_platform
from vtl0_guest.cpu.faults import NestedFault
from vtl0_guest.cpu.hyperv import msrs
from vtl0_guest.cpu.hyperv.virtual_processor import Partition, VirtualProcessor
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.synic import SLOT_SIZE, SlotHeader
from vtlab.v1 import vcpu_pb2

SIZE = 64 << 10
SIMP, SIEFP, ASSIST, TSC_PAGE = 0x4000, 0x5000, 0x6000, 0x7000


class Memory:
    """Guest memory whose pages can be made read-only."""

    def __init__(self) -> None:
        self.data = bytearray(b"\xee" * SIZE)
        self.read_only: set[int] = set()

    def check(self, gpa: int, access: vcpu_pb2.AccessKind.ValueType) -> None:
        if gpa >= SIZE or (access == vcpu_pb2.ACCESS_KIND_WRITE and gpa >> 12 in self.read_only):
            raise NestedFault(gpa, access)

    def read(self, gpa: int, size: int) -> bytes:
        self.check(gpa, vcpu_pb2.ACCESS_KIND_READ)
        return bytes(self.data[gpa : gpa + size])

    def write(self, gpa: int, data: bytes) -> None:
        self.check(gpa, vcpu_pb2.ACCESS_KIND_WRITE)
        self.data[gpa : gpa + len(data)] = data


class Bench:
    """Processor 0 of a machine under manual time, with its local APIC on, SIMP and SIEFP placed."""

    def __init__(self, vp_count: int = 1) -> None:
        self.clock = ManualClock(now=50.0)
        self.platform: Platform = build_platform(vp_count, SIZE, self.clock)
        self.memory = Memory()
        self.partition = Partition(self.clock, self.memory, vp_count)
        self.vp = VirtualProcessor(0, self.partition, self.platform)
        self.asked = 0
        self.vp.attend = self._count
        self.platform.local_apic(0).mmio_write(0xF0, 4, 0x1FF)
        self.wrmsr(HvMsr.SIMP, SIMP | 1)
        self.wrmsr(HvMsr.SIEFP, SIEFP | 1)

    def _count(self) -> None:
        self.asked += 1

    def rdmsr(self, index: int) -> int:
        return msrs.read(self.vp, index)

    def wrmsr(self, index: int, value: int) -> None:
        msrs.write(self.vp, index, value)

    def serve(self) -> None:
        """What the core does before the next instruction."""
        if self.vp.synic.due:
            self.vp.synic.deliver()

    def pass_time(self, seconds: float) -> None:
        """Deadline by deadline, serving after each."""
        end = self.clock.now() + seconds
        while (deadline := self.platform.next_deadline()) is not None and deadline <= end:
            self.clock.advance(max(0.0, deadline - self.clock.now()))
            self.platform.advance(self.clock.now())
            self.serve()
        self.clock.advance(end - self.clock.now())

    def slot(self, sint: int) -> tuple[SlotHeader, bytes]:
        raw = self.memory.read(SIMP + sint * SLOT_SIZE, SLOT_SIZE)
        header = SlotHeader.decode(raw)
        return header, raw[16 : 16 + header.size]

    def release(self, sint: int) -> None:
        """The guest has read the message."""
        self.memory.write(SIMP + sint * SLOT_SIZE, bytes(4))

    def flags(self, sint: int) -> int:
        return int.from_bytes(self.memory.read(SIEFP + sint * 256, 256), "little")

    def take(self) -> int | None:
        """The vector that the processor takes now."""
        vector = self.platform.pending_vector(0)
        if vector is not None:
            assert self.platform.acknowledge(0) == vector
        return vector

    def in_service(self, vector: int) -> bool:
        apic = self.platform.local_apic(0)
        return bool(apic.mmio_read(0x100 + 0x10 * (vector // 32), 4) >> vector % 32 & 1)

    def eoi(self) -> None:
        self.platform.local_apic(0).mmio_write(0xB0, 4, 0)
