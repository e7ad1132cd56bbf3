"""The machines of a VMM by name, and who serves their levels."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from vmm import designs
from vmm.devices import optional
from vmm.devices.disk import MAX_SIZE as MAX_DISK
from vmm.events import CAPACITY, LARGE_CAPACITY, LARGE_WEIGHT, WEIGHT, EventLog
from vmm.images import ImageStore
from vmm.journal import Journal
from vmm.ledger import Ledger
from vmm.level import Level
from vmm.machine import Machine
from vmm.past import Past
from vmm.tracing import SwitchTracer
from vtlab.errors import AlreadyExists, BadArgument, LimitExceeded, NotFound, VtlabError
from vtlab.hyperv.profiles import PROFILES
from vtlab.ram import MACHINES, PAGE_SIZE, create_stores, remove_machine
from vtlab.v1.vcpu_pb2 import PERSONALITY_GUEST_CODE
from vtlab.v1.vmm_pb2 import MachineSpec

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
RAM_GRANULE = 2 << 20
MAX_RAM = 64 << 30
MAX_VP_COUNT = 16


class Dial(Protocol):
    """Gives the processes that serve a machine's levels."""

    def __call__(self, vtl: int, *, present: bool = True) -> Level:
        """A level that nobody uses yet.

        Args:
            vtl: 0 or 1.
            present: it must answer; else it may be away for a restart, and who uses it waits.

        Raises:
            PeerUnavailable: it does not answer.
            Unsupported: there is none for that VTL.
        """


class Machines:
    """All machines of a VMM: one, since a guest process and a monitor serve one at a time. Thread-safe."""

    def __init__(self, directory: Path, dial: Dial, journal: Journal, tracer: SwitchTracer | None = None) -> None:
        """:param directory: holds the images and one folder a machine; `tracer` is of their VTL switches."""
        self._tracer = tracer
        self.images = ImageStore(directory / "images")
        create_stores(directory)
        self._state = directory
        self._directory = directory / MACHINES
        self._dial = dial
        self._machines: dict[str, Machine] = {}
        self._creating: str | None = None
        self._lock = threading.Lock()
        self._journal = journal
        self._numbers = journal.numbers()

    def revive(self) -> None:
        """Goes on with the machines of a VMM that died. One whose memory or records are gone is forgotten."""
        for vm in self._journal.machines():
            try:
                self._revive(vm)
            except (VtlabError, OSError, ValueError) as error:
                _log.error("machine %s cannot be revived and is forgotten: %s", vm, error, extra={"vm": vm})
                self._journal.forget(vm)

    def _revive(self, vm: str) -> None:
        past = Past(self._journal, vm)
        guest = self._dial(0, present=False)  # the levels may have died with the VMM
        monitor = self._dial(1, present=False) if past.machine.machine.spec.vtl1 else None
        ledger = Ledger(self._journal, vm, past.transactions)
        events = EventLog(vm, self._numbers, on_staged=ledger.touch, kept=past.events)
        self._machines[vm] = Machine.revived(past, self._directory / vm, guest, monitor, events, ledger, self._tracer)

    def create(self, vm: str, spec: MachineSpec) -> Machine:
        """Raises AlreadyExists, BadArgument, LimitExceeded, and what Machine() raises."""
        check_spec(vm, spec)
        with self._lock:
            if vm in self._machines or vm == self._creating:
                raise AlreadyExists(f"machine '{vm}'", "the name is taken")
            other = next(iter(self._machines), self._creating)
            if other is not None:
                raise LimitExceeded(f"machine '{vm}'", f"the levels serve machine '{other}'; destroy it first", limit=1)
            self._creating = vm
        try:
            guest = self._dial(0)
            monitor = self._dial(1) if spec.vtl1 else None
            self._clear_leftovers([guest, monitor] if monitor else [guest])
            folder = self._directory / vm
            ledger = Ledger(self._journal, vm)
            # A machine whose runs repeat is there to be looked at: its readers may lag behind further.
            capacity, weight = (LARGE_CAPACITY, LARGE_WEIGHT) if spec.deterministic else (CAPACITY, WEIGHT)
            events = EventLog(vm, self._numbers, capacity, weight, on_staged=ledger.touch)
            machine = Machine(vm, spec, folder, self.images, guest, monitor, events, ledger, self._state, self._tracer)
            with self._lock:
                self._machines[vm] = machine
        finally:
            with self._lock:
                self._creating = None
        return machine

    def _clear_leftovers(self, levels: list[Level]) -> None:
        """A VMM that was killed leaves a folder; the levels let go of the machine that it names."""
        for folder in self._directory.iterdir():
            for level in levels:
                with suppress(VtlabError):
                    level.detach(folder.name)
            remove_machine(folder)

    def get(self, vm: str) -> Machine:
        """Raises NotFound."""
        with self._lock:
            machine = self._machines.get(vm)
        if machine is None:
            raise NotFound(f"machine '{vm}'", "does not exist")
        return machine

    def all(self) -> list[Machine]:
        with self._lock:
            return list(self._machines.values())

    def destroy(self, vm: str) -> None:
        """Raises NotFound."""
        self.get(vm).destroy()
        with self._lock:
            self._machines.pop(vm, None)

    def drain(self) -> None:
        """Stops all machines where they can go on, for the VMM that takes this one's place."""
        threads = [threading.Thread(target=machine.drain, name=f"{machine.vm}-drain") for machine in self.all()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """Destroys all machines: nothing of them outlives the VMM."""
        for machine in self.all():
            self.destroy(machine.vm)


def check_spec(vm: str, spec: MachineSpec) -> None:
    """Raises BadArgument that names the field at fault."""
    checks: tuple[tuple[str, Callable[[], bool], str], ...] = (
        ("vm", lambda: bool(_NAME.fullmatch(vm)), "1 to 63 letters, digits, dots, dashes or underscores"),
        ("spec.ram_size", lambda: 0 < spec.ram_size <= MAX_RAM, f"1 to {MAX_RAM} bytes"),
        ("spec.ram_size", lambda: spec.ram_size % RAM_GRANULE == 0, "a multiple of 2 MiB"),
        ("spec.disk_size", lambda: spec.disk_size <= MAX_DISK, f"0 to {MAX_DISK} bytes"),
        ("spec.disk_size", lambda: spec.disk_size % PAGE_SIZE == 0, f"a multiple of {PAGE_SIZE}"),
        ("spec.vp_count", lambda: 0 < spec.vp_count <= MAX_VP_COUNT, f"1 to {MAX_VP_COUNT}"),
        ("spec.vsm_profile", lambda: spec.vsm_profile in ("", *PROFILES), " or ".join(PROFILES)),
        ("spec.design", lambda: spec.design in ("", *designs.NAMES), " or ".join(designs.NAMES)),
        ("spec.vtl1", lambda: not spec.vtl1 or spec.design in ("", designs.DEFAULT), "false with that design"),
        (
            "spec.deterministic",
            lambda: not spec.deterministic or spec.personality != PERSONALITY_GUEST_CODE,
            "false where VTL1 is guest code: two processes take turns by the host's time",
        ),
        ("spec.seed", lambda: spec.deterministic or not spec.seed, "0 without spec.deterministic"),
        ("spec.personality", lambda: spec.vtl1 or spec.personality != PERSONALITY_GUEST_CODE, "a policy without VTL1"),
    )
    for field, holds, wanted in checks:
        if not holds():
            raise BadArgument(field, f"must be {wanted}")
    optional.check(spec.devices)
    designs.create(spec)
