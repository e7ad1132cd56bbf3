"""A hostile VTL0 at the hypercall layer: a state machine of calls and turns of vCPUs; floods."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.fuzz import hypercalls
from tests.fuzz.hypercalls import INPUT, OUTPUT, VPS, HypercallTarget
from vtlab.hyperv.convention import Request
from vtlab.hyperv.hypercalls import HypercallCode, encode_input_value
from vtlab.hyperv.profiles import PROFILES
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit, Hypercall

PERSONALITIES = (vcpu_pb2.PERSONALITY_POLICY, vcpu_pb2.PERSONALITY_GUEST_CODE)
FLOOD = 20_000


class HostileGuest(RuleBasedStateMachine):
    """Whatever VTL0 calls, on whichever vCPU and from whichever buffer: VTL1's pages stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.target = HypercallTarget()

    @initialize(
        profile=st.sampled_from(sorted(PROFILES)), personality=st.sampled_from(PERSONALITIES), vtl1=st.booleans()
    )
    def begin(self, profile: str, personality: vcpu_pb2.Personality.ValueType, vtl1: bool) -> None:
        self.target.renew(profile, personality, vtl1=vtl1)

    @rule(vp_index=st.integers(0, VPS - 1), seed=st.integers(0, 2**64 - 1))
    def call(self, vp_index: int, seed: int) -> None:
        self.target.call(random.Random(seed), vp_index)

    @rule(
        vp_index=st.integers(0, VPS - 1),
        value=st.integers(0, 2**64 - 1),
        gpas=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
        xmm=st.binary(max_size=112),
    )
    def call_with_anything(self, vp_index: int, value: int, gpas: tuple[int, int], xmm: bytes) -> None:
        request = Request(value, *gpas, 0, True)
        self.target.serve(request, Exit(hypercall=Hypercall(xmm=xmm)), vp_index)

    @rule(vp_index=st.integers(0, VPS - 1))
    def turn(self, vp_index: int) -> None:
        self.target.drain(vp_index)

    @invariant()
    def nothing_of_vtl1_changed(self) -> None:
        if self.target.board is not None:
            self.target.check()

    def teardown(self) -> None:
        self.target.close()


HostileGuest.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestHostileGuest = HostileGuest.TestCase


@pytest.fixture(params=PERSONALITIES, ids=["policy", "guest code"])
def target(request: pytest.FixtureRequest) -> Iterator[HypercallTarget]:
    made = HypercallTarget()
    made.renew("openvmm", request.param)
    yield made
    made.close()


def fast(code: HypercallCode, low: int, high: int) -> Request:
    return Request(encode_input_value(code, fast=True), low, high, 0, True)


def test_a_flood_of_ipis_is_bounded(target: HypercallTarget) -> None:
    """A vCPU that is not entered meanwhile owes each vector one interrupt, as an interrupt controller does."""
    assert target.board is not None
    exit_ = Exit(hypercall=Hypercall())
    for number in range(FLOOD):
        vector = 0x20 + number % 0xD0
        request = fast(HypercallCode.SEND_SYNTHETIC_CLUSTER_IPI, vector, (1 << VPS) - 1)
        assert target.serve(request, exit_, 0) == "SUCCESS"
    assert all(processor.waiting <= 0x100 for processor in target.board.processors)


def test_a_flood_of_flushes_is_bounded(target: HypercallTarget) -> None:
    assert target.board is not None
    exit_ = Exit(hypercall=Hypercall())
    data = struct.pack("<QQQ", 0, 1, (1 << VPS) - 1)
    target.board.memory.write(INPUT, data, vtl=0)
    request = Request(encode_input_value(HypercallCode.FLUSH_VIRTUAL_ADDRESS_SPACE), INPUT, OUTPUT, 0, True)
    for _ in range(FLOOD):
        assert target.serve(request, exit_, 0) == "SUCCESS"
    assert all(processor.waiting <= 0x100 for processor in target.board.processors)


@pytest.mark.parametrize("size", [1, 15, 95, 97, 112])
def test_a_guest_process_that_leaves_xmm_registers_out(target: HypercallTarget, size: int) -> None:
    """Its exit is read as one without them, so that the call has no room for its input."""
    assert target.board is not None
    value = encode_input_value(HypercallCode.SET_VP_REGISTERS, fast=True, rep_count=2)
    exit_ = Exit(hypercall=Hypercall(xmm=bytes(size)))
    assert target.serve(Request(value, (1 << 64) - 1, 0xFFFF_FFFE, 0, True), exit_, 0) == "INVALID_HYPERCALL_INPUT"


def test_the_checks_can_fail(target: HypercallTarget) -> None:
    """A byte of VTL1 that changes is found, in its own file and in what VTL0 can read."""
    from vtlab.ram import PAGE_SIZE, RamFile

    assert target.board is not None
    target.check()
    for page, file in (
        (hypercalls.PRIVATE[3], RamFile.PRIVATE),
        (hypercalls.SEALED[3], RamFile.SEALED),
        (hypercalls.PRIVATE[3], RamFile.WRITABLE),
    ):
        view = target.board.memory._ram.views[file]
        view[page * PAGE_SIZE + 7] ^= 1
        with pytest.raises(AssertionError, match=f"page {page:#x}"):
            target.check()
        view[page * PAGE_SIZE + 7] ^= 1
