"""Text patches, protection requests and kdata: only what the measured image lists, only tighter, nothing read twice."""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor import keys
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import Vtl0
from vtlab.ram import RamFile
from vtlab.services import HEKI_PAGE, HEKI_PATCH, KdataType, Service

NOP5 = bytes.fromhex("0f1f440000")


@pytest.fixture
def policy() -> str:
    return POLICY + "patches: {section: .patches}\n"


def test_a_listed_patch_is_written_by_vtl1(locked: Vtl0) -> None:
    result = locked.patch(image.PATCH_SITE, image.JUMP)
    assert result.value == 0, locked.log()
    assert locked.ram.views[RamFile.SEALED][image.PATCH_SITE : image.PATCH_SITE + 5] == image.JUMP
    assert locked.ram.views[RamFile.WRITABLE][image.PATCH_SITE : image.PATCH_SITE + 5] == NOP5
    invalidated = [list(u.invalidate_code.gfns) for u in result.returned.updates if u.HasField("invalidate_code")]
    assert invalidated == [[image.PATCH_SITE >> 12]]
    assert locked.patch(image.PATCH_SITE, NOP5).value == 0
    assert locked.read(image.PATCH_SITE, 5) == NOP5


def test_a_breakpoint_may_be_set_at_a_listed_site(locked: Vtl0) -> None:
    assert locked.patch(image.PATCH_SITE, b"\xcc").value == 0
    assert locked.patch(image.PATCH_SITE + 1, b"\xcc").value == -errno.ENOENT


def test_a_patch_may_cross_a_page(locked: Vtl0) -> None:
    second = image.TEXT + image.PAGE
    result = locked.patch(image.CROSSING_SITE, image.JUMP, second)
    assert result.value == 0, locked.log()
    assert locked.read(image.CROSSING_SITE, 5) == image.JUMP
    invalidated = [list(u.invalidate_code.gfns) for u in result.returned.updates if u.HasField("invalidate_code")]
    assert invalidated == [[image.TEXT >> 12, second >> 12]]


@pytest.mark.parametrize("second", [0, image.TEXT, image.DATA, image.TEXT + image.PAGE + 3, image.VTL1])
def test_a_crossing_patch_names_the_next_page(locked: Vtl0, second: int) -> None:
    assert locked.patch(image.CROSSING_SITE, image.JUMP, second).value == -errno.EINVAL
    assert locked.read(image.CROSSING_SITE, 5) == NOP5


@pytest.mark.parametrize(
    ("target", "code", "number"),
    [
        (image.PATCH_SITE, bytes.fromhex("e90c000000"), errno.EACCES),
        (image.PATCH_SITE, b"\x90" * 5, errno.EACCES),
        (image.PATCH_SITE, image.JUMP[:4], errno.ENOENT),
        (image.PATCH_SITE + 5, image.JUMP, errno.ENOENT),
        (image.RODATA, image.JUMP, errno.ENOENT),
        (image.VTL1, image.JUMP, errno.ENOENT),
        (image.RAM_SIZE, image.JUMP, errno.ENOENT),
        ((1 << 64) - 5, image.JUMP, errno.ENOENT),
    ],
)
def test_other_patches_are_refused(locked: Vtl0, target: int, code: bytes, number: int) -> None:
    before = bytes(locked.ram.views[RamFile.SEALED])
    assert locked.patch(target, code).value == -number
    assert bytes(locked.ram.views[RamFile.SEALED]) == before


@pytest.mark.parametrize("size", [0, 6, 255])
def test_the_size_of_a_patch(locked: Vtl0, size: int) -> None:
    locked.write(image.FREE, HEKI_PATCH.pack(image.PATCH_SITE, 0, size, image.JUMP))
    assert locked.call(Service.PATCH_TEXT, image.FREE, 0).value == -errno.EINVAL


def test_the_structure_itself_may_cross_a_page(locked: Vtl0) -> None:
    """Its second half is anywhere, as two pages of virtual memory may be."""
    data = HEKI_PATCH.pack(image.PATCH_SITE, 0, 5, image.JUMP)
    first, second = image.FREE + image.PAGE - 10, image.FREE + 5 * image.PAGE
    locked.write(first, data[:10])
    locked.write(second, data[10:])
    assert locked.call(Service.PATCH_TEXT, first, 0).value == -errno.EINVAL
    assert locked.call(Service.PATCH_TEXT, first, second + 8).value == -errno.EINVAL
    assert locked.call(Service.PATCH_TEXT, first, image.VTL1).value == -errno.EFAULT
    assert locked.call(Service.PATCH_TEXT, first, second).value == 0


@pytest.mark.parametrize("pa", [image.VTL1, image.RAM_SIZE - 8, 1 << 60])
def test_the_structure_must_be_readable_by_vtl0(locked: Vtl0, pa: int) -> None:
    assert locked.call(Service.PATCH_TEXT, pa, 0).value in (-errno.EFAULT, -errno.EINVAL)


# ----------------------------------------------------------------------------------------------- PROTECT_MEMORY


def booting(vtl0: Vtl0, policy: str) -> Vtl0:
    assert vtl0.take_policy(policy).value == 0, vtl0.log()
    return vtl0


def protect(vtl0: Vtl0, *rows: tuple[int, int, int], count: int | None = None) -> int:
    pa, real = vtl0.ranges([(start, start, end, attributes) for start, end, attributes in rows])
    return vtl0.call(Service.PROTECT_MEMORY, pa, real if count is None else count).value


def test_the_guest_can_give_rights_up(vtl0: Vtl0, policy: str) -> None:
    booting(vtl0, policy)
    page = image.FREE + 0x8000
    assert protect(vtl0, (page, page + 0x2000, 1), (image.TEXT, image.TEXT + 0x1000, 1)) == 0, vtl0.log()
    assert vtl0.rights(page + 0x1000) == "ru"
    assert vtl0.rights(image.TEXT) == "r"
    assert vtl0.rights(image.TEXT + 0x1000) == "rk"
    assert protect(vtl0, (page, page + 0x1000, 3)) == -errno.EACCES


def test_single_pages_and_runs_in_one_list_in_any_order(vtl0: Vtl0, policy: str) -> None:
    booting(vtl0, policy)
    page = image.FREE + 0x8000
    rows = [(page + 0x6000, 1), (page, 1), (image.TEXT, 1), (page + 0x1000, 3)]
    asked = [(start, start + 0x1000, wanted) for start, wanted in rows] + [(page + 0x2000, page + 0x4000, 1)]
    assert protect(vtl0, *asked) == 0, vtl0.log()
    assert [vtl0.rights(page + 0x1000 * n) for n in range(7)] == ["ru", "rwu", "ru", "ru", "rwu", "rwu", "ru"]
    assert vtl0.rights(image.TEXT) == "r"
    assert vtl0.machine.memory.owner(page >> 12) == vtl0.machine.memory.owner(page + 0x6000 >> 12) == "services"


@pytest.mark.parametrize("last", [1, 2])
def test_of_many_single_pages_the_refused_one_is_named_and_none_is_protected(
    vtl0: Vtl0, policy: str, last: int
) -> None:
    booting(vtl0, policy)
    page = image.FREE + 0x8000
    assert protect(vtl0, (page + 0x3000, page + 0x4000, 1)) == 0
    rows = [(page + 0x1000 * n, page + 0x1000 * (n + 1), 3 if n == 3 else 1) for n in (0, 3, 5)]
    assert protect(vtl0, *rows, (page + 0x8000, page + 0x8000 + 0x1000 * last, 1)) == -errno.EACCES
    assert f"{page + 0x3000:#x}" in vtl0.log()[-1]
    assert vtl0.rights(page) == vtl0.rights(page + 0x8000) == "rwu"


@pytest.mark.parametrize("order", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_page_is_named_once(vtl0: Vtl0, policy: str, order: tuple[int, ...]) -> None:
    booting(vtl0, policy)
    page = image.FREE + 0x8000
    rows = [(page + 0x1000 * n, page + 0x1000 * (n + 1), 1) for n in order]
    assert protect(vtl0, *rows) == -errno.EINVAL
    assert vtl0.rights(page) == "rwu"


@pytest.mark.parametrize(
    ("row", "number"),
    [
        ((image.TEXT, image.TEXT + 0x1000, 3), errno.EACCES),
        ((image.RODATA, image.RODATA + 0x1000, 5), errno.EACCES),
        ((image.FREE, image.FREE + 0x1000, 5), errno.EACCES),
        ((image.FREE, image.FREE + 0x1000, 7), errno.EACCES),
        ((image.VTL1, image.VTL1 + 0x1000, 1), errno.EACCES),
        ((image.DATA, image.VTL1 + 0x1000, 1), errno.EACCES),
        ((image.KERNEL_PT, image.KERNEL_PT + 0x1000, 3), errno.EACCES),
        ((image.KERNEL_PT, image.KERNEL_PT + 0x1000, 1), errno.EACCES),
        ((image.FREE, image.FREE + 0x1000, 0), errno.EINVAL),
        ((image.FREE, image.FREE + 0x1000, 2), errno.EINVAL),
        ((image.FREE, image.FREE + 0x1000, 9), errno.EINVAL),
        ((image.FREE + 8, image.FREE + 0x1000, 1), errno.EINVAL),
        ((image.FREE, image.FREE + 0x1008, 1), errno.EINVAL),
        ((image.FREE, image.FREE, 1), errno.EINVAL),
        ((image.FREE, 0, 1), errno.EINVAL),
        ((image.FREE, image.RAM_SIZE + 0x1000, 1), errno.EFAULT),
        ((image.FREE, 1 << 63, 1), errno.EFAULT),
    ],
)
def test_nothing_is_relaxed_and_nothing_is_half_done(
    vtl0: Vtl0, policy: str, row: tuple[int, int, int], number: int
) -> None:
    booting(vtl0, policy)
    before = dict(vtl0.access)
    page = image.FREE + 0x8000
    assert protect(vtl0, (page, page + 0x1000, 1), row) == -number
    assert vtl0.access == before


def test_ranges_of_one_request_are_disjoint(vtl0: Vtl0, policy: str) -> None:
    booting(vtl0, policy)
    page = image.FREE + 0x8000
    assert protect(vtl0, (page, page + 0x2000, 1), (page + 0x1000, page + 0x3000, 1)) == -errno.EINVAL


@pytest.mark.parametrize("count", [0, 2, 128, 5000, 1 << 60])
def test_the_number_of_ranges_is_that_of_the_list(vtl0: Vtl0, policy: str, count: int) -> None:
    booting(vtl0, policy)
    assert protect(vtl0, (image.FREE, image.FREE + 0x1000, 1), count=count) == -errno.EINVAL


def test_a_chain_of_pages(vtl0: Vtl0, policy: str) -> None:
    booting(vtl0, policy)
    second, target = image.FREE + 0x1000, image.FREE + 0x8000
    vtl0.ranges([(0, target, target + 0x1000, 1)], second)
    vtl0.ranges([(0, target + 0x1000, target + 0x2000, 1)])
    vtl0.write(image.FREE, HEKI_PAGE.pack(0xDEAD, second, 1))
    assert vtl0.call(Service.PROTECT_MEMORY, image.FREE, 2).value == 0, vtl0.log()
    assert vtl0.rights(target) == vtl0.rights(target + 0x1000) == "ru"


def test_a_chain_that_bites_its_tail_ends(vtl0: Vtl0, policy: str) -> None:
    booting(vtl0, policy)
    vtl0.ranges([(0, image.FREE, image.FREE + 0x1000, 1)])
    vtl0.write(image.FREE, HEKI_PAGE.pack(0, image.FREE, 1))
    assert vtl0.call(Service.PROTECT_MEMORY, image.FREE, 4096).value == -errno.EINVAL


@pytest.mark.parametrize("next_pa", [image.VTL1, image.RAM_SIZE, 1 << 52])
def test_a_chain_cannot_lead_into_vtl1(vtl0: Vtl0, policy: str, next_pa: int) -> None:
    booting(vtl0, policy)
    vtl0.ranges([(0, image.FREE + 0x8000, image.FREE + 0x9000, 1)])
    vtl0.write(image.FREE, HEKI_PAGE.pack(0, next_pa, 1))
    assert vtl0.call(Service.PROTECT_MEMORY, image.FREE, 2).value == -errno.EFAULT
    assert vtl0.rights(image.FREE + 0x8000) == "rwu"


def test_the_list_is_copied_once(vtl0: Vtl0, policy: str) -> None:
    """No page of the list is read a second time, whatever VTL0 writes in between."""
    booting(vtl0, policy)
    reads: list[tuple[int, int]] = []
    read = vtl0.machine.memory.read

    def counted(gpa: int, size: int) -> bytes:
        reads.append((gpa, size))
        return read(gpa, size)

    vtl0.machine.memory.read = counted  # type: ignore[method-assign]
    page = image.FREE + 0x8000
    vtl0.before_resume = lambda _: vtl0.ranges([(0, image.TEXT, image.TEXT + 0x1000, 3)])
    assert protect(vtl0, (page, page + 0x1000, 1)) == 0
    assert reads == [(image.FREE, 4096)]
    assert vtl0.rights(image.TEXT) == "rk"


# ----------------------------------------------------------------------------------------------- LOAD_KDATA


@pytest.fixture
def certificates() -> bytes:
    return keys.der("module signer")


def kdata(vtl0: Vtl0, start: int, end: int, kind: int) -> int:
    pa, count = vtl0.ranges([(0, start, end, kind)])
    return vtl0.call(Service.LOAD_KDATA, pa, count).value


def test_kdata_comes_from_measured_memory(vtl0: Vtl0, certificates: bytes) -> None:
    booting(vtl0, POLICY)
    end = image.CERTIFICATES + len(certificates)
    assert kdata(vtl0, image.CERTIFICATES, end, KdataType.SYSTEM_CERTIFICATES) == 0, vtl0.log()
    assert kdata(vtl0, image.PATCHES, image.PATCHES + 72, KdataType.PATCH_INFO) == 0
    assert len(vtl0.machine.kdata.signers()) == 1
    assert vtl0.patch(image.PATCH_SITE, image.JUMP).value == 0
    assert kdata(vtl0, image.CERTIFICATES, end, KdataType.REVOCATION_CERTIFICATES) == 0
    assert vtl0.machine.kdata.signers() == []


@pytest.mark.parametrize(
    ("start", "size", "kind", "number"),
    [
        (image.FREE + 0x1000, 744, KdataType.SYSTEM_CERTIFICATES, errno.EACCES),
        (image.HYPERCALL_PAGE, 100, KdataType.SYSTEM_CERTIFICATES, errno.EACCES),
        (image.VTL1, 100, KdataType.SYSTEM_CERTIFICATES, errno.EACCES),
        (image.CERTIFICATES, 2 << 20, KdataType.SYSTEM_CERTIFICATES, errno.ERANGE),
        (image.RODATA, 100, KdataType.SYSTEM_CERTIFICATES, errno.EINVAL),
        (image.TEXT, 48, KdataType.PATCH_INFO, errno.EINVAL),
        (image.CERTIFICATES, 100, 2, 95),
        (image.CERTIFICATES, 100, 99, 95),
    ],
)
def test_other_kdata_is_refused(vtl0: Vtl0, start: int, size: int, kind: int, number: int) -> None:
    booting(vtl0, POLICY)
    vtl0.write(image.FREE + 0x1000, keys.der("module signer"))
    assert kdata(vtl0, start, start + size, kind) == -number


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    service=st.sampled_from([s for s in Service if s is not Service.TAKE_POLICY]) | st.integers(0, 1 << 64).map(int),
    arguments=st.tuples(
        *[
            st.sampled_from([0, 1, 4, image.FREE, image.FREE + 8, image.VTL1, image.KERNEL_PT, image.TEXT, 1 << 63])
            | st.integers(0, (1 << 64) - 1)
        ]
        * 3
    ),
    content=st.binary(max_size=256),
)
def test_no_call_breaks_vtl1_or_opens_anything(
    locked: Vtl0, service: int, arguments: tuple[int, int, int], content: bytes
) -> None:
    """Whatever VTL0 asks: an answer, VTL1's memory closed, sealed memory as the patch list allows."""
    locked.write(image.FREE, content)
    result = locked.call(service % (1 << 64), *arguments)
    assert not locked.machine.broken
    assert -4096 < result.value <= 0
    assert locked.rights(image.VTL1) == ""
    assert locked.rights(image.TEXT) == "rk"
    assert locked.read(image.TEXT, 64) == image.text_bytes()[:64]
