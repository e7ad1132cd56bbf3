"""Machine checks: memory that VTL1 alone holds is not VTL0's to give up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import Vtl0
from vtl1_monitor import rights
from vtl1_monitor.poison_judge import judge_poison
from vtl1_monitor.policy.rules import Rules
from vtlab.v1 import vcpu_pb2

ADDRESS_VALID = 1 << 58


def told(vtl0: Vtl0, address: int, status: int = ADDRESS_VALID) -> vcpu_pb2.Resolution:
    error = vcpu_pb2.MachineCheck(status=status, address=address)
    exit_ = vcpu_pb2.Exit(origin=vcpu_pb2.ORIGIN_CLIENT, machine_check=error)
    return vtl0.enter(vcpu_pb2.ENTER_REASON_CLIENT_WRITE, intercept=exit_).vtl_return.resolution


def test_a_page_of_vtl1_is_a_reset(locked: Vtl0) -> None:
    verdict = told(locked, image.VTL1 + 0x123)
    assert verdict.action == vcpu_pb2.ACTION_RESET
    assert f"memory of VTL1 at {image.VTL1 + 0x123:#x}" in verdict.reason


def test_the_policy_may_want_to_look_at_it(vtl0: Vtl0) -> None:
    vtl0.lock(POLICY + "lifecycle: {poison: halt}\n")
    assert told(vtl0, image.VTL1).action == vcpu_pb2.ACTION_HALT


@pytest.mark.parametrize("address", [image.FREE, image.TEXT, image.RAM_SIZE, 1 << 63])
def test_other_memory_is_the_guests_to_deal_with(locked: Vtl0, address: int) -> None:
    assert told(locked, address).action == vcpu_pb2.ACTION_COMMIT


def test_an_error_without_an_address(locked: Vtl0) -> None:
    assert told(locked, image.VTL1, status=0).action == vcpu_pb2.ACTION_COMMIT


def test_before_a_policy_nothing_is_vtl1s(vtl0: Vtl0) -> None:
    assert told(vtl0, image.VTL1).action == vcpu_pb2.ACTION_COMMIT


@given(st.none() | st.integers(0, 255), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_only_private_pages_end_the_machine(code: int | None, status: int, address: int) -> None:
    verdict = judge_poison(Rules(), code, vcpu_pb2.MachineCheck(status=status, address=address))
    private = code is not None and code & rights.STORE_MASK == rights.PRIVATE and bool(status & ADDRESS_VALID)
    assert (verdict.resolution.action == vcpu_pb2.ACTION_RESET) == private
    assert verdict.allowed != private
