"""Synthetic timers under manual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.hyperv.pages import Bench
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.synic import MessageType, TimerConfig, TimerPayload

SINT, VECTOR = 2, 0xF1
CONFIG, COUNT = HvMsr.STIMER0_CONFIG, HvMsr.STIMER0_COUNT
ENABLE, PERIODIC, AUTO, DIRECT = (
    int(flag) for flag in (TimerConfig.ENABLE, TimerConfig.PERIODIC, TimerConfig.AUTO_ENABLE, TimerConfig.DIRECT)
)
TO_SINT = SINT << 16
MILLISECOND = 10_000


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.wrmsr(HvMsr.SINT0 + SINT, VECTOR | 1 << 17)
    return made


def now(bench: Bench) -> int:
    return bench.rdmsr(HvMsr.TIME_REF_COUNT)


def test_one_shot_sends_a_message_and_is_off(bench: Bench) -> None:
    at = now(bench) + MILLISECOND
    bench.wrmsr(COUNT, at)
    bench.wrmsr(CONFIG, ENABLE | TO_SINT)
    bench.pass_time(0.0009)
    assert bench.take() is None
    bench.pass_time(0.001)
    assert bench.take() == VECTOR
    header, raw = bench.slot(SINT)
    payload = TimerPayload.decode(raw)
    assert (header.type, header.size, payload.timer, payload.expiration) == (MessageType.TIMER_EXPIRED, 24, 0, at)
    assert at <= payload.delivery <= at + 2
    assert bench.rdmsr(CONFIG) == TO_SINT


def test_a_time_that_has_passed_expires_at_once(bench: Bench) -> None:
    bench.pass_time(1)
    bench.wrmsr(COUNT, 1)
    bench.wrmsr(CONFIG, ENABLE | TO_SINT)
    bench.pass_time(0)
    assert bench.take() == VECTOR


def test_periodic_and_each_release(bench: Bench) -> None:
    bench.wrmsr(COUNT, MILLISECOND)
    bench.wrmsr(CONFIG, ENABLE | PERIODIC | TO_SINT)
    last = 0
    for _ in range(10):
        bench.pass_time(0.001)
        assert bench.take() == VECTOR
        expiration = TimerPayload.decode(bench.slot(SINT)[1]).expiration
        assert not last or expiration == last + MILLISECOND
        last = expiration
        bench.release(SINT)
    assert bench.rdmsr(CONFIG) & ENABLE


def test_a_taken_slot_is_marked_and_periods_are_skipped(bench: Bench) -> None:
    bench.wrmsr(COUNT, MILLISECOND)
    bench.wrmsr(CONFIG, ENABLE | PERIODIC | TO_SINT)
    bench.pass_time(0.0105)
    assert bench.take() == VECTOR
    assert bench.slot(SINT)[0].flags == 1
    bench.release(SINT)
    bench.wrmsr(HvMsr.EOM, 0)
    bench.serve()
    assert bench.take() == VECTOR
    assert bench.slot(SINT)[0].flags == 0
    bench.release(SINT)
    bench.wrmsr(HvMsr.EOM, 0)
    bench.serve()
    assert bench.take() is None  # one message was on its way, not nine


def test_direct_mode_needs_no_sint(bench: Bench) -> None:
    bench.wrmsr(COUNT, MILLISECOND)
    bench.wrmsr(CONFIG, ENABLE | PERIODIC | DIRECT | 0xD5 << 4)
    bench.pass_time(0.0011)
    assert bench.take() == 0xD5
    assert bench.slot(0)[0].type == 0


def test_without_sint_and_direct_mode_it_stays_disabled(bench: Bench) -> None:
    bench.wrmsr(COUNT, 1)
    bench.wrmsr(CONFIG, ENABLE)
    assert not bench.rdmsr(CONFIG) & ENABLE
    assert bench.platform.next_deadline() is None or bench.vp.timers[0].next_deadline() is None


def test_auto_enable_and_count_zero(bench: Bench) -> None:
    bench.wrmsr(CONFIG, AUTO | PERIODIC | TO_SINT)
    assert bench.vp.timers[0].next_deadline() is None
    bench.wrmsr(COUNT, MILLISECOND)
    assert bench.rdmsr(CONFIG) & ENABLE
    bench.pass_time(0.0011)
    assert bench.take() == VECTOR
    bench.wrmsr(COUNT, 0)
    assert not bench.rdmsr(CONFIG) & ENABLE
    assert bench.vp.timers[0].next_deadline() is None


def test_a_write_takes_back_what_waits(bench: Bench) -> None:
    bench.wrmsr(HvMsr.SINT0 + SINT, VECTOR | 1 << 16)
    bench.wrmsr(COUNT, 1)
    bench.wrmsr(CONFIG, ENABLE | TO_SINT)
    bench.pass_time(0.001)
    bench.wrmsr(CONFIG, 0)
    bench.wrmsr(HvMsr.SINT0 + SINT, VECTOR)
    bench.serve()
    assert bench.take() is None
    assert bench.slot(SINT)[0].type == 0


def test_four_timers_share_a_slot(bench: Bench) -> None:
    for index in range(4):
        bench.wrmsr(COUNT + 2 * index, now(bench) + MILLISECOND)
        bench.wrmsr(CONFIG + 2 * index, ENABLE | TO_SINT)
    bench.pass_time(0.002)
    seen = []
    while bench.slot(SINT)[0].type:
        seen.append(TimerPayload.decode(bench.slot(SINT)[1]).timer)
        bench.release(SINT)
        bench.wrmsr(HvMsr.EOM, 0)
        bench.serve()
    assert sorted(seen) == [0, 1, 2, 3]


def test_reset_stops_them(bench: Bench) -> None:
    bench.wrmsr(COUNT, MILLISECOND)
    bench.wrmsr(CONFIG, ENABLE | PERIODIC | TO_SINT)
    bench.vp.reset()
    assert bench.vp.timers[0].next_deadline() is None
    assert bench.rdmsr(CONFIG) == bench.rdmsr(COUNT) == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, (1 << 64) - 1)), max_size=12), st.floats(0, 5))
def test_no_value_breaks_them(writes: list[tuple[int, int]], seconds: float) -> None:
    """Hostile values: no exception, no deadline before now, and a bounded number of expiries."""
    made = Bench()
    for register, value in writes:
        made.wrmsr(CONFIG + register, value)
    for _ in range(20):
        deadline = made.platform.next_deadline()
        if deadline is None:
            break
        assert deadline >= made.clock.now() - 1e-9
        made.clock.advance(max(seconds / 20, deadline - made.clock.now()))
        made.platform.advance(made.clock.now())
        made.serve()
