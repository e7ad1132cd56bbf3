"""Enum values that no .proto file of ours has come from hostile peers, and have a name all the same."""

from __future__ import annotations

from vtlab.enums import name_of
from vtlab.v1 import vcpu_pb2


def test_known_and_unknown_values() -> None:
    assert name_of(vcpu_pb2.EnterReason, 1) == "ENTER_REASON_RESUME"
    assert name_of(vcpu_pb2.EnterReason, 65535) == "65535"
