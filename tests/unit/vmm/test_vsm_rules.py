"""Rules, register values and layouts of the VSM calls, for all profiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.hypercalls import abi, pending_event, register_values
from vmm.hypercalls.cr_intercepts import CONTROL_BITS, intercept_filter
from vmm.hypercalls.protection import page_access
from vmm.hypercalls.rules import Facts, first_objection, legal_map_flags, rules_of
from vmm.memory import objection, rights_of
from vmm.vtl import VTL0, VTL1, PartitionVtl, VpVtl
from vtlab.hyperv.hypercalls import PARTITION_SELF, VP_SELF, decode_input_value, encode_input_value
from vtlab.hyperv.layouts import (
    EnablePartitionVtlInput,
    ModifyProtectionHeader,
    RegisterAssociation,
    TranslateInput,
    VpHeader,
    decode_vp_set,
)
from vtlab.hyperv.profiles import PROFILES, ExecuteBits
from vtlab.hyperv.registers import HvRegister
from vtlab.hyperv.status import HvStatus as S
from vtlab.hyperv.vsm import CrInterceptControl
from vtlab.v1 import registers_pb2 as r
from vtlab.v1.vcpu_pb2 import InterceptFilter
from vtlab.x86.registers import Msr

names = st.sampled_from(sorted(PROFILES))
words = st.one_of(st.sampled_from([0, 1, 2, PARTITION_SELF, VP_SELF]), st.integers(0, 2**64 - 1))
bytes_ = st.integers(0, 255)
indices = st.one_of(st.sampled_from([0, 1, 2, VP_SELF, 0xFFFFFFFF]), st.integers(0, 2**32 - 1))
facts = st.builds(
    lambda vtl, offered, enabled, mbec, config, vps: Facts(
        PartitionVtl(offered, 1 | enabled << 1, mbec << 1, config), tuple(VpVtl(1 | vp << 1) for vp in vps), 0, vtl
    ),
    st.sampled_from([VTL0, VTL1]),
    st.booleans(),
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, 127),
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
)


@given(names, facts, words, indices, bytes_, bytes_, words)
def test_every_question_has_one_status(
    name: str, state: Facts, partition: int, vp: int, vtl: int, flags: int, value: int
) -> None:
    rules = rules_of(name)
    header = VpHeader(partition, vp, vtl)
    for rows, request in (
        (rules.enable_partition_vtl, EnablePartitionVtlInput(partition, vtl, flags)),
        (rules.enable_vp_vtl, header),
        (rules.start_virtual_processor, header),
        (rules.get_vp_registers, header),
        (rules.set_vp_registers, header),
        (rules.modify_vtl_protection_mask, ModifyProtectionHeader(partition, value & 0xFFFF, vtl)),
        (rules.translate_virtual_address, TranslateInput(partition, vp, value, 0)),
    ):
        assert first_objection(rows, state, request) in set(S)


@given(names, facts, words, bytes_, st.integers(0, 0xFFFF))
def test_vtl0_never_changes_protections(name: str, state: Facts, partition: int, vtl: int, flags: int) -> None:
    request = ModifyProtectionHeader(partition, flags, vtl)
    assert first_objection(rules_of(name).modify_vtl_protection_mask, state._replace(vtl=VTL0), request)


@given(names, facts, bytes_, indices)
def test_nobody_reaches_registers_above_itself(name: str, state: Facts, vtl: int, vp: int) -> None:
    if vtl >> 4 & 1 and vtl & 0xF > state.vtl:
        header = VpHeader(PARTITION_SELF, vp, vtl)
        assert first_objection(rules_of(name).get_vp_registers, state, header)
        assert first_objection(rules_of(name).set_vp_registers, state, header)


@given(st.integers(0, 15), st.booleans(), st.sampled_from(ExecuteBits))
def test_legal_flags_are_rights_that_exist(flags: int, mbec: bool, execute: ExecuteBits) -> None:
    if legal_map_flags(flags, mbec=mbec, execute_bits=execute):
        access = page_access(flags, mbec=mbec, execute_bits=execute)
        assert objection(0, rights_of(access)) is None
        assert mbec or access.kernel_execute == access.user_execute


def test_execute_bits_of_kvm() -> None:
    assert page_access(0b1011, mbec=False, execute_bits=ExecuteBits.EITHER).kernel_execute
    assert not legal_map_flags(0b1011, mbec=False)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**128 - 1)), max_size=9), st.integers(0, 9))
def test_columns_are_the_same_elements(values: list[tuple[int, int]], start: int) -> None:
    rows = abi.Shape(16, element_in=32)
    columns = rows._replace(columns=(4, 16))
    value = decode_input_value(encode_input_value(0x51, rep_count=len(values), rep_start=min(start, len(values))))
    as_rows = bytes(16) + b"".join(RegisterAssociation(*pair).encode() for pair in values)
    part = bytes(16) + b"".join(name.to_bytes(4, "little") for name, _ in values)
    part = part.ljust(-(-len(part) // 16) * 16, b"\0")
    as_columns = part + b"".join(data.to_bytes(16, "little") for _, data in values)
    assert abi.input_size(value, columns) == len(as_columns)
    assert abi.split_elements(as_columns, value, columns) == abi.split_elements(as_rows, value, rows)


@given(st.integers(0, 2**128 - 1))
def test_pending_events(value: int) -> None:
    try:
        found = pending_event.decode(value)
    except pending_event.IllegalEvent:
        assert value & 1
        return
    assert (found is None) == (not value & 1)
    if found is not None:
        assert found.vector == value >> 16 & 0xFFFF <= 31


def test_a_page_fault_has_its_address() -> None:
    found = pending_event.decode(0x1234 << 64 | 7 << 32 | 14 << 16 | 1 << 8 | 1)
    assert found is not None
    assert (found.vector, found.error_code, found.address) == (14, 7, 0x1234)


@pytest.mark.parametrize("value", [3 << 16 | 1 << 8 | 1, 1 << 1 | 1, 32 << 16 | 1, 2 << 16 | 1])
def test_events_that_no_exception_is(value: int) -> None:
    with pytest.raises(pending_event.IllegalEvent):
        pending_event.decode(value)


def test_a_mask_of_zero_watches_nothing() -> None:
    levels = VpVtl()
    levels.cr_intercepts[HvRegister.CR_INTERCEPT_CONTROL] = CONTROL_BITS
    found = intercept_filter(levels)
    assert (found.cr0_mask, found.cr4_mask, found.efer_mask) == (0, 0, 2**64 - 1)
    assert found.gdtr_writes
    assert Msr.MISC_ENABLE not in {item.index for item in found.msr_writes}
    levels.cr_intercepts[HvRegister.CR_INTERCEPT_CR4_MASK] = 1 << 20
    assert intercept_filter(levels).cr4_mask == 1 << 20


def test_without_control_bits_nothing_but_startups_is_watched() -> None:
    watched = (HvRegister.CR_INTERCEPT_CR0_MASK, HvRegister.CR_INTERCEPT_CR4_MASK)
    masks: dict[int, int] = {int(name): 2**64 - 1 for name in watched}
    assert intercept_filter(VpVtl(cr_intercepts=masks)) == InterceptFilter(startups=True)
    assert not CONTROL_BITS & CrInterceptControl.LSTAR_READ


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        (r.REGISTER_NAME_CR0, 1 << 31, False),
        (r.REGISTER_NAME_CR0, 1 << 32 | 1, False),
        (r.REGISTER_NAME_CR0, 0x80050033, True),
        (r.REGISTER_NAME_CR4, 1 << 12, False),
        (r.REGISTER_NAME_CR4, 1 << 20, True),
        (r.REGISTER_NAME_EFER, 1 << 12, False),
        (r.REGISTER_NAME_CR8, 16, False),
        (r.REGISTER_NAME_RAX, 1 << 64, False),
        (r.REGISTER_NAME_RAX, (1 << 64) - 1, True),
    ],
)
def test_register_values(name: int, value: int, legal: bool) -> None:
    assert register_values.legal_register(name, value) is legal


def test_msr_values() -> None:
    assert not register_values.legal_msr(Msr.LSTAR, 1 << 62)
    assert not register_values.legal_msr(Msr.PAT, 2)
    assert register_values.legal_msr(Msr.STAR, (1 << 64) - 1)


@given(st.sets(st.integers(0, 4095), max_size=40))
def test_vp_sets(members: set[int]) -> None:
    banks: dict[int, int] = {}
    for member in members:
        banks[member // 64] = banks.get(member // 64, 0) | 1 << member % 64
    valid = sum(1 << bank for bank in banks)
    data = (0).to_bytes(8, "little") + valid.to_bytes(8, "little")
    words_ = b"".join(banks[bank].to_bytes(8, "little") for bank in sorted(banks))
    assert decode_vp_set(data, words_) == members
    assert decode_vp_set(data, words_ + bytes(8)) is None
