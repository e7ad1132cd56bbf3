"""Checks the guest's work from outside: what must hold after every fault, whoever died.

Taken from memory, registers and the log alone. After a RESET, which only the guest process's death may cause, the
guest begins anew and is guarded again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.chaos import guest
from vmm.chaos.guest import Status
from vtlab.client import Lab, Machine
from vtlab.errors import PeerUnavailable, Refused, TimedOut, VtlabError
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import IMAGE_FORMAT_FLAT, START_MODE_LONG
from vtlab.x86.registers import Cr0, Cr4, Msr

RAM = 16 << 20
# Seconds for the guest to boot, or to make progress after a fault; an unloaded machine needs tenths of one.
PATIENCE = 180.0
_INTERVAL = 0.02
_LINE = re.compile(r"N([0-9a-f]{8})\n")


@dataclass
class Findings:
    """What was seen that must not be.

    Attributes:
        lost, doubled: exits, bytes or events that took effect not at all, or more than once.
        windows: forbidden operations that succeeded.
        resets: RESETs, with their reasons.
        problems: all of it in words.
    """

    lost: int = 0
    doubled: int = 0
    windows: int = 0
    resets: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def find(self, kind: str, what: str, count: int = 1) -> None:
        """`kind` is lost, doubled or windows."""
        setattr(self, kind, getattr(self, kind) + count)
        self.problems.append(f"{kind}: {what}")

    @property
    def good(self) -> bool:
        return not (self.lost or self.doubled or self.windows)


class Observer:
    """Of one machine that runs the chaos guest.

    Attributes:
        findings: so far.
        machine: destroyed by close().
    """

    def __init__(self, lab: Lab, processors: int, on_ready: Callable[[], object] = lambda: None) -> None:
        """Makes the machine, starts and guards it. Raises what the client raises.

        Args:
            on_ready: called when the guest has booted, before each guarding.
        """
        self._on_ready = on_ready
        self.findings = Findings()
        self._lab = lab
        self._processors = processors
        self.machine: Machine = lab.create(
            guest.image(processors),
            ram=RAM,
            vp_count=processors,
            image_format=IMAGE_FORMAT_FLAT,
            load_address=guest.LOAD,
            entry=guest.LOAD,
            start_mode=START_MODE_LONG,
        )
        lab.policy.set(self.machine, guest.POLICY)
        self._generation = 1
        self._boots = 0
        # Of one boot after the other: what was read is not searched again.
        self._boot_log = self.machine.serial_reader(0)
        self._known: list[Status] = []
        self._logged = [0, 0]
        self.machine.start()
        self._begin()

    def close(self) -> None:
        self.machine.destroy()

    def _begin(self) -> None:
        """The guest boots, and is guarded before it attempts anything."""
        self._boots += 1
        self._boot_log.read_until(f"{guest.READY}\n", PATIENCE)
        self._on_ready()
        self._guard()
        self.machine.write_memory(guest.GO, b"\x01")
        self._known = [Status(0, 0, 0, 0, 0, 0, 0, 0)] * self._processors
        self._logged = [0, 0]

    def _guard(self) -> None:
        """A VMM that dies meanwhile finishes it when it is back, or had not begun."""
        while not self.machine.info().vtl1_enabled:
            try:
                self.machine.guard()
            except PeerUnavailable:
                continue

    def state(self) -> str:
        """Of the machine, in words, or why there is none."""
        try:
            machine = self.machine.info()
        except VtlabError as error:
            return str(error)
        return f"{vmm_pb2.MachineState.Name(machine.state)} {machine.reason}"

    def statuses(self) -> list[Status]:
        """Of every vCPU, now."""
        pages = [guest.STATUS + vp * guest.STATUS_SIZE for vp in range(self._processors)]
        return [Status.decode(self.machine.read_memory(page, 64)) for page in pages]

    def wait_progress(self, rounds: int = 1, patience: float = PATIENCE) -> float:
        """Waits until every vCPU has done so many more rounds; returns the seconds that it took.

        Raises:
            TimedOut: one stands still. Lost is found then.
        """
        started = time.monotonic()
        before = [status.rounds for status in self.statuses()]

        def all_moved() -> bool:
            if self._was_reset():
                before[:] = [0] * self._processors
            return all(now.rounds >= then + rounds for now, then in zip(self.statuses(), before, strict=True))

        while not all_moved():
            if time.monotonic() > started + patience:
                state = self.state()
                self.findings.find("lost", f"no progress within {patience:g} s; {state}")
                raise TimedOut("chaos guest", f"makes no progress; {state}", seconds=patience)
            time.sleep(_INTERVAL)
        return time.monotonic() - started

    def wait_reset(self, count: int) -> None:
        """Waits until there were so many RESETs. Raises TimedOut; lost is found then."""
        deadline = time.monotonic() + PATIENCE
        while len(self.findings.resets) < count:
            if not self._was_reset() and time.monotonic() > deadline:
                self.findings.find("lost", f"no RESET within {PATIENCE:g} s of the guest's death")
                raise TimedOut("chaos guest", "its process died and it was not reset", seconds=PATIENCE)
            time.sleep(_INTERVAL)

    def _was_reset(self) -> bool:
        machine = self.machine.info()
        if machine.generation == self._generation:
            return False
        for _ in range(machine.generation - self._generation):
            self.findings.resets.append(machine.reason)
        self._generation = machine.generation
        self._begin()
        return True

    def check(self) -> None:
        """Compares everything with what it must be."""
        self._was_reset()
        for vp_index, (now, known) in enumerate(zip(self.statuses(), self._known, strict=True)):
            hash_ = self._check_chain(vp_index, now, known)
            if now.windows > known.windows:
                kinds = ", ".join(text for bit, text in enumerate(guest.KINDS) if now.kinds >> bit & 1)
                self.findings.find("windows", f"vCPU {vp_index}: {kinds}", now.windows - known.windows)
            if now.doubled > known.doubled:
                text = f"vCPU {vp_index}: an exit took effect not exactly once"
                self.findings.find("doubled", text, now.doubled - known.doubled)
            self._known[vp_index] = now._replace(hash=hash_)
        self._check_memory()
        for vp_index in range(self._processors):
            self._check_registers(vp_index)
        for port in range(min(self._processors, 2)):
            self._check_log(port)

    def _check_chain(self, vp_index: int, now: Status, known: Status) -> int:
        """The hash tells of every round since the last look; it is stored before its count. Returns what it must be."""
        value = known.hash
        if now.rounds < known.rounds:
            self.findings.find("lost", f"vCPU {vp_index} counts {now.rounds} after {known.rounds}")
            return now.hash
        for count in range(known.rounds + 1, now.rounds + 1):
            value = guest.following(value, count)
        if now.hash not in (value, guest.following(value, now.rounds + 1)):
            self.findings.find("lost", f"vCPU {vp_index}: the hash after {now.rounds} rounds is not theirs")
        return value

    def _check_memory(self) -> None:
        sealed = self.machine.read_memory(guest.SEALED, guest.PAGE)
        if sealed != guest.SEALED_PATTERN:
            self.findings.find("windows", "the sealed page has changed")
        try:
            self.machine.read_memory(guest.PRIVATE, 8)
        except Refused:
            return
        self.findings.find("windows", "VTL1's page can be read with VTL0's rights")

    def _check_registers(self, vp_index: int) -> None:
        state = self.machine.registers(vp_index)
        registers = state.registers
        lstar = next((item.value for item in state.msrs if item.index == Msr.LSTAR), 0)
        checks: tuple[tuple[Callable[[], bool], str], ...] = (
            (lambda: bool(registers.cr4 & Cr4.SMEP), "CR4.SMEP is clear"),
            (lambda: bool(registers.cr0 & Cr0.WP), "CR0.WP is clear"),
            (lambda: not lstar, f"LSTAR is {lstar:#x}"),
            (lambda: guest.LOAD <= state.idtr.base < guest.LOAD + guest.PAGE, f"IDTR is {state.idtr.base:#x}"),
        )
        for holds, otherwise in checks:
            if not holds():
                self.findings.find("windows", f"vCPU {vp_index}: {otherwise}")

    def _check_log(self, port: int) -> None:
        """Every line once, in order, since the guest booted last."""
        text = self.machine.serial(port)
        if port == 0:
            text = text[text.rfind(guest.READY) :]
        elif self._boots > 1:
            text = text[text.rfind(guest.log_line(0)) :]
        numbers = [int(number, 16) for number in _LINE.findall(text)]
        expected = self._logged[port]
        for number in numbers[expected:]:
            if number > expected:
                self.findings.find("lost", f"COM{port + 1}: line {expected} is missing", number - expected)
            elif number < expected:
                self.findings.find("doubled", f"COM{port + 1}: line {number} came again")
            expected = number + 1
        self._logged[port] = len(numbers)
