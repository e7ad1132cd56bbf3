"""COM1 and COM2: 16550A UARTs whose output leaves in batches and whose input waits until the guest reads it.

Source: National Semiconductor PC16550D data sheet. Transmission takes no time, so THR and the transmitter are always
empty. Baud rate and character format are kept and mean nothing. The interrupt reaches its line only while MCR.OUT2 is
set, as in a PC.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntFlag

from vtl0_guest.cpu.devices.bus import Guard, IrqLine
from vtl0_guest.cpu.devices.clock import Clock
from vtlab.v1 import vcpu_pb2

# First port and interrupt line of each.
PORTS = ((0x3F8, 4), (0x2F8, 3))
_FIFO_DEPTH = 16
# FCR bits 7:6.
_TRIGGERS = (1, 4, 8, 14)


class Ier(IntFlag):
    RECEIVED = 1 << 0
    THR_EMPTY = 1 << 1
    LINE_STATUS = 1 << 2
    MODEM_STATUS = 1 << 3


class Lcr(IntFlag):
    BREAK = 1 << 6
    DLAB = 1 << 7


class Mcr(IntFlag):
    DTR = 1 << 0
    RTS = 1 << 1
    OUT1 = 1 << 2
    OUT2 = 1 << 3
    LOOP = 1 << 4


class Lsr(IntFlag):
    DATA_READY = 1 << 0
    OVERRUN = 1 << 1
    THR_EMPTY = 1 << 5
    IDLE = 1 << 6


# Interrupt identification, bits 3:0 of IIR.
_IIR_NONE, _IIR_MODEM, _IIR_THR, _IIR_DATA, _IIR_LINE, _IIR_TIMEOUT = 0x1, 0x0, 0x2, 0x4, 0x6, 0xC
_IIR_FIFO = 0xC0

# A peer that is always there: DCD, DSR, CTS.
_MODEM_ON_LINE = 0xB0
# In loopback: MCR bit -> MSR bit it drives.
_LOOP_WIRES = ((Mcr.RTS.value, 0x10), (Mcr.DTR.value, 0x20), (Mcr.OUT1.value, 0x40), (Mcr.OUT2.value, 0x80))


class Uart:
    """One UART.

    Attributes:
        output: bytes that the guest sent and nobody collected.
        first_unsent: Clock.now() when the oldest of them was sent; None if there are none.
    """

    def __init__(self, base: int, line: IrqLine, clock: Clock) -> None:
        self._base = base
        self._line = line
        self._clock = clock
        self.output = bytearray()
        self.first_unsent: float | None = None
        self._input: deque[int] = deque()
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._scratch = 0
        self._divisor = 0x000C
        self._overrun = False
        self._thr_interrupt = False
        self._modem = _MODEM_ON_LINE
        self._modem_changes = 0
        self._irq = False
        self._readers: tuple[Callable[[], int], ...] = (
            self._read_rbr,
            lambda: self._ier,
            self._read_iir,
            lambda: self._lcr,
            lambda: self._mcr,
            self._read_lsr,
            self._read_msr,
            lambda: self._scratch,
        )
        # LSR and MSR cannot be written.
        self._writers: dict[int, Callable[[int], None]] = {
            0: self._write_thr,
            1: self._write_ier,
            2: self._write_fcr,
            3: self._write_lcr,
            4: self._write_mcr,
            7: self._write_scratch,
        }

    def receive(self, data: bytes) -> None:
        """Bytes from the other end; they queue without limit, since the sender can be told to wait."""
        self._input.extend(data)
        self._update()

    def drain(self) -> bytes:
        """Takes the output."""
        data = bytes(self.output)
        self.output.clear()
        self.first_unsent = None
        return data

    # ------------------------------------------------------------------------------------------ interrupts

    def _source(self) -> int:
        """IIR bits 3:0 by the data sheet's order of priority."""
        if self._overrun and self._ier & Ier.LINE_STATUS.value:
            return _IIR_LINE
        if self._input and self._ier & Ier.RECEIVED.value:
            full = not self._fcr & 1 or len(self._input) >= _TRIGGERS[self._fcr >> 6]
            # Four character times without a read are over at once.
            return _IIR_DATA if full else _IIR_TIMEOUT
        if self._thr_interrupt and self._ier & Ier.THR_EMPTY.value:
            return _IIR_THR
        if self._modem_changes and self._ier & Ier.MODEM_STATUS.value:
            return _IIR_MODEM
        return _IIR_NONE

    def _update(self) -> None:
        asserted = self._source() != _IIR_NONE and bool(self._mcr & Mcr.OUT2.value)
        if asserted != self._irq:
            self._irq = asserted
            self._line(asserted)

    # ------------------------------------------------------------------------------------------ ports

    def read(self, port: int, _size: int) -> int:
        register = port - self._base
        if self._lcr & Lcr.DLAB.value and register < 2:
            return self._divisor >> 8 * register & 0xFF
        value = self._readers[register]()
        self._update()
        return value

    def _read_rbr(self) -> int:
        return self._input.popleft() if self._input else 0

    def _read_iir(self) -> int:
        source = self._source()
        if source == _IIR_THR:
            self._thr_interrupt = False
        return source | (_IIR_FIFO if self._fcr & 1 else 0)

    def _read_lsr(self) -> int:
        value = Lsr.THR_EMPTY.value | Lsr.IDLE.value
        if self._input:
            value |= Lsr.DATA_READY.value
        if self._overrun:
            value |= Lsr.OVERRUN.value
            self._overrun = False
        return value

    def _read_msr(self) -> int:
        value, self._modem_changes = self._modem | self._modem_changes, 0
        return value

    def write(self, port: int, _size: int, value: int) -> None:
        value &= 0xFF
        register = port - self._base
        if self._lcr & Lcr.DLAB.value and register < 2:
            shift = 8 * register
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
            return
        if writer := self._writers.get(register):
            writer(value)
            self._update()

    def _write_thr(self, value: int) -> None:
        self._thr_interrupt = True
        if self._mcr & Mcr.LOOP.value:
            if len(self._input) < (_FIFO_DEPTH if self._fcr & 1 else 1):
                self._input.append(value)
            else:
                self._overrun = True
            return
        if self.first_unsent is None:
            self.first_unsent = self._clock.now()
        self.output.append(value)

    def _write_ier(self, value: int) -> None:
        if value & ~self._ier & Ier.THR_EMPTY.value:
            self._thr_interrupt = True
        self._ier = value & 0x0F

    def _write_fcr(self, value: int) -> None:
        if value & 2 or (value ^ self._fcr) & 1:
            # Only what is in the receiver is lost; what still waits at the other end is not.
            for _ in range(min(len(self._input), _FIFO_DEPTH)):
                self._input.popleft()
        self._fcr = value & 0xC9 if value & 1 else 0

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F
        modem = _MODEM_ON_LINE
        if value & Mcr.LOOP.value:
            modem = sum(msr for mcr, msr in _LOOP_WIRES if value & mcr)
        changed = (modem ^ self._modem) >> 4
        # Ring indicator counts only when it ends.
        if changed & 4 and modem & 0x40:
            changed &= ~4
        self._modem, self._modem_changes = modem, self._modem_changes | changed

    def _write_scratch(self, value: int) -> None:
        self._scratch = value


class SerialPorts:
    """All UARTs of a machine, numbered from 0 (COM1)."""

    # Bytes of output after which the core should not wait any longer.
    FULL = 4096

    def __init__(self, uarts: list[Uart], guard: Guard) -> None:
        self._uarts = uarts
        self._guard = guard

    def receive(self, port: int, data: bytes) -> None:
        """Input for COM`port`+1. Raises IndexError if there is no such port."""
        if not 0 <= port < len(self._uarts):
            raise IndexError(f"serial port {port}")
        with self._guard:
            self._uarts[port].receive(data)

    def drain(self) -> list[vcpu_pb2.SerialOutput]:
        """Takes the output of all ports."""
        with self._guard:
            return [
                vcpu_pb2.SerialOutput(port=port, data=uart.drain())
                for port, uart in enumerate(self._uarts)
                if uart.output
            ]

    @property
    def first_unsent(self) -> float | None:
        """Clock.now() when the oldest byte that was not collected was sent."""
        return min((uart.first_unsent for uart in self._uarts if uart.first_unsent is not None), default=None)

    @property
    def unsent(self) -> int:
        """Bytes of output that were not collected."""
        return sum(len(uart.output) for uart in self._uarts)
