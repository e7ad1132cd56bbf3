"""Bytes on the path of every exit are those that protobuf would write, or mean the same to it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vtlab.run_messages import framed, numbered, varint
from vtlab.v1.vcpu_pb2 import Enter, Exit, Hypercall, Resolution, RunRequest, RunResponse

NUMBERS = st.integers(0, (1 << 64) - 1)


@given(NUMBERS)
def test_a_number_is_encoded_as_protobuf_does(value: int) -> None:
    assert varint(value) == Exit(sequence=value).SerializeToString()[1:] or value == 0
    assert varint(0) == b"\0"


@given(NUMBERS, st.text(max_size=0x5000))
def test_a_framed_message_is_its_envelope(sequence: int, reason: str) -> None:
    enter = Enter(sequence=sequence, resolution=Resolution(reason=reason))
    assert framed(enter.SerializeToString()) == RunRequest(enter=enter).SerializeToString()


@given(NUMBERS, st.binary(max_size=0x300))
def test_a_numbered_exit_is_that_exit_with_its_number(sequence: int, xmm: bytes) -> None:
    exit_ = Exit(vp_index=3, hypercall=Hypercall(xmm=xmm))
    answer = RunResponse.FromString(framed(numbered(exit_.SerializeToString(), sequence))).exit
    exit_.sequence = sequence
    assert answer == exit_
