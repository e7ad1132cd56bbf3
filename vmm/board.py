"""What the exits of a machine act on: one generation of it, from a reset to the next.

All that a reset must forget hangs here and is built anew; Memory alone is kept, and zeroed. The board has no states and
no threads of its own: see vmm.machine.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vmm.connections import Connections
from vmm.devices.bus import PortBus
from vmm.devices.disk import Disk
from vmm.events import EventLog
from vmm.gate import Gate
from vmm.hyperv_msrs import SyntheticMsrs
from vmm.intercept_filter import Watched
from vmm.ledger import Ledger
from vmm.level import Level
from vmm.memory import WRITABLE, Memory
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1, PartitionVtl
from vtlab.errors import Refused
from vtlab.hyperv.msrs import PAGE_ENABLE, PAGE_NUMBER_SHIFT
from vtlab.hyperv.profiles import DEFAULT_PROFILE, VsmProfile
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import RegisterName, RegisterValue
from vtlab.v1.vcpu_pb2 import Enter, Exit, InterceptFilter, PageAccess, ProtectionUpdate, Resolution, StandDown, Update
from vtlab.v1.vmm_pb2 import MachineSpec, MachineState

if TYPE_CHECKING:
    from vmm.designs.design import Design
    from vmm.tracing import SwitchTracer

# Runs of a protection update that its event keeps; the first ones.
_EVENT_RUNS = 256
_PROTECTION = (vmm_pb2.EVENT_KIND_PROTECTION,)
# Switches between levels: they change nothing.
_PASSING = frozenset({"call", "return"})
_ALL = PageAccess(read=True, write=True, kernel_execute=True, user_execute=True)
# What lies below a hypercall page where VTL0 can see sealed memory: INT3, as the unused rest of a hypercall page.
_NOTHING_HIDDEN = b"\xcc" * PAGE_SIZE


class Ending(NamedTuple):
    """Why a vCPU is not entered again, and what becomes of the machine: STOPPED, FAILED, or RUNNING after a reset.

    UNSPECIFIED: the machine itself asked its threads to end. With `stand_down`, RUNNING is no reset: the kernel that
    VTL1 put into memory goes on.
    """

    state: MachineState.ValueType
    reason: str
    debug_exit: int | None = None
    stand_down: StandDown | None = None


# What handling an exit gives: the next enter, or the end.
Answer = Enter | Ending


def stopped(reason: str, debug_exit: int | None = None) -> Ending:
    return Ending(vmm_pb2.MACHINE_STATE_STOPPED, reason, debug_exit)


def failed(reason: str) -> Ending:
    return Ending(vmm_pb2.MACHINE_STATE_FAILED, reason)


def complete(value: int) -> Resolution:
    """The operation is done, with that result."""
    return Resolution(action=vcpu_pb2.ACTION_COMPLETE, value=value)


def register_update(name: RegisterName.ValueType, value: int) -> Update:
    return Update(register=RegisterValue(name=name, value=value))


def reset_wanted(spec: MachineSpec, reason: str) -> Ending:
    """A reset, or the end if the machine's owner prefers that."""
    return stopped(reason) if spec.stop_on_reset else Ending(vmm_pb2.MACHINE_STATE_RUNNING, reason)


def succeeded(stand_down: StandDown) -> Ending:
    """VTL1 gave the machine up to the next kernel."""
    return Ending(vmm_pb2.MACHINE_STATE_RUNNING, stand_down.reason, stand_down=stand_down)


@dataclass(slots=True)
class Board:
    """Attributes are named for what they are; `monitor` is None where the machine has no VTL1.

    `design` is how the guest may protect itself. `msrs` are VTL0's; `upper_msrs` are VTL1's where that is guest code,
    else None. `serving` is held while an exit is served: the vCPUs' threads change the rest of this one at a time.
    `over`: VTL1 stood down, no exit is served now. `tracer`: None where nothing is traced.
    `exits` counts those that were served, by reason.
    """

    vm: str
    spec: MachineSpec
    memory: Memory
    events: EventLog
    gate: Gate
    guest: Level
    monitor: Level | None
    vtl: PartitionVtl
    msrs: SyntheticMsrs
    ports: PortBus
    design: Design
    processors: list[Processor] = field(default_factory=list)
    connections: Connections = field(default_factory=Connections)
    profile: VsmProfile = DEFAULT_PROFILE
    upper_msrs: SyntheticMsrs | None = None
    disk: Disk | None = None
    serving: threading.RLock = field(default_factory=threading.RLock)
    over: bool = False
    ledger: Ledger = field(default_factory=Ledger)
    tracer: SwitchTracer | None = None
    exits: dict[str, int] = field(default_factory=Counter)

    @property
    def guest_code(self) -> bool:
        """VTL1 is code that VTL0 supplied; else a policy."""
        return self.upper_msrs is not None

    def watches(self, processor: Processor) -> bool:
        """VTL1 is there to judge that vCPU's exits: a policy for the whole machine, guest code where it was enabled."""
        if processor.vtl.enabled >> VTL1 & 1:
            return True
        return not self.guest_code and any(other.vtl.enabled >> VTL1 & 1 for other in self.processors)

    def msrs_of(self, vtl: int) -> SyntheticMsrs:
        """The synthetic MSRs of a level; only guest code has its own at VTL1."""
        return self.upper_msrs if vtl and self.upper_msrs is not None else self.msrs

    def level(self, vtl: int) -> Level:
        """Who runs a level. VTL1 must have been enabled."""
        if not vtl:
            return self.guest
        assert self.monitor is not None, "VTL1 was enabled without a monitor"
        return self.monitor

    def protect(self, updates: Sequence[ProtectionUpdate], *, reveal: bool = False) -> None:
        """Moves pages and changes their rights while no vCPU runs, and has the guest told before any runs again.

        Each update is a transaction of its own, after the pages were copied and before any copy is wiped. One that
        changes nothing is no event.

        Raises:
            BadArgument: see Memory.apply; what came before that update is done.
            Refused: VTL0's hypercall page hides what is sealed now.
            TimedOut: a vCPU does not stop.
        """
        with self.gate.none_inside():
            for update in updates:
                self.memory.apply(update, reveal=reveal, wipe=False)
                for processor in self.processors:
                    processor.post(Update(protection=update))
                    if self.guest_code:  # VTL1 has all rights, in the file where the page is now
                        moved = ProtectionUpdate(runs=update.runs, access=_ALL, store=update.store)
                        processor.post(Update(protection=moved), vtl=VTL1)
                if self.memory.changed:
                    self._record_protection(update)
                self.ledger.commit(self, _PROTECTION)
                self.memory.wipe()
                self._check_hypercall_page(update)

    def _check_hypercall_page(self, update: ProtectionUpdate) -> None:
        """VTL0 must run and read what was sealed, not the hypercall page that it laid over it before.

        Looked at when it is sealed: until then it may be changed. Guest code at VTL1 sees VTL0's MSR, and decides.
        """
        if self.guest_code or not self.msrs.hypercall & PAGE_ENABLE or not update.access.read:
            return
        page = self.msrs.hypercall >> PAGE_NUMBER_SHIFT
        covered = any(first <= page < first + count for first, count in zip(*[iter(update.runs)] * 2, strict=True))
        if not covered or self.memory.store(page) == WRITABLE:
            return
        if self.memory.read(page * PAGE_SIZE, PAGE_SIZE, VTL1) != _NOTHING_HIDDEN:
            gpa = page * PAGE_SIZE
            raise Refused(f"page {page:#x}", "VTL0's hypercall page hides what was sealed there", gpa=gpa)

    def _record_protection(self, update: ProtectionUpdate) -> None:
        kept = update
        if len(update.runs) > 2 * _EVENT_RUNS:
            kept = ProtectionUpdate(runs=update.runs[: 2 * _EVENT_RUNS], access=update.access, store=update.store)
        self.events.record(vmm_pb2.EVENT_KIND_PROTECTION, kept, weight=len(kept.runs) * 16)

    def commit(self, processor: Processor | None = None, answer: Answer | None = None) -> None:
        """Writes down what has changed, with the enter that follows from the exit of a vCPU. With `serving` held.

        Raises:
            InternalError: it cannot be written.
        """
        if processor is not None and isinstance(answer, Enter):
            processor.answers(answer)
        self.ledger.commit(self)

    def watch_all(self, filter_: InterceptFilter) -> None:
        """Has VTL0 of every vCPU run with that filter only, from now on; for designs without VTL1.

        Raises:
            TimedOut: a vCPU does not stop.
        """
        watched = Watched(filter_)
        with self.gate.none_inside():
            for processor in self.processors:
                processor.watched = watched
                processor.post(Update(intercepts=filter_))

    def post_all(self, update: Update, vtl: int = VTL0) -> None:
        """Adds an update to the next enter of that level on every vCPU."""
        for processor in self.processors:
            processor.post(update, vtl=vtl)

    def record_serial(self, processor: Processor, vtl: int, exit_: Exit) -> None:
        """The serial output that an exit carries."""
        for output in exit_.serial:
            self.events.record(
                vmm_pb2.EVENT_KIND_SERIAL, output, processor.index, vtl, exit_.sequence, weight=len(output.data)
            )

    def tell(self, vp_index: int, update: Update) -> None:
        """Gives an update to VTL0 of a vCPU as soon as can be: at once if it is outside, else it is made to exit.

        One that waits already is not added again, since interrupts, flags and flushes mean the same twice as once, and
        a guest could pile them up. Messages are each owed, and bounded by their senders' buffers.
        """
        processor = self.processors[vp_index]
        if update.HasField("synic_message"):
            processor.post(update)
        else:
            processor.post_once(update)
        self.gate.kick(vp_index)

    def log_vtl(self, processor: Processor, vtl: int, what: str, code: int = 0) -> None:
        self.events.record(
            vmm_pb2.EVENT_KIND_VTL, (what, code), processor.index, vtl, processor.resumed, lasting=what not in _PASSING
        )
