"""The synthetic interrupt controller of one processor at one level (TLFS, "Virtual Interrupts").

Others leave work here from any thread, under the platform's guard; deliver() does it on a thread that holds the run
token, because it writes guest pages. Interrupts go through the local APIC, which knows the vectors that end themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain

from vtl0_guest.cpu.devices.apic_registers import Delivery
from vtl0_guest.cpu.devices.bus import GeneralProtection, Guard
from vtl0_guest.cpu.devices.local_apic import LocalApic
from vtl0_guest.cpu.hyperv.event_flags import EventFlagsPage
from vtl0_guest.cpu.hyperv.message_page import Message, MessagePage
from vtl0_guest.cpu.hyperv.pages import GuestMemory
from vtlab.hyperv.synic import FIRST_VECTOR, SINT_AFTER_RESET, SINT_COUNT, SintFlags

_MASKED, _AUTO_EOI, _POLLING = int(SintFlags.MASKED), int(SintFlags.AUTO_EOI), int(SintFlags.POLLING)
_ENABLED = 1
# As openvmm and KVM have it; 0 in the TLFS. Guests write 1 before they use it.
SCONTROL_AFTER_RESET = 1


class Synic:
    """SCONTROL, SIMP, SIEFP, SINT0 to SINT15 and EOM.

    Attributes:
        scontrol: as the guest wrote it.
        messages, events: the pages.
        sints: the SINT MSRs.
        due: deliver() has something to do.
        delivered: SINTs of the posted messages that left their queues; the owner takes them away.
    """

    def __init__(self, memory: GuestMemory, apic: LocalApic, guard: Guard) -> None:
        self._apic = apic
        self._guard = guard
        self.attend: Callable[[], None] = lambda: None
        self.messages = MessagePage(memory)
        self.events = EventFlagsPage(memory)
        self.delivered: list[int] = []
        self._notice: int | None = None
        self._signals: deque[tuple[int, int]] = deque()
        self._raised: deque[int] = deque()
        self.reset()
        apic.on_eoi = self._vector_ended

    def reset(self) -> None:
        """State after a reset of the processor: nothing is enabled, nothing waits."""
        with self._guard:
            self.scontrol = SCONTROL_AFTER_RESET
            self.sints = [SINT_AFTER_RESET] * SINT_COUNT
            self.messages.reset()
            self.events.reset()
            self._signals.clear()
            self._raised.clear()
            self.due = False
            self._notice = None
            self._apic.auto_eoi = 0

    # ------------------------------------------------------------------------------------------------- MSRs

    def set_scontrol(self, value: int) -> None:
        self.scontrol = value
        self.rescan()

    def set_sint(self, sint: int, value: int) -> None:
        """Raises GeneralProtection for a vector below 16 that is not masked."""
        if value & 0xFF < FIRST_VECTOR and not value & _MASKED:
            raise GeneralProtection(f"SINT{sint}: vector {value & 0xFF}")
        self.sints[sint] = value
        self._choose_auto_eoi()
        self.rescan()

    def end_by_itself(self, vector: int | None) -> None:
        """The vector of VINA with auto-EOI, or none."""
        self._notice = vector
        self._choose_auto_eoi()

    def _choose_auto_eoi(self) -> None:
        vectors = {value & 0xFF for value in self.sints if value & _AUTO_EOI and not value & _MASKED}
        if self._notice is not None:
            vectors.add(self._notice)
        self._apic.auto_eoi = sum(1 << vector for vector in vectors)

    def set_message_page(self, value: int) -> None:
        self.messages.set(value)
        self.rescan()

    def rescan(self) -> None:
        """EOM, or a change after which a queue may move."""
        if next(self.messages.waiting(), None) is not None:
            self.due = True

    def _vector_ended(self, vector: int) -> None:
        """EOI in the local APIC does what EOM does, for the SINTs of that vector."""
        if any(value & 0xFF == vector and self.messages.waits(sint) for sint, value in enumerate(self.sints)):
            self.due = True

    # ------------------------------------------------------------------------------------------------- work

    def queue(self, sint: int, message: Message) -> None:
        """Under the guard, from any thread."""
        self.messages.queue(sint, message)
        self._ask()

    def post(self, sint: int, type_: int, origin: int, payload: bytes, *, drop_if_busy: bool = False) -> None:
        """A message from outside."""
        with self._guard:
            message = Message(type_, origin, lambda: payload, lambda: self.delivered.append(sint), drop_if_busy)
            self.queue(sint, message)

    def signal(self, sint: int, flag: int) -> None:
        """An event flag from outside."""
        with self._guard:
            self._signals.append((sint, flag))
            self._ask()

    def raise_sint(self, sint: int) -> None:
        """The source's interrupt alone."""
        with self._guard:
            self._raised.append(sint)
            self._ask()

    def _ask(self) -> None:
        self.due = True
        self.attend()

    def deliver(self) -> None:
        """Writes what can be written to the guest's pages, and raises the interrupts. With the run token held."""
        with self._guard:
            self.due = False
            for sint in list(self.messages.waiting()):
                if self.messages.deliver(sint, receptive=self._receptive(sint)):
                    self._interrupt(sint)
            while self._signals:
                sint, flag = self._signals.popleft()
                if self.scontrol & _ENABLED and self.events.signal(sint, flag):
                    self._interrupt(sint)
            while self._raised:
                self._interrupt(self._raised.popleft())

    def _receptive(self, sint: int) -> bool:
        """A masked source takes no messages; one that is polled does, masked or not."""
        value = self.sints[sint]
        return bool(self.scontrol & _ENABLED) and (not value & _MASKED or bool(value & _POLLING))

    def _interrupt(self, sint: int) -> None:
        value = self.sints[sint]
        if self.scontrol & _ENABLED and not value & (_MASKED | _POLLING):
            self._apic.receive(Delivery.FIXED, value & 0xFF)

    def take_delivered(self) -> list[int]:
        """SINTs of messages that left their queues since the last call."""
        taken, self.delivered = self.delivered, []
        return taken

    def sources(self) -> chain[int]:
        """SINTs with work left, for tests and people."""
        return chain(self.messages.waiting(), (sint for sint, _ in self._signals), self._raised)
