"""What Hyper-V adds to one processor at one level, and what the processors of a level share."""

from __future__ import annotations

from collections.abc import Callable

from vtl0_guest.cpu.devices.apic_registers import Delivery
from vtl0_guest.cpu.devices.bus import Guard, Platform
from vtl0_guest.cpu.devices.clock import Clock
from vtl0_guest.cpu.hyperv.assist_page import AssistPage
from vtl0_guest.cpu.hyperv.instant import Instant, Round
from vtl0_guest.cpu.hyperv.pages import GuestMemory
from vtl0_guest.cpu.hyperv.reference_time import HZ, ReferenceTime, ReferenceTscPage
from vtl0_guest.cpu.hyperv.synic import Synic
from vtl0_guest.cpu.hyperv.synthetic_timer import SyntheticTimer
from vtlab.hyperv.synic import TIMER_COUNT
from vtlab.v1.vcpu_pb2 import InterruptNotice


class Partition:
    """One level of one machine.

    Attributes:
        reference: the partition reference time.
        tsc_page: REFERENCE_TSC.
        turns: which of its processors runs.
    """

    def __init__(self, clock: Clock, memory: GuestMemory, vp_count: int, created: float | None = None) -> None:
        self.memory = memory
        self.reference = ReferenceTime(clock, created)
        self.tsc_page = ReferenceTscPage(memory, self.reference, vp_count)
        self.turns = Round()


class Runtime:
    """VP_RUNTIME: how long the processor has been running, without what it waited."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.now
        self._since: float | None = None
        self._total = 0.0

    def start(self) -> None:
        self._since = self._now()

    def stop(self) -> None:
        if self._since is not None:
            self._total += self._now() - self._since
            self._since = None

    def value(self) -> int:
        """In units of 100 ns."""
        running = 0.0 if self._since is None else self._now() - self._since
        return int((self._total + running) * HZ)


class VirtualProcessor:
    """Synthetic state of one processor at one level.

    Attributes:
        vp_index: VP_INDEX.
        idle: GUEST_IDLE was read: the processor waits for an interrupt, whether RFLAGS.IF lets it in or not.
    """

    def __init__(self, vp_index: int, partition: Partition, platform: Platform) -> None:
        self.vp_index = vp_index
        self.partition = partition
        self.apic = platform.local_apic(vp_index)
        self.guard: Guard = platform.guard
        self.synic = Synic(partition.memory, self.apic, self.guard)
        self.assist = AssistPage(partition.memory)
        self.runtime = Runtime(platform.clock)
        self.instant = Instant(platform.clock, partition.reference, partition.tsc_page, partition.turns)
        self.idle = False
        self.timers = [
            SyntheticTimer(
                index,
                partition.reference,
                self.guard,
                raise_vector=self._raise_vector,
                queue=self.synic.queue,
                cancel=self.synic.messages.cancel,
            )
            for index in range(TIMER_COUNT)
        ]
        platform.add_timed(self.timers)

    def _raise_vector(self, vector: int) -> None:
        self.apic.receive(Delivery.FIXED, vector)

    def interrupt(self, vector: int) -> None:
        """A fixed interrupt from another level or processor, by hypercall."""
        with self.guard:
            self._raise_vector(vector)

    def notice(self, notice: InterruptNotice) -> None:
        """VINA: an interrupt waits for the level below, which this one hears of once."""
        if notice.reset:
            self.assist.reset_vina()
            return
        with self.guard:
            self.synic.end_by_itself(notice.vector if notice.auto_eoi else None)
            if self.assist.assert_vina():
                self._raise_vector(notice.vector)

    @property
    def attend(self) -> Callable[[], None]:
        """Called, from any thread, when the processor should look at what waits (`due`)."""
        return self.synic.attend

    @attend.setter
    def attend(self, function: Callable[[], None]) -> None:
        self.synic.attend = function

    def reset(self) -> None:
        """State after a reset of the processor."""
        with self.guard:
            for timer in self.timers:
                timer.reset()
            self.synic.reset()
            self.assist.reset()
            self.instant.reset()
            self.idle = False
