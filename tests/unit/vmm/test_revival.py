"""A machine whose VMM is gone, taken up again from the journal and from what its levels know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.vmm.fakes import FakeLevel, returns
from vmm.board import Board
from vmm.exits import serve
from vmm.images import ImageStore
from vmm.journal import Journal
from vmm.level import Level
from vmm.machine import Machine
from vmm.machines import Machines
from vmm.memory import PRIVATE, SEALED, Memory
from vmm.processor import Processor
from vtlab.errors import PeerUnavailable, VtlabError
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.journal_pb2 import VcpuRecord
from vtlab.v1.vcpu_pb2 import (
    BootImage,
    Enter,
    Exit,
    Halt,
    Kicked,
    MsrAccess,
    PageAccess,
    PortAccess,
    Protect,
    ProtectionUpdate,
    SerialOutput,
)
from vtlab.v1.vmm_pb2 import MachineSpec

RAM = 2 << 20
RUNNING, PAUSED = vmm_pb2.MACHINE_STATE_RUNNING, vmm_pb2.MACHINE_STATE_PAUSED
GUEST_OS_ID = 0x4000_0000
SEAL = ProtectionUpdate(runs=[3, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)


class Vmm:
    """One life after another of a VMM, with the same two levels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.levels = [FakeLevel(0), FakeLevel(1)]
        self.lives: list[Machines] = []
        self.away: VtlabError | None = None
        self.gone = False
        self.all_levels: list[FakeLevel] = []
        self.sha256, _ = ImageStore(folder / "images").add([b"\xf4"])

    def dial(self, vtl: int, *, present: bool = True) -> Level:
        if present and self.away:
            raise self.away
        return self.levels[vtl]

    def live(self) -> Machines:
        """A new one; the former is left as kill -9 leaves it, but that its threads wait for levels that are deaf."""
        fresh = [FakeLevel(0), FakeLevel(1)]
        for level, old in zip(fresh, self.levels, strict=True):
            level.entered = old.entered.copy()
            level.refuse_reconnect = self.away if self.gone else None
        self.levels = fresh
        self.all_levels += fresh
        self.lives.append(Machines(self.folder, self.dial, Journal(self.folder / "journal")))
        self.lives[-1].revive()
        return self.lives[-1]

    def create(self, **fields: object) -> Machine:
        machines = self.live()
        values = {"ram_size": RAM, "vp_count": 1, "vtl1": True, "image": BootImage(sha256=self.sha256)} | fields
        return machines.create("vm", MachineSpec(**values))  # type: ignore[arg-type]

    def again(self) -> Machine:
        return self.live().get("vm")


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[Vmm]:
    made = Vmm(tmp_path)
    yield made
    for level in made.all_levels:
        level.hang_up()
    for machines in made.lives[-1:]:
        for machine in machines.all():
            with suppress(VtlabError, OSError):
                machine.destroy()


def serial_of(machine: Machine) -> bytes:
    return b"".join(event.serial.data for event in machine.events.kept([vmm_pb2.EVENT_KIND_SERIAL]))


def msr_write(value: int) -> Exit:
    return Exit(msr=MsrAccess(index=GUEST_OS_ID, write=True, new_value=value))


MSR_READ = Exit(msr=MsrAccess(index=GUEST_OS_ID))


def test_an_exit_that_was_answered_is_not_served_again(vmm: Vmm) -> None:
    """The guest has seen the answer and runs: it is asked for the exit of its present enter."""
    machine = vmm.create()
    vmm.levels[0].say(msr_write(1 << 63))
    machine.start()
    vmm.levels[0].wait_entered(2)
    machine = vmm.again()
    assert machine.describe().state == RUNNING
    guest = vmm.levels[0]
    enters = guest.wait_entered(3)
    assert enters[2] == enters[1], "repeated, as it was"
    guest.say(MSR_READ)
    assert guest.wait_entered(4)[3].resolution.value == 1 << 63, "what the MSR was is known"


@pytest.mark.parametrize(("more", "state"), [(0, RUNNING), (1, vmm_pb2.MACHINE_STATE_FAILED)])
def test_a_journal_that_a_level_has_seen_more_of_is_not_acted_on(
    vmm: Vmm, more: int, state: vmm_pb2.MachineState.ValueType
) -> None:
    machine = vmm.create()
    vmm.levels[0].say(msr_write(1 << 63))
    machine.start()
    vmm.levels[0].wait_entered(2)
    vmm.levels[0].entered[-1].transactions += more
    found = vmm.again().describe()
    assert found.state == state
    assert ("the journal: is an old one" in found.reason) == bool(more)


def test_levels_that_are_being_restarted_too_are_no_reason_to_forget_it(vmm: Vmm) -> None:
    vmm.create().start()
    vmm.levels[0].wait_entered(1)
    vmm.away = PeerUnavailable("guest", "no such socket")
    assert vmm.again().describe().state == RUNNING


def test_a_level_that_stays_away_breaks_it_with_a_reason(vmm: Vmm) -> None:
    vmm.create().start()
    vmm.levels[0].wait_entered(1)
    vmm.away, vmm.gone = PeerUnavailable("guest", "no such socket"), True
    for _ in range(2):  # the second time the journal tells of it
        known = vmm.again().describe()
        assert known.state == vmm_pb2.MACHINE_STATE_FAILED
        assert known.reason == "cannot go on after the VMM's end: guest: no such socket"


def test_an_answer_that_was_not_sent_is_sent(vmm: Vmm) -> None:
    machine = vmm.create()
    output = Exit(port=PortAccess(port=0xE0, write=True, size=1, value=0x5A), serial=[SerialOutput(data=b"once")])
    vmm.levels[0].say(output)
    machine.start()
    answer = vmm.levels[0].wait_entered(2)[1]
    vmm.levels[0].entered.pop()  # it was lost on the way
    machine = vmm.again()
    sent = vmm.levels[0].wait_entered(2)[1]
    assert sent.transactions > answer.transactions
    sent.transactions = answer.transactions
    assert sent == answer
    assert serial_of(machine) == b"once"


def test_an_exit_that_changed_nothing_is_served_again(vmm: Vmm) -> None:
    machine = vmm.create()
    vmm.levels[0].say(MSR_READ)
    machine.start()
    vmm.levels[0].wait_entered(2)
    vmm.levels[0].entered.pop()
    vmm.again()
    guest = vmm.levels[0]
    enters = guest.wait_entered(2)
    assert enters[1] == enters[0], "the guest holds the exit and gives it again"
    guest.say(MSR_READ)
    assert guest.wait_entered(3)[2].sequence == 2


def test_vtl1_is_asked_once(board: Board, processor: Processor, monitor: FakeLevel) -> None:
    """What VTL1 was doing about an exit when the VMM died is taken up when the exit is served again."""
    exit_ = Exit(sequence=4, register_write=vcpu_pb2.RegisterWrite())
    before = Enter(sequence=9, reason=vcpu_pb2.ENTER_REASON_RESUME, cause=4)
    processor.reconnect(Enter(sequence=4), before)
    board.gate.leave(0)
    processor.vtl.enabled |= 2
    monitor.say(Exit(protect=Protect(protections=[SEAL])), returns(), returns())
    serve(board, processor, exit_)
    assert [enter.sequence for enter in monitor.entered] == [9, 10]
    assert monitor.entered[0] == before
    assert monitor.entered[1].reason == vcpu_pb2.ENTER_REASON_RESUME
    assert board.memory.store(3) == SEALED
    serve(board, processor, Exit(sequence=5, register_write=vcpu_pb2.RegisterWrite()))
    assert (monitor.entered[2].sequence, monitor.entered[2].cause) == (11, 5), "another exit is another cause"


@pytest.mark.parametrize("state", [RUNNING, PAUSED])
def test_a_level_that_was_started_anew_is_a_reset(vmm: Vmm, state: vmm_pb2.MachineState.ValueType) -> None:
    machine = vmm.create()
    machine.start()
    if state == PAUSED:
        machine.pause()
    live = vmm.live

    def lose() -> Machines:
        original = FakeLevel.__init__

        def lost(self: FakeLevel, vtl: int, log: list[str] | None = None) -> None:
            original(self, vtl, log)
            self.lost = vtl == 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeLevel, "__init__", lost)
            return live()

    machine = lose().get("vm")
    described = machine.describe()
    assert (described.state, described.generation) == (state, 2), "what was paused waits on"
    assert "is lost" in described.reason
    reasons = [event.state.reason for event in machine.events.kept([vmm_pb2.EVENT_KIND_STATE])]
    assert "is lost" in reasons[-1]


def test_a_machine_that_was_destroyed_stays_so(vmm: Vmm) -> None:
    vmm.create()
    vmm.lives[-1].destroy("vm")
    assert vmm.live().all() == []


def test_records_that_make_no_machine_are_forgotten(vmm: Vmm) -> None:
    vmm.create()
    Journal(vmm.folder / "journal").write("vm", {"vcpu/0": b"\xff\xff"})
    assert vmm.live().all() == []
    assert Journal(vmm.folder / "journal").machines() == []


# ------------------------------------------------------------------------------------------------------------ memory


def pages(memory: Memory) -> bytes:
    return memory.read(0x3000, 0x1000, vtl=1)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("store", [SEALED, PRIVATE])
def test_a_move_of_pages_is_done_or_not_begun(tmp_path: Path, committed: bool, store: int) -> None:
    """The VMM dies after it has copied a page: the page is where the journal says, with what it had."""
    memory = Memory(tmp_path, RAM, lambda _pages: None)
    memory.write(0x3000, b"text")
    named = {SEALED: vcpu_pb2.PAGE_STORE_SEALED, PRIVATE: vcpu_pb2.PAGE_STORE_PRIVATE}[store]
    update = ProtectionUpdate(runs=[3, 1], access=PageAccess(read=store == SEALED), store=named)
    memory.apply(update, wipe=False)
    records = memory.take_records() if committed else {}
    again = Memory.reopened(tmp_path, RAM, lambda _pages: None, records)
    assert again.store(3) == (store if committed else 0)
    assert pages(again).startswith(b"text")
    if committed and store == PRIVATE:
        for name in ("ram.rw", "ram.ro"):
            assert not any((tmp_path / name).read_bytes()[0x3000:0x4000]), "wiped after all"
    again.apply(update)
    assert pages(again).startswith(b"text")


def test_rights_come_back(tmp_path: Path) -> None:
    memory = Memory(tmp_path, RAM, lambda _pages: None)
    memory.apply(SEAL)
    memory.apply(ProtectionUpdate(runs=[100, 7, 300, 1], access=PageAccess(), store=vcpu_pb2.PAGE_STORE_PRIVATE))
    again = Memory.reopened(tmp_path, RAM, lambda _pages: None, memory.take_records())
    assert (again._store, again._rights) == (memory._store, memory._rights)
    assert not again.changed


# ------------------------------------------------------------------------------------------ what costs a transaction


@pytest.mark.parametrize(
    "exit_",
    [
        MSR_READ,
        Exit(kicked=Kicked()),
        Exit(halt=Halt(interrupts_enabled=True)),
        Exit(port=PortAccess(port=0x80, write=True, size=1, value=1)),
        Exit(cpuid=vcpu_pb2.Cpuid(leaf=0x40000003)),
    ],
)
def test_an_exit_without_consequences_costs_no_transaction(
    vmm: Vmm, exit_: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = vmm.create()
    vmm.levels[0].say(MSR_READ)
    machine.start()
    vmm.levels[0].wait_entered(2)
    before = _snapshot(machine)
    written: list[object] = []

    def write(_journal: Journal, *arguments: object) -> None:
        written.append(arguments)

    monkeypatch.setattr(Journal, "write", write)
    vmm.levels[0].say(exit_, exit_, exit_)
    vmm.levels[0].wait_entered(5)
    assert written == []
    assert _snapshot(machine) == before, "it had none"


def _snapshot(machine: Machine) -> list[bytes]:
    """All that the journal would keep but the numbers of enters."""
    board = machine._board
    records = []
    for processor in board.processors:
        record = VcpuRecord.FromString(processor.record())
        record.ClearField("answer")
        records.append(record.SerializeToString())
    return [*records, *(device.save() for device in board.ports.devices), board.connections.save()]
