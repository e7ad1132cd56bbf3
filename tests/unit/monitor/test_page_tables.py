"""Guarded page tables: what WRITE_PAGE_TABLE takes and what it refuses."""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.kernel_image import LOW_PD, NX, PML4, PS, RW, US, A, D, P
from tests.unit.monitor.vtl0 import Vtl0
from vtl1_monitor import page_tables
from vtl1_monitor.page_tables import BadTables
from vtlab.services import PageTableOperation, Service
from vtlab.v1 import registers_pb2, vcpu_pb2

NEW_TABLE, NEW_TABLE_2, NEW_ROOT, FRAME = (image.FREE + n * image.PAGE for n in (16, 17, 18, 24))


def pte(gpa: int) -> int:
    """Address of the entry that maps a kernel page."""
    return image.KERNEL_PT + (gpa >> 12) * 8


FREE_PTE = pte(0x1E0000)


def write(vtl0: Vtl0, pa: int, value: int) -> int:
    return vtl0.call(Service.WRITE_PAGE_TABLE, pa, value, PageTableOperation.WRITE).value


def entry(vtl0: Vtl0, pa: int) -> int:
    return int.from_bytes(vtl0.read(pa, 8), "little")


def table(vtl0: Vtl0, pa: int, entries: Mapping[int, int]) -> None:
    vtl0.write(pa, struct.pack("<512Q", *(entries.get(index, 0) for index in range(512))))


def test_guarded_tables_need_no_write_by_the_walker(locked: Vtl0) -> None:
    assert entry(locked, pte(image.TEXT)) == image.TEXT | P | A | D
    assert entry(locked, PML4 + 511 * 8) == image.KERNEL_PDPT | P | RW | A
    assert entry(locked, LOW_PD) == P | RW | PS | NX | A | D
    assert entry(locked, FREE_PTE) == 0


def test_ordinary_mappings_come_and_go(locked: Vtl0) -> None:
    assert write(locked, FREE_PTE, FRAME | P | RW | NX) == 0, locked.log()
    assert entry(locked, FREE_PTE) == FRAME | P | RW | NX | A | D
    assert write(locked, FREE_PTE, FRAME | P | NX | US) == 0
    assert write(locked, FREE_PTE, FRAME | P | US) == 0
    assert write(locked, FREE_PTE, 0) == 0
    assert entry(locked, FREE_PTE) == 0


REFUSED = {
    "text writable": image.TEXT | P | RW | NX,
    "text writable and executable": image.TEXT | P | RW,
    "rodata writable": image.RODATA | P | RW | NX,
    "rodata executable": image.RODATA | P,
    "data executable": FRAME | P,
    "writable and executable for the user": FRAME | P | RW | US,
    "memory of VTL1": image.VTL1 | P | NX,
    "memory of VTL1, writable": image.VTL1 | P | RW | NX,
    "table page writable": image.KERNEL_PT | P | RW | NX,
    "kernel text for the user": image.TEXT | P | US,
    "device executable": 0xFEE00000 | P,
    "beyond the address bits": 1 << 45 | P | NX,
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_mappings_that_break_the_rules(locked: Vtl0, value: int) -> None:
    assert write(locked, FREE_PTE, value) == -errno.EACCES
    assert entry(locked, FREE_PTE) == 0


@pytest.mark.parametrize(
    "value", [image.TEXT | P | NX, image.TEXT | P, image.KERNEL_PT | P | NX, 0xFEE00000 | P | RW | NX]
)
def test_mappings_within_the_rights(locked: Vtl0, value: int) -> None:
    assert write(locked, FREE_PTE, value) == 0, locked.log()


@pytest.mark.parametrize("value", [0, FRAME | P, FRAME | P | NX, image.TEXT | P | US, image.TEXT + 0x1000 | P])
def test_protected_memory_stays_mapped_as_it_is(locked: Vtl0, value: int) -> None:
    """The remap attack: text or rodata of the kernel replaced by an attacker's page."""
    for target in (image.TEXT, image.RODATA):
        before = entry(locked, pte(target))
        assert write(locked, pte(target), value) == -errno.EACCES
        assert entry(locked, pte(target)) == before


@pytest.mark.parametrize("pa", [PML4 + 511 * 8, image.KERNEL_PDPT + 510 * 8, image.KERNEL_PD])
def test_nor_can_a_table_above_it_be_exchanged(locked: Vtl0, pa: int) -> None:
    table(locked, NEW_TABLE, {})
    before = entry(locked, pa)
    assert write(locked, pa, NEW_TABLE | P | RW) == -errno.EACCES
    assert write(locked, pa, 0) == -errno.EACCES
    assert entry(locked, pa) == before
    assert locked.rights(NEW_TABLE) == "rwu"


def test_the_same_value_again_is_fine(locked: Vtl0) -> None:
    assert write(locked, pte(image.TEXT), image.TEXT | P) == 0


@pytest.mark.parametrize(
    ("pa", "number"),
    [(FREE_PTE + 4, errno.EINVAL), (FRAME, errno.ENOENT), (image.VTL1, errno.ENOENT), (1 << 63, errno.ENOENT)],
)
def test_entries_that_are_none(locked: Vtl0, pa: int, number: int) -> None:
    assert write(locked, pa, 0) == -number
    assert locked.call(Service.WRITE_PAGE_TABLE, FREE_PTE, 0, 3).value == -errno.EINVAL


def test_new_tables_are_sealed_then_judged(locked: Vtl0) -> None:
    table(locked, NEW_TABLE, {3: NEW_TABLE_2 | P | RW | US})
    table(locked, NEW_TABLE_2, {7: FRAME | P | RW | US | NX})
    slot = image.KERNEL_PDPT + 8
    assert write(locked, slot, NEW_TABLE | P | RW | US) == 0, locked.log()
    assert (locked.rights(NEW_TABLE), locked.rights(NEW_TABLE_2)) == ("rt", "rt")
    assert entry(locked, NEW_TABLE_2 + 7 * 8) == FRAME | P | RW | US | NX | A | D
    assert locked.call(Service.WRITE_PAGE_TABLE, NEW_TABLE, 0, PageTableOperation.RELEASE).value == -errno.EBUSY
    assert write(locked, slot, 0) == 0
    for page in (NEW_TABLE, NEW_TABLE_2):
        assert locked.call(Service.WRITE_PAGE_TABLE, page, 0, PageTableOperation.RELEASE).value == 0
        assert locked.rights(page) == "rwu"


@pytest.mark.parametrize(
    "bad", [image.TEXT | P | RW | NX, image.VTL1 | P | NX, FRAME | P | RW], ids=["text", "vtl1", "wx"]
)
def test_a_new_table_with_one_bad_entry_is_given_back(locked: Vtl0, bad: int) -> None:
    table(locked, NEW_TABLE, {3: NEW_TABLE_2 | P | RW | US})
    table(locked, NEW_TABLE_2, {7: FRAME | P | RW | NX, 8: bad})
    assert write(locked, image.KERNEL_PDPT + 8, NEW_TABLE | P | RW) == -errno.EACCES
    assert (locked.rights(NEW_TABLE), locked.rights(NEW_TABLE_2)) == ("rwu", "rwu")
    assert entry(locked, image.KERNEL_PDPT + 8) == 0


def test_a_table_changed_after_the_seal_is_not_what_is_judged(locked: Vtl0) -> None:
    table(locked, NEW_TABLE, {7: FRAME | P | RW | NX})
    locked.before_resume = lambda _: table(locked, NEW_TABLE, {7: image.VTL1 | P | RW | NX})
    assert write(locked, image.KERNEL_PD + 8, NEW_TABLE | P | RW) == 0
    assert entry(locked, NEW_TABLE + 56) == FRAME | P | RW | NX | A | D


@pytest.mark.parametrize("target", [image.TEXT, image.VTL1, image.RAM_SIZE])
def test_a_table_is_ordinary_memory_before(locked: Vtl0, target: int) -> None:
    assert write(locked, image.KERNEL_PD + 8, target | P | RW) == -errno.EACCES


def test_a_table_cannot_be_used_at_another_level(locked: Vtl0) -> None:
    """Entries of a page taken for entries of a table would let VTL0 choose tables."""
    assert write(locked, image.KERNEL_PDPT + 8, image.KERNEL_PT | P | RW) == -errno.EACCES
    assert write(locked, PML4 + 8, PML4 | P | RW) == -errno.EACCES


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (0x200000 | P | RW | PS | NX, False),
        (0x200000 | P | PS | NX, True),
        (P | PS | NX, False),
        (0x202000 | P | PS | NX, False),
        (0x40000000 | P | RW | PS | NX, True),
    ],
    ids=["over tables writable", "over tables read-only", "over VTL1", "unaligned", "device"],
)
def test_large_pages(locked: Vtl0, value: int, allowed: bool) -> None:
    assert (write(locked, image.KERNEL_PD + 16, value) == 0) is allowed, locked.log()


def targets(returned: vcpu_pb2.VtlReturn) -> list[int]:
    filters = [update.intercepts for update in returned.updates if update.HasField("intercepts")]
    return list(filters[-1].cr3_targets) if filters else []


def test_a_new_address_space(locked: Vtl0) -> None:
    kernel = {511: entry(locked, PML4 + 511 * 8), 0: entry(locked, PML4)}
    table(locked, NEW_ROOT, kernel)
    cr3 = vcpu_pb2.RegisterWrite(name=registers_pb2.REGISTER_NAME_CR3, old_value=PML4, new_value=NEW_ROOT)
    assert locked.intercept(register_write=cr3).resolution.action == vcpu_pb2.ACTION_DENY
    result = locked.call(Service.WRITE_PAGE_TABLE, NEW_ROOT, 0, PageTableOperation.ADD_ROOT)
    assert result.value == 0, locked.log()
    assert targets(result.returned) == [NEW_ROOT, PML4]
    assert locked.intercept(register_write=cr3).resolution.action == vcpu_pb2.ACTION_COMMIT
    assert locked.call(Service.WRITE_PAGE_TABLE, PML4, 0, PageTableOperation.RELEASE).value == -errno.EBUSY
    result = locked.call(Service.WRITE_PAGE_TABLE, NEW_ROOT, 0, PageTableOperation.RELEASE)
    assert result.value == 0
    assert targets(result.returned) == [PML4]
    assert locked.intercept(register_write=cr3).resolution.action == vcpu_pb2.ACTION_DENY


def test_a_released_table_is_what_its_rule_says(tmp_path: Path) -> None:
    """Not what the policy has for memory that no rule names."""
    named = (
        f"  - {{name: buffer, gpa: {NEW_ROOT:#x}, size: 4096, access: rw-, execute: none}}\n  - {{name: everything else"
    )
    vtl0 = Vtl0(tmp_path, image.kernel())
    try:
        assert vtl0.take_policy(POLICY.replace("  - {name: everything else", named)).value == 0, vtl0.log()
        before = vtl0.machine.memory.code(NEW_ROOT >> 12), vtl0.machine.owner(NEW_ROOT >> 12)
        assert before[1] == "buffer"
        table(vtl0, NEW_ROOT, {511: entry(vtl0, PML4 + 511 * 8), 0: entry(vtl0, PML4)})
        for operation in (PageTableOperation.ADD_ROOT, PageTableOperation.RELEASE):
            assert vtl0.call(Service.WRITE_PAGE_TABLE, NEW_ROOT, 0, operation).value == 0, vtl0.log()
        assert (vtl0.machine.memory.code(NEW_ROOT >> 12), vtl0.machine.owner(NEW_ROOT >> 12)) == before
    finally:
        vtl0.close()


def test_every_vcpu_gets_the_filter_of_the_others(tmp_path: Path) -> None:
    """From the end of boot on all vCPUs are pinned. A filter that lets less pass stops those that run."""
    vtl0 = Vtl0(tmp_path, image.kernel(), vp_count=3)
    try:
        assert vtl0.take_policy(POLICY).value == 0, vtl0.log()
        returned = vtl0.call(Service.LOCK_REGS).returned
        assert not returned.peers, "the others may still boot"
        returned = vtl0.call(Service.SIGNAL_END_OF_BOOT).returned
        assert [peer.vp_index for peer in returned.peers] == [1, 2]
        assert all(peer.update.intercepts.cr3_targets == [PML4] for peer in returned.peers)
        assert all(peer.update.intercepts.cr0_mask for peer in returned.peers)
        assert returned.stop_all
        table(vtl0, NEW_ROOT, {511: entry(vtl0, PML4 + 511 * 8), 0: entry(vtl0, PML4)})
        result = vtl0.call(Service.WRITE_PAGE_TABLE, NEW_ROOT, 0, PageTableOperation.ADD_ROOT)
        assert result.value == 0, vtl0.log()
        assert [list(peer.update.intercepts.cr3_targets) for peer in result.returned.peers] == [[NEW_ROOT, PML4]] * 2
        assert not result.returned.stop_all, "who runs with the old filter exits too often, never too rarely"
        vtl0.machine.filter_changed()
        returned = vtl0.call(Service.PING).returned
        assert len(returned.peers) == 2
        assert returned.stop_all
        assert not vtl0.call(Service.PING).returned.peers
    finally:
        vtl0.close()


def test_an_address_space_with_another_kernel_is_refused(locked: Vtl0) -> None:
    table(locked, NEW_TABLE, {510: NEW_TABLE_2 | P | RW})
    table(locked, NEW_TABLE_2, {})
    table(locked, NEW_ROOT, {511: NEW_TABLE | P | RW, 0: entry(locked, PML4)})
    assert locked.call(Service.WRITE_PAGE_TABLE, NEW_ROOT, 0, PageTableOperation.ADD_ROOT).value == -errno.EACCES
    assert [locked.rights(page) for page in (NEW_ROOT, NEW_TABLE, NEW_TABLE_2)] == ["rwu"] * 3
    assert NEW_ROOT >> 12 not in locked.machine.guard.levels  # type: ignore[union-attr]
    assert write(locked, FREE_PTE, NEW_ROOT | P | RW | NX) == 0


def test_tables_above_ram_or_too_many_are_refused() -> None:
    with pytest.raises(BadTables, match="outside RAM"):
        page_tables.find(5, lambda _gfn: struct.pack("<512Q", *[0x400000 | P] * 512), 1024)
    with pytest.raises(BadTables, match="more than"):
        page_tables.find(
            0, lambda gfn: struct.pack("<512Q", *[(gfn * 512 + n + 1) << 12 | P for n in range(512)]), 1 << 40
        )


def test_a_recursive_mapping_is_found_once() -> None:
    pages = {5: {0: 5 << 12 | P | RW, 1: 6 << 12 | P}, 6: {}}
    found = page_tables.find(
        5, lambda gfn: struct.pack("<512Q", *(pages.get(gfn, {}).get(n, 0) for n in range(512))), 16
    )
    assert found == {5: frozenset({1, 2, 3, 4}), 6: frozenset({1, 2, 3})}


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 4))
def test_normal_entries_need_nothing_from_a_walker(value: int, level: int) -> None:
    result = page_tables.with_accessed(value, level)
    assert result & ~(A | D) == value & ~(A | D)
    if value & P:
        assert result & A
        assert result & D or not page_tables.is_leaf(value, level)
    else:
        assert result == value


@given(st.integers(0, (1 << 64) - 1), st.sets(st.integers(0, 255), min_size=1, max_size=3))
def test_an_accepted_mapping_gives_no_more_than_the_page_has(value: int, codes: set[int]) -> None:
    try:
        page_tables.check_mapping(value | P, codes)
    except BadTables:
        return
    assert not (value & RW and not value & NX)
    for code in codes:
        assert code >> 5 != vcpu_pb2.PAGE_STORE_PRIVATE
        assert not (value & RW) or code & 2
        assert value & NX or code & (8 if value & US else 4)
