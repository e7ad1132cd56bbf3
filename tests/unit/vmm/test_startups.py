"""What becomes of INIT and SIPI of VTL0 where VTL1 is guest code."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from vmm import startups
from vmm.board import Board
from vmm.vtl import VTL1
from vtlab.errors import GuestMisbehaved
from vtlab.hyperv.vsm import PartitionConfig
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, Startup

KINDS = (vcpu_pb2.STARTUP_KIND_INIT, vcpu_pb2.STARTUP_KIND_SIPI)


@pytest.fixture
def guest_code(board: Board) -> Board:
    """VTL1 is code of the guest."""
    return replace(board, upper_msrs=board.msrs)


def action(board: Board, kind: int, target: int = 0) -> int:
    exit_ = Exit(startup=Startup(kind=vcpu_pb2.StartupKind.ValueType(kind), target_vp=target))
    answer = startups.serve(board, board.processors[0], exit_)
    assert isinstance(answer, Enter)
    return answer.resolution.action


@pytest.mark.parametrize(("kind", "has_vtl1", "denied"), [*product(KINDS, (False, True), (False, True))])
def test_dropped_where_vtl1_is_or_says_so(guest_code: Board, kind: int, has_vtl1: bool, denied: bool) -> None:
    guest_code.processors[0].vtl.enabled |= has_vtl1 << VTL1
    guest_code.vtl.config |= denied * PartitionConfig.DENY_LOWER_VTL_STARTUP
    expected = vcpu_pb2.ACTION_SKIP if has_vtl1 or denied else vcpu_pb2.ACTION_COMMIT
    assert action(guest_code, kind) == expected


def test_without_guest_code_only_a_policy_may_allow_it(board: Board) -> None:
    assert action(board, vcpu_pb2.STARTUP_KIND_SIPI) == vcpu_pb2.ACTION_DENY


def test_a_target_that_is_none_breaks_the_machine(guest_code: Board) -> None:
    with pytest.raises(GuestMisbehaved):
        action(guest_code, vcpu_pb2.STARTUP_KIND_INIT, len(guest_code.processors))
