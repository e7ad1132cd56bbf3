"""What the conformance rows showed wrong once: values of synthetic registers, writes that change nothing, statuses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vmm.hypercalls
from vmm.hypercalls import HYPERCALLS, register_values
from vmm.hypercalls.cr_intercepts import intercept_filter
from vmm.vtl import VpVtl
from vtl0_guest.cpu.hyperv import msrs
from vtl0_guest.cpu.intercepts import Intercepts
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.profiles import PROFILES
from vtlab.hyperv.registers import HvRegister
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import CrInterceptControl
from vtlab.v1 import registers_pb2 as r
from vtlab.v1.vcpu_pb2 import InterceptFilter, MsrFilter
from vtlab.x86.registers import Msr

ALL = (1 << 64) - 1


@pytest.mark.parametrize(
    ("index", "value", "legal"),
    [
        (HvMsr.SINT0 + 3, 15, False),
        (HvMsr.SINT0 + 3, 16, True),
        (HvMsr.SINT0 + 3, 1 << 16, True),
        (HvMsr.SIMP, 0x5001, True),
        (HvMsr.SIMP, 0x9001, False),
        (HvMsr.SIMP, 0x9000, True),
        (HvMsr.VP_ASSIST_PAGE, 0x9001, False),
        (HvMsr.SCONTROL, 1 << 64, False),
        (HvMsr.STIMER0_CONFIG, 0x1234, True),
    ],
)
def test_values_of_synthetic_registers(index: int, value: int, legal: bool) -> None:
    assert register_values.legal_synthetic(index, value, lambda gpa: gpa == 0x5000) is legal


def test_registers_without_a_mask_exit_at_every_write() -> None:
    filter_ = InterceptFilter(
        efer_mask=ALL,
        cr0_mask=ALL,
        unchanged_writes=True,
        msr_writes=[MsrFilter(index=Msr.LSTAR, mask=ALL), MsrFilter(index=Msr.MISC_ENABLE, mask=1)],
    )
    asked = Intercepts(filter_)
    assert asked.register_write(r.REGISTER_NAME_EFER, 5, 5)
    assert asked.msr_write(Msr.LSTAR, 5, 5)
    assert not asked.register_write(r.REGISTER_NAME_CR0, 5, 5), "CR0 has a mask: a change counts"
    assert not asked.register_write(r.REGISTER_NAME_XFEM, 5, 5), "not watched"
    assert not asked.msr_write(Msr.MISC_ENABLE, 5, 5)
    filter_.unchanged_writes = False
    assert not Intercepts(filter_).msr_write(Msr.LSTAR, 5, 5), "a policy asks for changes"


def test_guest_code_asks_for_them() -> None:
    levels = VpVtl()
    assert not intercept_filter(levels).unchanged_writes
    levels.cr_intercepts[HvRegister.CR_INTERCEPT_CONTROL] = int(CrInterceptControl.LSTAR_WRITE)
    assert intercept_filter(levels).unchanged_writes


def test_a_listing_has_read_only_msrs_and_nothing_that_a_read_changes() -> None:
    assert {HvMsr.SVERSION, HvMsr.VP_INDEX} <= msrs.PLAIN
    assert not {HvMsr.EOM, HvMsr.ICR, HvMsr.GUEST_IDLE, HvMsr.TIME_REF_COUNT} & msrs.PLAIN


MODULES = sorted(Path(vmm.hypercalls.__file__).parent.glob("*.py"))


def named(module: Path) -> set[str]:
    """Statuses that a module names."""
    tree = ast.parse(module.read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("HvStatus", "status")
    } & set(HvStatus.__members__)


def test_every_status_that_is_named_belongs_to_a_call() -> None:
    declared = {status.name for profile in PROFILES for _, status in HYPERCALLS.statuses(profile)}
    used = set().union(*(named(module) for module in MODULES))
    assert used - declared == {"INVALID_HYPERCALL_CODE"}, "what no call gives, but the lack of one"


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_each_call_has_success_and_what_the_abi_refuses(profile: str) -> None:
    pairs = HYPERCALLS.statuses(profile)
    codes = {code for code, _ in pairs}
    for status in (HvStatus.SUCCESS, HvStatus.INVALID_HYPERCALL_INPUT, HvStatus.INVALID_ALIGNMENT):
        assert {code for code, given in pairs if given == status} == codes
