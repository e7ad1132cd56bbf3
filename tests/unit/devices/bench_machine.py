"""A platform under manual time, as its tests drive it."""

from __future__ import annotations

from vtl0_guest.cpu.devices.bus import Platform
from vtl0_guest.cpu.devices.clock import ManualClock
from vtl0_guest.cpu.devices.platform import build_platform

RAM_SIZE = 64 << 20


class Machine:
    """A platform, its clock, and shorthands for the guest's side of the ports."""

    def __init__(self, vp_count: int = 1, ram_size: int = RAM_SIZE) -> None:
        self.clock = ManualClock(now=100.0)
        self.platform: Platform = build_platform(vp_count, ram_size, self.clock)
        self.woken: list[int] = []
        self.rearmed = 0
        self.platform.on_wake = self.woken.append
        self.platform.on_deadline = self._count_rearm

    def _count_rearm(self) -> None:
        self.rearmed += 1

    def inb(self, port: int) -> int:
        return self.platform.ports[port].read(port, 1)

    def outb(self, port: int, *values: int) -> None:
        for value in values:
            self.platform.ports[port].write(port, 1, value)

    def pass_time(self, seconds: float) -> None:
        """Lets time pass as the core's timer thread sees it: deadline by deadline."""
        end = self.clock.now() + seconds
        while (deadline := self.platform.next_deadline()) is not None and deadline <= end:
            self.clock.advance(deadline - self.clock.now())
            self.platform.advance(self.clock.now())
        self.clock.advance(end - self.clock.now())

    def start_pic(self, masks: tuple[int, int] = (0, 0), icw4: int = 1) -> None:
        """Vectors 0x20-0x2F."""
        for port, base, wire, mask in ((0x20, 0x20, 4, masks[0]), (0xA0, 0x28, 2, masks[1])):
            self.outb(port, 0x11)
            self.outb(port + 1, base, wire, icw4, mask)

    def pending(self) -> int | None:
        return self.platform.pending_vector(0)

    def take(self) -> int:
        return self.platform.acknowledge(0)
