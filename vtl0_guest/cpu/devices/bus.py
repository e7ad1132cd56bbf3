"""How the core meets its devices: ports, interrupt lines, deadlines, and the one lock that orders them.

Devices are touched by the thread that runs the vCPU (ports, local APIC, acknowledging) and by the core's timer thread
(`Platform.advance`), and input arrives from a third. Everything of one platform is owned by its `Guard`: the public
methods of Platform, of LocalApic and of SerialPorts and every object in `Platform.ports` take it; what they call does
not. The callbacks `on_wake` and `on_deadline` run after the lock is released, so they may take locks of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from vtlab.v1 import vcpu_pb2

if TYPE_CHECKING:
    from vtl0_guest.cpu.devices.clock import Clock
    from vtl0_guest.cpu.devices.isa_lines import IsaLines
    from vtl0_guest.cpu.devices.local_apic import LocalApic, Startup
    from vtl0_guest.cpu.devices.pic import PicPair
    from vtl0_guest.cpu.devices.power_management import PowerManagement
    from vtl0_guest.cpu.devices.serial import SerialPorts
    from vtl0_guest.cpu.devices.system_management import SmramControl


class SystemManagementInterrupt:
    """A device asks for SMI on the processor that has just accessed it."""


# What a device can end a run with.
DeviceExit = vcpu_pb2.DebugExit | vcpu_pb2.ResetRequest | vcpu_pb2.PowerOff | vcpu_pb2.Sleep | SystemManagementInterrupt


class GeneralProtection(Exception):
    """An access that the processor answers with #GP(0): a reserved bit, an absent register, a forbidden transition."""


class PortDevice(Protocol):
    """I/O ports. `size` is 1, 2 or 4 bytes; a device that has only byte registers uses the low byte of `value`."""

    def read(self, port: int, size: int, /) -> int: ...

    def write(self, port: int, size: int, value: int, /) -> None: ...


class MmioDevice(Protocol):
    """A page of registers. `offset` is within the page, `size` 1, 2, 4 or 8 bytes. Takes the guard itself."""

    def mmio_read(self, offset: int, size: int, /) -> int: ...

    def mmio_write(self, offset: int, size: int, value: int, /) -> None: ...


class TimedDevice(Protocol):
    """A device that does something by itself when time passes. Both methods run under the platform's guard."""

    def next_deadline(self) -> float | None:
        """Clock.now() of the next event, or None."""
        ...

    def advance(self, now: float) -> None:
        """Does what was due until `now`."""
        ...


# Sets an interrupt line: True is asserted.
IrqLine = Callable[[bool], None]


class Guard:
    """The lock of a platform, and what to announce when it is released."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._woken: set[int] = set()
        self._rearmed = False
        self.exit: DeviceExit | None = None
        self.announce: Callable[[set[int], bool], None] = lambda _woken, _rearmed: None

    def __enter__(self) -> Guard:
        self._lock.acquire()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth or not (self._woken or self._rearmed):
            self._lock.release()
            return
        woken, rearmed = self._woken, self._rearmed
        self._woken, self._rearmed = set(), False
        self._lock.release()
        self.announce(woken, rearmed)

    def wake(self, vp_index: int) -> None:
        """An interrupt may have become deliverable to that vCPU."""
        self._woken.add(vp_index)

    def rearm(self) -> None:
        """A deadline changed."""
        self._rearmed = True

    def post_exit(self, exit_value: DeviceExit) -> None:
        """Ends the run at the end of this instruction; the first exit that is posted wins."""
        if self.exit is None:
            self.exit = exit_value


class _GuardedPorts:
    """A port device behind the guard."""

    def __init__(self, device: PortDevice, guard: Guard) -> None:
        self._device = device
        self._guard = guard

    def read(self, port: int, size: int) -> int:
        with self._guard:
            return self._device.read(port, size)

    def write(self, port: int, size: int, value: int) -> None:
        with self._guard:
            self._device.write(port, size, value)


class Platform:
    """The devices of one machine. devices/platform.py builds it.

    Attributes:
        ports: what answers each claimed I/O port.
        mmio: what answers at a page, by guest-physical address; the local APICs are not among them, since each
            processor moves its own.
        clock: the time that all of them share.
        serial: COM1 and COM2.
        pic: the two 8259.
        lines: the ISA interrupt lines; the VMM's devices pulse them.
        smram: when SMRAM shows.
        power: whether the machine sleeps.
        on_wake: called with a vCPU index when an interrupt or NMI may have become deliverable there. Spurious calls
            happen. Runs on the thread that caused it.
        on_deadline: called when next_deadline() may have changed.
    """

    def __init__(
        self,
        guard: Guard,
        clock: Clock,
        ports: Mapping[int, PortDevice],
        mmio: Mapping[int, MmioDevice],
        serial: SerialPorts,
        pic: PicPair,
        lines: IsaLines,
        local_apics: Iterable[LocalApic],
        timed: Iterable[TimedDevice],
        smram: SmramControl,
        power: PowerManagement,
    ) -> None:
        self.clock = clock
        self.smram = smram
        self.power = power
        self.serial = serial
        self.mmio = dict(mmio)
        self.pic = pic
        self.lines = lines
        self.on_wake: Callable[[int], None] = lambda _vp_index: None
        self.on_deadline: Callable[[], None] = lambda: None
        self._guard = guard
        guarded = {id(device): _GuardedPorts(device, guard) for device in ports.values()}
        self.ports: dict[int, PortDevice] = {port: guarded[id(device)] for port, device in ports.items()}
        self._local_apics = list(local_apics)
        self._timed = list(timed)
        guard.announce = self._announce

    def _announce(self, woken: set[int], rearmed: bool) -> None:
        for vp_index in sorted(woken):
            self.on_wake(vp_index)
        if rearmed:
            self.on_deadline()

    @property
    def guard(self) -> Guard:
        """The lock that orders all devices of the machine."""
        return self._guard

    def add_timed(self, devices: Iterable[TimedDevice]) -> None:
        """Devices that the core adds: the synthetic timers."""
        with self._guard:
            self._timed += devices

    def local_apic(self, vp_index: int) -> LocalApic:
        return self._local_apics[vp_index]

    def pending_vector(self, vp_index: int) -> int | None:
        """Highest interrupt that could be delivered now if RFLAGS.IF allows, acknowledging nothing.

        The local APIC's come first; then, at a processor whose LINT0 takes ExtINT, the interrupt controllers'.
        """
        with self._guard:
            apic = self._local_apics[vp_index]
            vector = apic.deliverable()
            if vector is None and self.pic.output and apic.accepts_external():
                vector = self.pic.peek()
            return vector

    def acknowledge(self, vp_index: int) -> int:
        """Takes the interrupt that pending_vector() names; a spurious vector if it has gone."""
        with self._guard:
            apic = self._local_apics[vp_index]
            if apic.deliverable() is not None or not (self.pic.output and apic.accepts_external()):
                return apic.take()
            return self.pic.acknowledge()

    def take_nmi(self, vp_index: int) -> bool:
        """True once for each NMI that a local APIC received; several before that are one."""
        with self._guard:
            return self._local_apics[vp_index].take_nmi()

    def take_smi(self, vp_index: int) -> bool:
        """True once for the SMIs that a local APIC received."""
        with self._guard:
            return self._local_apics[vp_index].take_smi()

    def urgent(self, vp_index: int) -> bool:
        """An SMI, NMI, INIT or SIPI waits, which RFLAGS.IF does not hold back."""
        return self._local_apics[vp_index].urgent

    def take_startup(self, vp_index: int) -> tuple[bool, int | None]:
        """Whether an INIT arrived and, after it or alone, the vector of a SIPI. Once each."""
        with self._guard:
            return self._local_apics[vp_index].take_startup()

    def take_held_startup(self, vp_index: int) -> Startup | None:
        """The first INIT or SIPI for which this vCPU has to stop, once."""
        with self._guard:
            held = self._local_apics[vp_index].held_startups
            return held.popleft() if held else None

    def deliver_startup(self, startup: Startup) -> None:
        """It was decided that this one goes on."""
        with self._guard:
            startup.target.receive(startup.delivery, startup.vector, decided=True)

    def pulse_irq(self, irq: int) -> None:
        """Raises and lowers an ISA interrupt line, 0 to 15."""
        with self._guard:
            self.lines.set(irq, True)
            self.lines.set(irq, False)

    def set_irq(self, irq: int, level: bool) -> None:
        """Sets an ISA interrupt line, 0 to 15."""
        with self._guard:
            self.lines.set(irq, level)

    def next_deadline(self) -> float | None:
        """Clock.now() of the next timer event."""
        with self._guard:
            deadlines = (device.next_deadline() for device in self._timed)
            return min((moment for moment in deadlines if moment is not None), default=None)

    def advance(self, now: float) -> None:
        """Does what the timers had to do until `now`."""
        with self._guard:
            for device in self._timed:
                device.advance(now)

    @property
    def exit_waits(self) -> bool:
        """Whether a device has ended the run."""
        return self._guard.exit is not None

    def take_exit(self) -> DeviceExit | None:
        """What a device ended the run with, once."""
        with self._guard:
            value, self._guard.exit = self._guard.exit, None
            return value
