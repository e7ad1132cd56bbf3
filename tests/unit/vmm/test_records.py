"""Records of the journal are made anew exactly when something in them has changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.vmm.fakes import FakeLevel
from vmm import plain
from vmm.connections import Connections, EventPort, MessagePort
from vmm.gate import Gate
from vmm.intercept_filter import Watched
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1, PartitionVtl, VpVtl
from vtlab.v1.journal_pb2 import VcpuRecord
from vtlab.v1.registers_pb2 import REGISTER_NAME_RIP, RegisterValue
from vtlab.v1.vcpu_pb2 import ACTION_COMMIT, Enter, InterceptFilter, Resolution, Update

RIP = Update(register=RegisterValue(name=REGISTER_NAME_RIP, value=1))


class Vcpu:
    """One that nobody runs."""

    def __init__(self) -> None:
        self.gate = Gate(1, lambda _vp, _sequence: None)
        self.processor = Processor(0, FakeLevel(0), FakeLevel(1), self.gate, VpVtl())

    def record(self) -> VcpuRecord:
        return VcpuRecord.FromString(self.processor.record())


def set_field(name: str, value: object) -> Callable[[Vcpu], None]:
    return lambda vcpu: setattr(vcpu.processor.vtl, name, value)


CHANGES: dict[str, Callable[[Vcpu], object]] = {
    **{name: set_field(name, 7) for name in ("enabled", "active", "secure_config", "vina", "lower_waits")},
    **{name: set_field(name, True) for name in ("started", "starts_above")},
    "assist_page": lambda vcpu: vcpu.processor.vtl.assist_page.__setitem__(1, 0x1000),
    "cr_intercepts": lambda vcpu: vcpu.processor.vtl.cr_intercepts.__setitem__(5, 6),
    "ports": lambda vcpu: vcpu.processor.vtl.ports.add(0x80),
    "watched": lambda vcpu: setattr(vcpu.processor, "watched", Watched(InterceptFilter(cr0_mask=1))),
    "suspended": lambda vcpu: vcpu.processor.suspended.__setitem__(VTL0, Resolution(action=ACTION_COMMIT)),
    "suspended above": lambda vcpu: vcpu.processor.suspended.__setitem__(VTL1, Resolution(action=ACTION_COMMIT)),
    "post": lambda vcpu: vcpu.processor.post(RIP),
    "post once": lambda vcpu: vcpu.processor.post_once(RIP),
    "post latest": lambda vcpu: vcpu.processor.post_latest(RIP),
    "post above": lambda vcpu: vcpu.processor.post(RIP, vtl=VTL1),
    "halt": lambda vcpu: vcpu.gate.halt(0),
    "answer": lambda vcpu: vcpu.processor.answers(Enter(sequence=4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_in_the_next_record(change: str) -> None:
    vcpu = Vcpu()
    before = vcpu.record()
    CHANGES[change](vcpu)
    after = vcpu.record()
    assert after != before
    twin = Vcpu()  # it has never made a record before
    CHANGES[change](twin)
    assert after == twin.record()


def test_what_was_sent_waits_no_more() -> None:
    vcpu = Vcpu()
    vcpu.processor.post(RIP)
    assert list(vcpu.record().pending) == [RIP]
    vcpu.processor.answers(Enter(sequence=1))
    assert not vcpu.record().pending
    assert list(vcpu.record().answer.updates) == [RIP]


def test_the_same_again_is_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = Vcpu()
    first = vcpu.processor.record()
    monkeypatch.setattr(plain, "dump", lambda _state: pytest.fail("made anew"))
    vcpu.processor.answers(Enter(sequence=1))
    assert VcpuRecord.FromString(vcpu.processor.record()).vtl == VcpuRecord.FromString(first).vtl


def test_stamps_of_plain_state_differ_with_it() -> None:
    partition = PartitionVtl(offered=True)
    before = plain.stamp(partition)
    assert plain.stamp(PartitionVtl(offered=True)) == before
    partition.mbec = 1
    assert plain.stamp(partition) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda some: some.connect_messages(1, MessagePort(0, 2)),
        lambda some: some.connect_events(1, EventPort(0, 2, 0, 1)),
        lambda some: some.disconnect_messages(9),
        lambda some: some.disconnect_events(9),
        lambda some: some.take_buffer(MessagePort(0, 3)),
        lambda some: some.give_back(0, [5]),
        lambda some: some.restore(b"[[], [], []]"),
    ],
)
def test_connections_count_their_changes(change: Callable[[Connections], object]) -> None:
    some = Connections()
    some.connect_messages(9, MessagePort(0, 5))
    some.connect_events(9, EventPort(0, 5, 0, 1))
    some.take_buffer(MessagePort(0, 5))
    count, saved = some.changes, some.save()
    change(some)
    assert some.changes > count
    assert some.save() != saved
