"""The vulnerable driver of the guest kernel selfguard, and the kernel's own services, by its command lines on COM2.

vtl0_guest/kernels/selfguard/README.md has the table of commands. One driver object per machine: answers belong to the
commands in order.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vtlab.client.serial import Pattern, SerialReader, read_first
from vtlab.x86.registers import Vector

if TYPE_CHECKING:
    from vtlab.client.machine import Machine

READY = "selfguard: ready"
COMMAND_PORT = 1  # COM2
BATCH_BYTES = 2048  # typed ahead; the guest's own buffer holds 4096
ANSWER_TIMEOUT = 60.0  # seconds

_FAULT = re.compile(r"fault vector=(\d+) error=(0x[0-9a-f]+) rip=(0x[0-9a-f]+) cr2=(0x[0-9a-f]+)")
_ERROR = re.compile(r"error errno=(\d+)")


class GuestFault(Exception):
    """The operation took an exception inside the guest and ended there; the guest lives on.

    Attributes:
        vector: of the exception.
        error_code: as the processor pushed it, 0 for vectors without one.
        rip: of the instruction.
        cr2: the linear address of a #PF, else 0.
    """

    def __init__(self, vector: int, error_code: int, rip: int, cr2: int) -> None:
        super().__init__(vector, error_code, rip, cr2)
        self.vector = vector
        self.error_code = error_code
        self.rip = rip
        self.cr2 = cr2

    def __str__(self) -> str:
        name = f"#{Vector(self.vector).name}" if self.vector in set(Vector) else f"vector {self.vector}"
        where = f" on {self.cr2:#x}" if self.vector == Vector.PF else ""
        return f"{name}({self.error_code:#x}){where} at {self.rip:#x}"


class GuestRefusal(Exception):
    """The guest kernel, or VTL1 behind it, said no.

    Attributes:
        number: errno, positive.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"-{errno.errorcode.get(self.number, str(self.number))}"


def parse(answer: str) -> int:
    """The value of an answer line. Raises GuestFault, GuestRefusal, ValueError for a line that is no answer."""
    if answer.startswith("ok 0x"):
        return int(answer[3:], 16)
    if match := _FAULT.fullmatch(answer):
        vector, *numbers = match.groups()
        raise GuestFault(int(vector), *(int(number, 16) for number in numbers))
    if match := _ERROR.fullmatch(answer):
        raise GuestRefusal(int(match[1]))
    raise ValueError(f"not an answer of the driver: {answer!r}")


class Driver:
    """Drives the guest of one machine, which must have said READY or be about to."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._answers = machine.serial_reader(COMMAND_PORT, from_now=True)

    def command(self, line: str, timeout: float = ANSWER_TIMEOUT) -> str:
        """One command line, its answer line."""
        return self.commands([line], timeout)[0]

    def command_unless(
        self, line: str, log: SerialReader, ending: Pattern, timeout: float = ANSWER_TIMEOUT
    ) -> str | None:
        """One command line, its answer line; None if `log` says `ending` first, since the guest did not survive it."""
        self.machine.write_serial(COMMAND_PORT, f"{line}\n")
        came, said = read_first([(self._answers, "\n"), (log, ending)], timeout)
        return None if came else said.rstrip()

    def commands(self, lines: Sequence[str], timeout: float = ANSWER_TIMEOUT) -> list[str]:
        """Many command lines, typed ahead of their answers."""
        answers: list[str] = []
        pending: list[str] = []
        for line in [*lines, None]:
            if pending and (line is None or sum(map(len, pending)) + len(line) > BATCH_BYTES):
                self.machine.write_serial(COMMAND_PORT, "".join(f"{text}\n" for text in pending))
                answers += [self._answers.read_line(timeout) for _ in pending]
                pending = []
            if line is not None:
                pending.append(line)
        return answers

    def ping(self) -> None:
        """Returns when the guest answers. Raises TimedOut, WrongState."""
        if (answer := self.command("ping")) != "ok pong":
            raise ValueError(f"not an answer to ping: {answer!r}")

    def ticks(self) -> int:
        """Timer interrupts that the guest has taken."""
        return parse(self.command("ticks"))

    # ------------------------------------------------------------------------------------- the vulnerable driver

    def read(self, address: int, size: int = 8) -> int:
        """1 to 8 bytes at a kernel address, read at CPL0. Raises GuestFault."""
        return parse(self.command(f"read {address:#x} {size}"))

    def write(self, address: int, value: int, size: int = 8) -> None:
        """1 to 8 bytes at a kernel address, written at CPL0. Raises GuestFault."""
        parse(self.command(f"write {address:#x} {size} {value:#x}"))

    def write_bytes(self, address: int, data: bytes) -> None:
        """Any number of bytes, in pieces of 8. Raises the first GuestFault."""
        pieces = [(address + start, data[start : start + 8]) for start in range(0, len(data), 8)]
        lines = [f"write {at:#x} {len(piece)} {int.from_bytes(piece, 'little'):#x}" for at, piece in pieces]
        for answer in self.commands(lines):
            parse(answer)

    def copy(self, to: int, source: int, size: int) -> None:
        """Memory to memory, at CPL0. Raises GuestFault."""
        parse(self.command(f"copy {to:#x} {source:#x} {size}"))

    def call(self, address: int, *arguments: int) -> int:
        """Calls at CPL0 with RDI RSI RDX RCX R8 R9, and RAX = RDI; returns RAX. Raises GuestFault."""
        return parse(self.command(" ".join(["call", hex(address), *map(hex, arguments)])))

    def call_on(self, cpu: int, address: int, *arguments: int) -> int:
        """As `call`, on another vCPU. Raises GuestFault, GuestRefusal (it is offline)."""
        return parse(self.command(" ".join(["on", str(cpu), "call", hex(address), *map(hex, arguments)])))

    def read_on(self, cpu: int, address: int, size: int = 8) -> int:
        """As `read`, on another vCPU. Raises GuestFault, GuestRefusal (it is offline)."""
        return parse(self.command(f"on {cpu} read {address:#x} {size}"))

    def user(self, address: int, argument: int = 0) -> int:
        """Calls at CPL3. Raises GuestFault."""
        return parse(self.command(f"user {address:#x} {argument:#x}"))

    # ------------------------------------------------------------------------------------ the kernel's own services

    def control(self, number: int, value: int) -> None:
        """Writes CR0 or CR4 the kernel's way. Raises GuestFault, GuestRefusal."""
        parse(self.command(f"control {number} {value:#x}"))

    def map(self, address: int, physical: int, flags: int) -> None:
        """Sets the entry of one kernel page the kernel's way; flags 0 unmap it. Raises GuestFault, GuestRefusal."""
        parse(self.command(f"map {address:#x} {physical:#x} {flags:#x}"))

    def patch(self, address: int, code: bytes) -> None:
        """Changes kernel text the kernel's way. Raises GuestFault, GuestRefusal."""
        parse(self.command(f"patch {address:#x} {code.hex()}"))

    def module(self, name: str) -> int:
        """Loads a boot module; returns what its entry returned. Raises GuestFault, GuestRefusal."""
        return parse(self.command(f"module {name}"))

    def vtl(self, service: int, a: int = 0, b: int = 0, c: int = 0) -> int:
        """A VTL call. Raises GuestFault, GuestRefusal."""
        return parse(self.command(f"vtl {int(service):#x} {a:#x} {b:#x} {c:#x}"))

    def cpu_offline(self, cpu: int) -> None:
        """Takes a vCPU offline: it halts for good. Raises GuestRefusal."""
        parse(self.command(f"cpu offline {cpu}"))

    def cpu_online(self, cpu: int) -> None:
        """Brings a vCPU online by INIT and SIPI. Raises GuestRefusal, GuestFault (a message was refused)."""
        parse(self.command(f"cpu online {cpu}"))

    def smi(self, command: int, value: int = 0, address: int = 0) -> int:
        """An SMI; returns how many there have been. Raises GuestRefusal if no handler is installed."""
        return parse(self.command(f"smi {command} {value:#x} {address:#x}"))

    def sleep(self, state: int, ticks: int) -> int:
        """Suspends the machine for so many timer interrupts: to idle (0) or to RAM (3). Raises GuestRefusal."""
        return parse(self.command(f"sleep {state} {ticks}"))

    def hypercall(self, control: int, rdx: int = 0, r8: int = 0) -> int:
        """A hypercall through the hypercall page; returns RAX (status in bits 15:0). Raises GuestFault."""
        return parse(self.command(f"hypercall {control:#x} {rdx:#x} {r8:#x}"))
