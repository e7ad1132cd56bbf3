"""Synthetic interrupts: messages, event flags, and how their interrupts begin and end."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.hyperv.pages import SIMP, Bench
from vtl0_guest.cpu.devices.bus import GeneralProtection
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.synic import MAX_PAYLOAD, SLOT_SIZE, SintFlags, encode_message

SINT, VECTOR, TYPE = 3, 0xB3, 0x1234
MASKED, AUTO_EOI, POLLING = int(SintFlags.MASKED), int(SintFlags.AUTO_EOI), int(SintFlags.POLLING)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def open_sint(bench: Bench, flags: int = 0) -> None:
    bench.wrmsr(HvMsr.SINT0 + SINT, VECTOR | flags)


def post(bench: Bench, payload: bytes = b"", **options: bool) -> None:
    bench.vp.synic.post(SINT, TYPE, 9, payload, **options)
    bench.serve()


def test_a_message_lies_in_its_slot_and_interrupts(bench: Bench) -> None:
    open_sint(bench)
    post(bench, b"hello")
    header, payload = bench.slot(SINT)
    assert (header.type, header.size, header.flags, header.origin, payload) == (TYPE, 5, 0, 9, b"hello")
    assert bench.take() == VECTOR
    assert bench.vp.synic.take_delivered() == [SINT]


def test_a_taken_slot_is_marked_and_nothing_interrupts(bench: Bench) -> None:
    open_sint(bench)
    post(bench, b"1")
    assert bench.take() == VECTOR
    bench.eoi()
    post(bench, b"2")
    header, payload = bench.slot(SINT)
    assert (header.flags, payload) == (1, b"1")
    assert bench.take() is None
    bench.release(SINT)
    bench.serve()
    assert bench.slot(SINT)[0].type == 0  # nothing moves before EOM
    bench.wrmsr(HvMsr.EOM, 0)
    bench.serve()
    header, payload = bench.slot(SINT)
    assert (header.type, header.flags, payload) == (TYPE, 0, b"2")
    assert bench.take() == VECTOR


def test_the_end_of_the_interrupt_rescans_too(bench: Bench) -> None:
    open_sint(bench)
    post(bench, b"1")
    post(bench, b"2")
    bench.take()
    bench.release(SINT)
    bench.eoi()
    bench.serve()
    assert bench.slot(SINT)[1] == b"2"


def test_three_messages_say_that_more_wait(bench: Bench) -> None:
    open_sint(bench)
    for payload in (b"1", b"2", b"3"):
        post(bench, payload)
    for payload, more in ((b"1", 1), (b"2", 1), (b"3", 0)):
        header, seen = bench.slot(SINT)
        assert (seen, header.flags) == (payload, more)
        bench.release(SINT)
        bench.wrmsr(HvMsr.EOM, 0)
        bench.serve()


@pytest.mark.parametrize("closed", ["masked", "no page", "disabled", "read-only page"])
def test_a_closed_source_keeps_its_messages(bench: Bench, closed: str) -> None:
    open_sint(bench)
    close = {
        "masked": (HvMsr.SINT0 + SINT, VECTOR | MASKED, VECTOR),
        "no page": (HvMsr.SIMP, SIMP, SIMP | 1),
        "disabled": (HvMsr.SCONTROL, 0, 1),
        "read-only page": (HvMsr.EOM, 0, 0),
    }
    index, off, on = close[closed]
    if closed == "read-only page":
        bench.memory.read_only.add(SIMP >> 12)
    bench.wrmsr(index, off)
    post(bench, b"kept")
    assert bench.slot(SINT)[0].type == 0
    assert bench.take() is None
    bench.memory.read_only.clear()
    bench.wrmsr(index, on)
    bench.serve()
    assert bench.slot(SINT)[1] == b"kept"
    assert bench.take() == VECTOR


def test_what_is_not_worth_waiting_is_dropped(bench: Bench) -> None:
    open_sint(bench)
    post(bench, b"1", drop_if_busy=True)
    post(bench, b"2", drop_if_busy=True)
    bench.release(SINT)
    bench.wrmsr(HvMsr.EOM, 0)
    bench.serve()
    assert bench.slot(SINT)[0].type == 0
    assert bench.vp.synic.take_delivered() == [SINT, SINT]


def test_polling_writes_and_does_not_interrupt(bench: Bench) -> None:
    open_sint(bench, MASKED | POLLING)
    post(bench, b"1")
    bench.vp.synic.signal(SINT, 7)
    bench.serve()
    assert bench.slot(SINT)[1] == b"1"
    assert bench.flags(SINT) == 1 << 7
    assert bench.take() is None


def test_auto_eoi_is_over_when_taken(bench: Bench) -> None:
    open_sint(bench, AUTO_EOI)
    post(bench)
    assert bench.take() == VECTOR
    assert not bench.in_service(VECTOR)
    open_sint(bench)
    bench.vp.synic.raise_sint(SINT)
    bench.serve()
    assert bench.take() == VECTOR
    assert bench.in_service(VECTOR)


def test_event_flags_interrupt_when_they_are_news(bench: Bench) -> None:
    open_sint(bench, AUTO_EOI)
    for flag in (0, 2047, 2047):
        bench.vp.synic.signal(SINT, flag)
    bench.serve()
    assert bench.flags(SINT) == 1 | 1 << 2047
    assert bench.take() == VECTOR
    bench.vp.synic.signal(SINT, 0)
    bench.serve()
    assert bench.take() is None


def test_a_masked_source_raises_nothing(bench: Bench) -> None:
    bench.vp.synic.raise_sint(SINT)
    bench.serve()
    assert bench.take() is None


def test_a_vector_of_the_processor_cannot_be_unmasked(bench: Bench) -> None:
    with pytest.raises(GeneralProtection):
        bench.wrmsr(HvMsr.SINT0, 15)
    bench.wrmsr(HvMsr.SINT0, 15 | MASKED)
    assert bench.rdmsr(HvMsr.SINT0) == 15 | MASKED


def test_reset_forgets_all_and_pays_back(bench: Bench) -> None:
    open_sint(bench, AUTO_EOI)
    post(bench, b"1")
    post(bench, b"2")
    bench.vp.synic.signal(SINT, 1)
    bench.vp.reset()
    assert bench.vp.synic.take_delivered() == [SINT, SINT]
    assert list(bench.vp.synic.sources()) == []
    assert bench.rdmsr(HvMsr.SIMP) == 0
    assert bench.rdmsr(HvMsr.SINT0 + SINT) == MASKED
    bench.wrmsr(HvMsr.SIMP, SIMP | 1)
    assert bench.slot(SINT)[0].type == 0


def test_attention_is_asked_for_from_outside(bench: Bench) -> None:
    before = bench.asked
    bench.vp.synic.post(SINT, TYPE, 0, b"")
    assert bench.asked == before + 1


@given(st.binary(max_size=MAX_PAYLOAD), st.integers(1, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1))
def test_a_slot_holds_what_was_encoded(payload: bytes, type_: int, origin: int) -> None:
    slot = encode_message(type_, origin, payload)
    assert len(slot) == SLOT_SIZE
    assert slot[16 : 16 + slot[4]] == payload


class Queues(RuleBasedStateMachine):
    """Messages are never lost, never doubled, and keep their order, whatever the guest and others do."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.owed: list[deque[bytes]] = [deque(), deque()]
        self.number = 0
        for sint in range(2):
            self.bench.wrmsr(HvMsr.SINT0 + sint, 0x40 + sint)

    @rule(sint=st.integers(0, 1))
    def send(self, sint: int) -> None:
        self.number += 1
        payload = self.number.to_bytes(4, "little")
        self.owed[sint].append(payload)
        self.bench.vp.synic.post(sint, TYPE, 0, payload)

    @rule(sint=st.integers(0, 1), masked=st.booleans())
    def mask(self, sint: int, masked: bool) -> None:
        self.bench.wrmsr(HvMsr.SINT0 + sint, 0x40 + sint | (MASKED if masked else 0))

    @rule(enabled=st.booleans())
    def control(self, enabled: bool) -> None:
        self.bench.wrmsr(HvMsr.SCONTROL, int(enabled))

    @rule(writable=st.booleans())
    def protect(self, writable: bool) -> None:
        pages = self.bench.memory.read_only
        (pages.discard if writable else pages.add)(SIMP >> 12)

    @rule()
    def serve(self) -> None:
        self.bench.serve()

    @rule(sint=st.integers(0, 1), eom=st.booleans())
    def receive(self, sint: int, eom: bool) -> None:
        header, payload = self.bench.slot(sint)
        if header.type and SIMP >> 12 not in self.bench.memory.read_only:
            assert self.owed[sint].popleft() == payload
            self.bench.release(sint)
        if eom:
            self.bench.wrmsr(HvMsr.EOM, 0)

    @precondition(lambda self: SIMP >> 12 not in self.bench.memory.read_only)
    @rule()
    def drain(self) -> None:
        for sint in range(2):
            self.bench.wrmsr(HvMsr.SINT0 + sint, 0x40 + sint)
        self.bench.wrmsr(HvMsr.SCONTROL, 1)
        for _ in range(self.number + 1):
            self.bench.wrmsr(HvMsr.EOM, 0)
            self.bench.serve()
            for sint in range(2):
                self.receive(sint, eom=False)
        assert not any(self.owed)

    @invariant()
    def credit_is_exact(self) -> None:
        """A message is either queued, in its slot, or was taken by the guest; what left the queue was reported."""
        reported = len(self.bench.vp.synic.delivered)
        occupied = sum(1 for sint in range(2) if self.bench.slot(sint)[0].type)
        taken = self.number - sum(map(len, self.owed))
        assert reported == taken + occupied


Queues.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueues = Queues.TestCase
