"""Local APIC: xAPIC by MMIO, x2APIC by MSRs, IA32_APIC_BASE, and the timer.

Sources: Intel SDM volume 3, chapter "Advanced programmable interrupt controller"; AMD APM volume 2, chapter 16. SMI
messages are not delivered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vtl0_guest.cpu.devices.apic_registers import (
    LVT_MASKED,
    LVT_WRITABLE,
    X2APIC_FIRST,
    X2APIC_LAST,
    Delivery,
    Register,
    check_x2apic_access,
    lvt_delivery,
)
from vtl0_guest.cpu.devices.apic_timer import ApicTimer, TimerMode
from vtl0_guest.cpu.devices.bus import GeneralProtection, Guard
from vtl0_guest.cpu.devices.clock import Clock
from vtlab.x86.paging import PHYSICAL_BITS
from vtlab.x86.registers import Msr

DEFAULT_BASE = 0xFEE0_0000
MMIO_SIZE = 4096
BASE_BSP = 1 << 8
BASE_X2APIC = 1 << 10
BASE_ENABLED = 1 << 11
_BASE_ADDRESS = ((1 << PHYSICAL_BITS) - 1) & ~0xFFF

# Version 0x14, six LVT entries, no suppression of EOI broadcasts.
VERSION = 0x0005_0014
_SVR_ENABLED = 1 << 8
_ESR_SEND_ILLEGAL, _ESR_RECEIVE_ILLEGAL, _ESR_ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7
_ALL = 0xFF
_TPR = Register.TPR
_ASSERT, _LEVEL_TRIGGERED = 1 << 14, 1 << 15
_STARTUPS = frozenset({Delivery.INIT, Delivery.STARTUP})
# Messages that wait for a decision; a processor stops for the first, so that more come only from other senders.
_MOST_HELD = 64


class Startup(NamedTuple):
    """An INIT or SIPI (`delivery`) that is held back."""

    target: LocalApic
    delivery: int
    vector: int


class LocalApic:
    """One processor's local APIC.

    Attributes:
        vp_index: the processor; its initial APIC ID too.
        apic_base: IA32_APIC_BASE.
        on_end_of_interrupt: told the vector of each level-triggered interrupt that ends (the EOI broadcast).
        auto_eoi: set of vectors that are over as soon as they are taken (SINT MSRs with auto-EOI), as a bit mask.
        on_eoi: told the vector that each EOI ends.
        holds_startups: INIT and SIPI that this processor sends, and those that reach it undecided, wait in
            `held_startups` instead of being delivered (vcpu.proto, InterceptFilter.startups).
        is_parked: tells whether the processor runs nothing (vcpu.proto, Startup.target_parked).
    """

    def __init__(self, vp_index: int, guard: Guard, clock: Clock, bus: Sequence[LocalApic]) -> None:
        """`bus` is the list of all local APICs of the machine; it may grow after this call."""
        self.vp_index = vp_index
        self._guard = guard
        self._bus = bus
        self.on_end_of_interrupt: Callable[[int], None] = lambda _vector: None
        self.timer = ApicTimer(clock, guard, self._timer_fired)
        self.auto_eoi = 0
        self.on_eoi: Callable[[int], None] = lambda _vector: None
        self._handlers: dict[Register, Callable[[int], None]] = {
            Register.TPR: self._write_tpr,
            Register.EOI: self._write_eoi,
            Register.SVR: self._write_svr,
            Register.ESR: self._write_esr,
            Register.ICR_LOW: self._write_icr,
            Register.TIMER_INITIAL: self.timer.start,
            Register.TIMER_DIVIDE: self.timer.set_divide,
        }
        self._readers: dict[Register, Callable[[], int]] = {
            Register.PPR: self.processor_priority,
            Register.TIMER_INITIAL: lambda: self.timer.initial,
            Register.TIMER_CURRENT: self.timer.current,
            Register.TIMER_DIVIDE: lambda: self.timer.divide,
            Register.ESR: lambda: self._esr,
            Register.ID: self._id,
            Register.LDR: self._ldr,
        }
        self.apic_base = DEFAULT_BASE | BASE_ENABLED | (0 if vp_index else BASE_BSP)
        self._smi = False
        self._init = False
        self._startup: int | None = None
        self.holds_startups = False
        self.is_parked: Callable[[], bool] = lambda: False
        self.held_startups: deque[Startup] = deque(maxlen=_MOST_HELD)
        self._reset()

    def _reset(self) -> None:
        """State after RESET; a boot processor's LINT0 takes ExtINT, as firmware leaves it (virtual wire mode)."""
        self._irr = 0
        self._isr = 0
        # Bit n: vector n was last received as level triggered.
        self._tmr = 0
        self._nmi = False
        self._lint0 = False
        self._esr = 0
        self._esr_pending = 0
        self._icr = 0
        self._values = {
            Register.ID: self.vp_index << 24,
            Register.VERSION: VERSION,
            Register.DFR: 0xFFFF_FFFF,
            Register.SVR: 0xFF,
        } | dict.fromkeys(LVT_WRITABLE, LVT_MASKED)
        if self.vp_index == 0:
            self._values[Register.LVT_LINT0] = Delivery.EXTINT << 8
        self.timer.reset()

    # ------------------------------------------------------------------------------------------ the core's side

    @property
    def enabled(self) -> bool:
        """IA32_APIC_BASE.EN, which CPUID.1:EDX.APIC mirrors."""
        return bool(self.apic_base & BASE_ENABLED)

    @property
    def x2apic(self) -> bool:
        return bool(self.apic_base & BASE_X2APIC)

    @property
    def mmio_base(self) -> int | None:
        """Guest-physical address of the 4 KiB of registers; None while disabled or in x2APIC mode."""
        return self.apic_base & _BASE_ADDRESS if self.enabled and not self.x2apic else None

    @property
    def tpr(self) -> int:
        """TPR, 8 bits. CR8 is its bits 7:4."""
        return self._values.get(_TPR, 0)

    @tpr.setter
    def tpr(self, value: int) -> None:
        with self._guard:
            self._write_tpr(value)

    def deliverable(self) -> int | None:
        """Vector of the highest request above the processor priority; None if there is none."""
        if not self._irr or not self._values[Register.SVR] & _SVR_ENABLED:
            return None
        vector = self._irr.bit_length() - 1
        return vector if vector >> 4 > self.processor_priority() >> 4 else None

    def take(self) -> int:
        """Moves that request into service; the spurious vector of SVR if there is none."""
        vector = self.deliverable()
        if vector is None:
            return self._values[Register.SVR] & 0xFF
        self._irr &= ~(1 << vector)
        self._isr |= 1 << vector & ~self.auto_eoi
        return vector

    def take_nmi(self) -> bool:
        taken, self._nmi = self._nmi, False
        return taken

    @property
    def urgent(self) -> bool:
        """An SMI, NMI, INIT or SIPI waits."""
        return self._smi or self._nmi or self._init or self._startup is not None or bool(self.held_startups)

    def take_smi(self) -> bool:
        """True once for the SMIs received so far."""
        taken, self._smi = self._smi, False
        return taken

    def take_startup(self) -> tuple[bool, int | None]:
        """INIT, and the vector of a SIPI that came after it or alone."""
        taken = self._init, self._startup
        self._init, self._startup = False, None
        return taken

    def init(self) -> None:
        """INIT: as after RESET, but the ID and IA32_APIC_BASE stay."""
        with self._guard:
            own_id = self._values[Register.ID]
            self._reset()
            self._values[Register.ID] = own_id

    def accepts_external(self) -> bool:
        """The interrupt controllers' output reaches the processor: APIC off, or LINT0 unmasked in ExtINT mode."""
        lint0 = self._values[Register.LVT_LINT0]
        return not self.enabled or (not lint0 & LVT_MASKED and lvt_delivery(lint0) == Delivery.EXTINT)

    def set_lint0(self, level: bool) -> None:
        """The interrupt controllers' output changed."""
        rising = level and not self._lint0
        self._lint0 = level
        lint0 = self._values[Register.LVT_LINT0]
        if self.accepts_external():
            if level:
                self._guard.wake(self.vp_index)
        elif rising and not lint0 & LVT_MASKED:
            self.receive(lvt_delivery(lint0), lint0 & 0xFF)

    def hold(self, startup: Startup) -> None:
        """Has this processor stop for an INIT or SIPI; one too many is dropped."""
        if len(self.held_startups) < _MOST_HELD:
            self.held_startups.append(startup)
        self._guard.wake(self.vp_index)

    def receive(self, delivery: int, vector: int, level: bool = False, *, decided: bool = False) -> None:
        """An interrupt message arrives; ExtINT is dropped. `decided`: INIT and SIPI are not held again."""
        if not self.enabled:
            return
        if self.holds_startups and not decided and delivery in _STARTUPS:
            self.hold(Startup(self, delivery, vector))
            return
        if delivery == Delivery.NMI:
            self._nmi = True
        elif delivery == Delivery.SMI:
            self._smi = True
        elif delivery == Delivery.INIT:
            self._init, self._startup = True, None
        elif delivery == Delivery.STARTUP:
            self._startup = vector
        elif delivery in (Delivery.FIXED, Delivery.LOWEST):
            if vector < 16:
                self._error(_ESR_RECEIVE_ILLEGAL)
                return
            if not self._values[Register.SVR] & _SVR_ENABLED:
                return
            self._irr |= 1 << vector
            self._tmr = self._tmr | 1 << vector if level else self._tmr & ~(1 << vector)
        else:
            return
        self._guard.wake(self.vp_index)

    # ------------------------------------------------------------------------------------------ MMIO and MSRs

    def mmio_read(self, offset: int, size: int) -> int:
        """A register by its offset in the page. Accesses that are not aligned 32-bit ones read what lies there."""
        with self._guard:
            if offset & 0xF >= 4:
                return 0
            value = self._read(offset >> 4)
            return value >> 8 * (offset & 3) & ((1 << 8 * size) - 1)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Only aligned 32-bit writes do anything: the others are undefined (SDM, "APIC register address map")."""
        with self._guard:
            if size == 4 and not offset & 0xF:
                self._write(offset >> 4, value & 0xFFFF_FFFF)

    def msr_read(self, index: int) -> int:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register. Raises GeneralProtection."""
        with self._guard:
            if index == Msr.APIC_BASE:
                return self.apic_base
            if index == Msr.TSC_DEADLINE:
                return self.timer.tsc_deadline
            register = self._x2apic_register(index)
            check_x2apic_access(register, None)
            if register == Register.ICR_LOW:
                return self._icr
            return self._read(register)

    def msr_write(self, index: int, value: int) -> None:
        """As msr_read. Raises GeneralProtection and changes nothing if the processor would refuse."""
        with self._guard:
            if index == Msr.APIC_BASE:
                self._write_base(value)
            elif index == Msr.TSC_DEADLINE:
                self.timer.set_tsc_deadline(value)
            else:
                register = self._x2apic_register(index)
                check_x2apic_access(register, value)
                if register == Register.ICR_LOW:
                    self._values[Register.ICR_HIGH] = value >> 32
                    self._write_icr(value & 0xFFFF_FFFF)
                elif register == Register.SELF_IPI:
                    self._send(Delivery.FIXED, value & 0xFF, [self])
                else:
                    self._write(register, value)

    def shortcut_read(self, register: Register) -> int:
        """A register by its synthetic MSR, in either mode. Raises GeneralProtection while the APIC is disabled."""
        self._require_enabled()
        with self._guard:
            return self._read(register)

    def shortcut_write(self, register: Register, value: int) -> None:
        """The other direction."""
        self._require_enabled()
        with self._guard:
            if register == Register.ICR_HIGH:
                self._values[register] = value if self.x2apic else value & _PLAIN[register]
            else:
                self._write(register, value)

    def _require_enabled(self) -> None:
        if not self.enabled:
            raise GeneralProtection("the local APIC is disabled")

    def _x2apic_register(self, index: int) -> int:
        if not self.x2apic or not X2APIC_FIRST <= index <= X2APIC_LAST:
            raise GeneralProtection(f"MSR {index:#x}")
        return index - X2APIC_FIRST

    def _write_base(self, value: int) -> None:
        """Transitions by the SDM's figure "Local APIC state transitions with IA32_APIC_BASE"."""
        if value & ~(_BASE_ADDRESS | BASE_BSP | BASE_X2APIC | BASE_ENABLED):
            raise GeneralProtection("IA32_APIC_BASE: reserved bits")
        enabled, x2apic = bool(value & BASE_ENABLED), bool(value & BASE_X2APIC)
        if x2apic and not enabled:
            raise GeneralProtection("IA32_APIC_BASE: x2APIC without the enable bit")
        if (self.x2apic and enabled and not x2apic) or (not self.enabled and x2apic):
            raise GeneralProtection("IA32_APIC_BASE: no such transition")
        was_enabled, was_x2apic = self.enabled, self.x2apic
        self.apic_base = value
        if was_enabled and not enabled:
            self._reset()
        if x2apic and not was_x2apic:
            # The 32-bit ID takes the place of the 8-bit one.
            self._values[Register.ID] = self.vp_index << 24
        self._guard.wake(self.vp_index)

    # ------------------------------------------------------------------------------------------ registers

    def _read(self, number: int) -> int:
        for first, bits in ((Register.ISR, self._isr), (Register.TMR, self._tmr), (Register.IRR, self._irr)):
            if first <= number < first + 8:
                return bits >> 32 * (number - first) & 0xFFFF_FFFF
        if number not in Register.__members__.values():
            self._error(_ESR_ILLEGAL_REGISTER)
            return 0
        register = Register(number)
        reader = self._readers.get(register)
        return reader() if reader else self._values.get(register, 0)

    def _write(self, number: int, value: int) -> None:
        if number not in Register.__members__.values():
            self._error(_ESR_ILLEGAL_REGISTER)
            return
        register = Register(number)
        if register in LVT_WRITABLE:
            self._write_lvt(register, value)
        elif handler := self._handlers.get(register):
            handler(value)
        elif register in _PLAIN:
            self._values[register] = value & _PLAIN[register] | (0x0FFF_FFFF if register == Register.DFR else 0)

    def _id(self) -> int:
        return self.vp_index if self.x2apic else self._values[Register.ID]

    def _ldr(self) -> int:
        if self.x2apic:
            return (self.vp_index >> 4) << 16 | 1 << (self.vp_index & 15)
        return self._values.get(Register.LDR, 0)

    def processor_priority(self) -> int:
        """PPR."""
        tpr, serving = self.tpr, self._isr.bit_length() - 1 if self._isr else 0
        return tpr if tpr >> 4 >= serving >> 4 else serving & 0xF0

    def _write_tpr(self, value: int) -> None:
        self._values[Register.TPR] = value & 0xFF
        self._wake_if_deliverable()

    def _write_eoi(self, _value: int) -> None:
        if self._isr:
            vector = self._isr.bit_length() - 1
            self._isr &= ~(1 << vector)
            if self._tmr >> vector & 1:
                self.on_end_of_interrupt(vector)
            self.on_eoi(vector)
        self._wake_if_deliverable()

    def _wake_if_deliverable(self) -> None:
        if self.deliverable() is not None:
            self._guard.wake(self.vp_index)

    def _write_svr(self, value: int) -> None:
        self._values[Register.SVR] = value & 0x1FF
        if not value & _SVR_ENABLED:
            for register in LVT_WRITABLE:
                self._write_lvt(register, self._values[register] | LVT_MASKED)

    def _write_esr(self, _value: int) -> None:
        self._esr, self._esr_pending = self._esr_pending, 0

    def _write_lvt(self, register: Register, value: int) -> None:
        value &= LVT_WRITABLE[register]
        if not self._values[Register.SVR] & _SVR_ENABLED:
            value |= LVT_MASKED
        self._values[register] = value
        if register == Register.LVT_TIMER:
            self.timer.set_mode(TimerMode(value >> 17 & 3))
        elif register == Register.LVT_LINT0 and self._lint0:
            self._guard.wake(self.vp_index)

    def _timer_fired(self) -> None:
        lvt = self._values[Register.LVT_TIMER]
        if not lvt & LVT_MASKED:
            self.receive(Delivery.FIXED, lvt & 0xFF)

    def _error(self, bit: int) -> None:
        self._esr_pending |= bit
        lvt = self._values[Register.LVT_ERROR]
        # An error vector that is itself illegal would otherwise report itself for ever.
        if not lvt & LVT_MASKED and lvt & 0xFF >= 16:
            self.receive(Delivery.FIXED, lvt & 0xFF)

    # ------------------------------------------------------------------------------------------ sending

    def _write_icr(self, value: int) -> None:
        """Low half: vector, delivery mode 10:8, logical 11, level 14, trigger 15, shorthand 19:18."""
        high = self._values.get(Register.ICR_HIGH, 0)
        self._values[Register.ICR_LOW] = value & 0x000C_CFFF
        self._icr = high << 32 | self._values[Register.ICR_LOW]
        if value >> 8 & 7 == Delivery.INIT and value & _LEVEL_TRIGGERED and not value & _ASSERT:
            return  # INIT level de-assert only synchronized arbitration IDs
        shorthand = value >> 18 & 3
        if shorthand == 0:
            destination = high if self.x2apic else high >> 24
            targets = [apic for apic in self._bus if apic.matches(destination, bool(value & 1 << 11))]
        else:
            targets = [self] if shorthand == 1 else [apic for apic in self._bus if shorthand == 2 or apic is not self]
        self._send(value >> 8 & 7, value & 0xFF, targets)

    def _send(self, delivery: int, vector: int, targets: list[LocalApic]) -> None:
        if delivery in (Delivery.FIXED, Delivery.LOWEST) and vector < 16:
            self._error(_ESR_SEND_ILLEGAL)
        if delivery == Delivery.LOWEST and targets:
            targets = [min(targets, key=lambda apic: apic.processor_priority())]
        for apic in targets:
            if self.holds_startups and delivery in _STARTUPS:
                self.hold(Startup(apic, delivery, vector))
            else:
                apic.receive(delivery, vector)

    def matches(self, destination: int, logical: bool) -> bool:
        """The destination of a message names this APIC."""
        broadcast = 0xFFFF_FFFF if self.x2apic else _ALL
        if not self.enabled:
            return False
        if destination == broadcast:
            return True
        if not logical:
            return destination == (self.vp_index if self.x2apic else self._values[Register.ID] >> 24)
        if self.x2apic:
            ldr = self._ldr()
            return destination >> 16 == ldr >> 16 and bool(destination & ldr & 0xFFFF)
        ldr = self._ldr() >> 24
        if self._values[Register.DFR] >> 28 == 0xF:
            return bool(destination & ldr)
        return destination >> 4 == ldr >> 4 and bool(destination & ldr & 0xF)


def send(bus: Sequence[LocalApic], delivery: int, vector: int, destination: int, *, logical: bool, level: bool) -> None:
    """A message with an 8-bit destination, as interrupt controllers outside the processors send."""
    targets = [
        apic
        for apic in bus
        if apic.matches(0xFFFF_FFFF if destination == _ALL and apic.x2apic else destination, logical)
    ]
    if delivery == Delivery.LOWEST and targets:
        targets = [min(targets, key=LocalApic.processor_priority)]
    for apic in targets:
        apic.receive(delivery, vector, level)


# Registers without side effects: bits that can be written.
_PLAIN = {
    Register.ID: 0xFF00_0000,
    Register.LDR: 0xFF00_0000,
    Register.DFR: 0xF000_0000,
    Register.ICR_HIGH: 0xFF00_0000,
}
