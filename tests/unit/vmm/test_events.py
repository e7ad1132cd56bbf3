"""The event log: order, filters, bounds, and readers that are told what they missed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from vmm.events import EventLog
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import Exit, Kicked, Resolution, SerialOutput
from vtlab.v1.vmm_pb2 import Event

SERIAL = vmm_pb2.EVENT_KIND_SERIAL
VTL = vmm_pb2.EVENT_KIND_VTL
LOST = vmm_pb2.EVENT_KIND_LOST


def serial(log: EventLog, *texts: str) -> None:
    for text in texts:
        log.record(SERIAL, SerialOutput(data=text.encode()), weight=len(text))


def follow(log: EventLog, from_sequence: int = 0, kinds: tuple[int, ...] = ()) -> Iterator[Event]:
    """As a client sees them."""
    for batch in log.watch(from_sequence, kinds):
        yield from map(Event.FromString, batch)


def read(log: EventLog, count: int, from_sequence: int = 0, kinds: tuple[int, ...] = ()) -> list[Event]:
    return list(islice(follow(log, from_sequence, kinds), count))


def test_events_are_numbered_in_order_over_all_kinds() -> None:
    log = EventLog("vm")
    serial(log, "a")
    log.record(VTL, ("call", 5), vp_index=0, vtl=0, enter_sequence=7)
    serial(log, "b")
    events = read(log, 3)
    assert [event.sequence for event in events] == [1, 2, 3]
    assert [event.kind for event in events] == [SERIAL, VTL, SERIAL]
    assert events[1].vtl_event.code == 5
    assert events[1].enter_sequence == 7
    assert events[0].vm == "vm"
    assert events[0].time.seconds > 1_600_000_000
    assert read(log, 1, from_sequence=3)[0].serial.data == b"b"
    assert read(log, 1, kinds=(VTL,))[0].sequence == 2


def test_a_verdict_is_built_from_its_pair() -> None:
    log = EventLog("vm")
    log.record(vmm_pb2.EVENT_KIND_VERDICT, (Exit(kicked=Kicked()), Resolution(reason="rule")))
    (event,) = log.kept()
    assert event.verdict.resolution.reason == "rule"
    assert event.verdict.exit.WhichOneof("reason") == "kicked"


def test_what_is_kept_from_a_number_on() -> None:
    log = EventLog("vm")
    serial(log, "a", "b", "c")
    assert [event.serial.data for event in log.kept(from_sequence=2)] == [b"b", b"c"]


def test_a_flood_of_one_kind_does_not_push_out_another() -> None:
    log = EventLog("vm", capacity=10)
    log.record(VTL, ("reset", 0))
    serial(log, *["x"] * 100)
    assert [event.sequence for event in log.kept((VTL,))] == [1]
    assert len(log.kept((SERIAL,))) == 10


def test_heavy_details_are_bounded_in_bytes() -> None:
    log = EventLog("vm", capacity=1000, weight=100)
    serial(log, *["x" * 30] * 10)
    assert len(log.kept()) == 3
    serial(log, "y" * 500)
    assert len(log.kept()) == 1


def test_a_slow_reader_is_told_exactly_what_it_missed() -> None:
    log = EventLog("vm", capacity=4)
    serial(log, "0")
    reader = follow(log)
    assert next(reader).serial.data == b"0"
    serial(log, *map(str, range(1, 11)))
    lost = next(reader)
    assert (lost.kind, lost.lost.count) == (LOST, 6)
    assert [next(reader).serial.data for _ in range(4)] == [b"7", b"8", b"9", b"10"]


def test_a_late_reader_that_asks_for_the_start_is_told_too() -> None:
    log = EventLog("vm", capacity=4)
    serial(log, *map(str, range(10)))
    events = read(log, 5, from_sequence=1)
    assert (events[0].kind, events[0].lost.count) == (LOST, 6)
    assert events[1].sequence == events[0].sequence + 1 == 7
    assert read(log, 1)[0].kind == SERIAL  # who asks for the oldest kept misses nothing


def test_waiting_readers_wake_and_end() -> None:
    log = EventLog("vm")
    seen: list[bytes] = []

    def watch() -> None:
        seen.extend(event.serial.data for event in follow(log, kinds=(SERIAL,)))

    reader = threading.Thread(target=watch)
    reader.start()
    serial(log, "late")
    log.close()
    reader.join(5)
    assert not reader.is_alive()
    assert seen == [b"late"]


def test_an_inactive_reader_ends() -> None:
    assert list(EventLog("vm").watch(active=lambda: False)) == []


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=30), st.integers(1, 5))
def test_seen_and_lost_add_up(steps: list[tuple[int, bool]], capacity: int) -> None:
    log = EventLog("vm", capacity=capacity)
    serial(log, "first")
    reader = follow(log)
    next(reader)
    written = seen = lost = 0
    for count, look in steps:
        serial(log, *["x"] * count)
        written += count
        while look and seen + lost < written:
            event = next(reader)
            if event.kind == LOST:
                lost += event.lost.count
            else:
                seen += 1
    log.close()
    for event in reader:
        lost += event.lost.count
        seen += event.kind == SERIAL
    assert seen + lost == written
