"""kexec and kdump: sealed before they are looked at, executed from the sealed bytes, in one step with standing down."""

from __future__ import annotations

import errno
import hashlib
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor import keys
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import Vtl0
from vtl1_monitor import kexec_image
from vtl1_monitor.kexec_image import INFORMATION, BadKernel, KexecModule, information, read_kernel, read_modules
from vtlab.client.kexec import kernel_image
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.services import KEXEC_KIMAGE, KEXEC_MODULE, KexecType, Service
from vtlab.v1 import vcpu_pb2

EKEYREJECTED = 129
FILE, KIMAGE, LIST, KEPT, MODULE = 0x300000, image.FREE, image.FREE + 0x4000, 0x3C0000, 0x380000
MINIMUM = POLICY + "lifecycle: {minimum_kernel_version: 2}\n"
LINE = "heki=1"


def next_elf() -> bytes:
    """The made-up kernel with a physical entry and other data."""
    elf = bytearray(image.kernel(certificates=keys.der("good")).elf())
    elf[24:32] = struct.pack("<Q", image.TEXT + 4)
    return bytes(elf).replace(b"data data data d", b"other data here!")


def signed(version: int = 2, name: str = "good", elf: bytes | None = None) -> bytes:
    data = kernel_image(elf or next_elf(), version, LINE)
    return keys.appended(data, keys.cms(data, name))


@pytest.fixture
def certificates() -> bytes:
    return keys.der("good")


@pytest.fixture
def policy() -> str:
    return MINIMUM + "modules: {certificate_section: .certificates}\n"


def rows(file: bytes, *, kept: bool = False) -> list[tuple[int, int, int, int]]:
    """The file in two ranges, so that both are read."""
    end = FILE + len(file)
    result: list[tuple[int, int, int, int]] = [
        (0, KIMAGE, KIMAGE + PAGE_SIZE, KexecType.KIMAGE),
        (0, FILE, FILE + PAGE_SIZE, KexecType.KERNEL),
        (0, FILE + PAGE_SIZE, end, KexecType.KERNEL),
    ]
    if kept:
        result.append((0, KEPT, KEPT + 0x20000, KexecType.PAGES))
    return result


def validate(vtl0: Vtl0, file: bytes, crash: bool = False, modules: tuple[tuple[int, int], ...] = ()) -> int:
    vtl0.write(FILE, file)
    entries = b"".join(KEXEC_MODULE.pack(start, end, b"module") for start, end in modules)
    vtl0.write(KIMAGE, KEXEC_KIMAGE.pack(len(modules)) + entries)
    pa, count = vtl0.ranges(rows(file, kept=crash), LIST)
    return vtl0.call(Service.KEXEC_VALIDATE, pa, count, int(crash)).value


def execute(vtl0: Vtl0, crash: bool = False) -> vcpu_pb2.VtlReturn:
    """As the VMM serves the call: its protections applied."""
    vtl0.registers.rdi, vtl0.registers.rsi = Service.KEXEC_EXECUTE, int(crash)
    exit_ = vtl0.enter(vcpu_pb2.ENTER_REASON_VTL_CALL, registers=vtl0.registers)
    while exit_.WhichOneof("reason") == "protect":
        for update in exit_.protect.protections:
            vtl0.apply(update)
        exit_ = vtl0.enter(vcpu_pb2.ENTER_REASON_RESUME, status=0)
    return exit_.vtl_return


def test_the_image_is_sealed_until_it_is_released(locked: Vtl0) -> None:
    assert validate(locked, signed()) == 0
    assert [locked.rights(gpa) for gpa in (KIMAGE, FILE, FILE + PAGE_SIZE)] == ["r", "r", "r"]
    assert locked.rights(LIST) == "rwu"
    assert locked.call(Service.KEXEC_VALIDATE, 0, 0, 0).value == 0
    assert [locked.rights(gpa) for gpa in (KIMAGE, FILE)] == ["rwu", "rwu"]
    assert locked.call(Service.KEXEC_EXECUTE, 0).value == -errno.ENOENT


def test_standing_down_puts_the_sealed_kernel_in_place(locked: Vtl0) -> None:
    file, elf = signed(), next_elf()
    assert validate(locked, file, modules=((MODULE, MODULE + 100),)) == 0
    locked.write(FILE, bytes(len(file)))  # by a process that has the other file only
    answer = execute(locked).stand_down
    sealed = locked.ram.views[RamFile.SEALED]
    assert sealed[image.DATA : image.DATA + 16] == b"other data here!"
    assert sealed[image.TEXT : image.TEXT + 64] == image.text_bytes()[:64]
    assert not any(sealed[image.VTL1 : image.VTL1 + 2 * PAGE_SIZE])
    assert answer.entry.registers.rip == image.TEXT + 4
    assert (answer.entry.registers.rax, answer.entry.registers.rbx) == (0x2BADB002, INFORMATION)
    places = zip(answer.image[::2], answer.image[1::2], strict=True)
    assert b"".join(sealed[gpa : gpa + size] for gpa, size in places) == elf
    assert answer.image_sha256 == hashlib.sha256(elf).digest()


def test_nothing_is_open_and_no_secret_is_left_when_vtl1_stands_down(locked: Vtl0) -> None:
    locked.ram.views[RamFile.PRIVATE][image.VTL1 : image.VTL1 + 6] = b"secret"
    assert validate(locked, signed()) == 0
    assert execute(locked).HasField("stand_down")
    assert {locked.rights(gfn * PAGE_SIZE) for gfn in range(image.RAM_SIZE // PAGE_SIZE)} == {""}
    assert not any(locked.ram.views[RamFile.PRIVATE][:])
    assert locked.file(image.DATA) is RamFile.SEALED
    assert locked.call(Service.PING).returned.resolution.action == vcpu_pb2.ACTION_HALT
    write = vcpu_pb2.MsrAccess(index=0xC0000082, write=True, new_value=1)
    assert locked.intercept(msr=write).resolution.action == vcpu_pb2.ACTION_HALT


def test_a_crash_kernel_finds_what_it_lies_on_but_no_secret(locked: Vtl0) -> None:
    locked.ram.views[RamFile.PRIVATE][image.VTL1 : image.VTL1 + 6] = b"secret"
    assert validate(locked, signed(), crash=True) == 0
    locked.write(image.DATA, b"state of a crash")
    assert locked.call(Service.KEXEC_EXECUTE, 0).value == -errno.ENOENT  # the other purpose has none
    assert execute(locked, crash=True).HasField("stand_down")
    sealed = locked.ram.views[RamFile.SEALED]
    kept = sealed[KEPT : KEPT + 0x20000]
    assert kept[image.DATA - image.TEXT :][:16] == b"state of a crash"
    assert kept[:64] == image.text_bytes()[:64]
    assert b"secret" not in kept
    assert f"{LINE} kept={KEPT:#x}+0x20000@{image.TEXT:#x}\0".encode() in sealed[INFORMATION : INFORMATION + 4096]


@pytest.mark.parametrize(
    ("file", "modules", "result", "why"),
    [
        (lambda: signed(version=1), (), -EKEYREJECTED, "version 1 is older than 2"),
        (lambda: signed(name="stranger"), (), -EKEYREJECTED, "nobody known"),
        (lambda: signed().replace(LINE.encode(), b"heki=0"), (), -EKEYREJECTED, "does not match"),
        (lambda: kernel_image(next_elf(), 2, LINE), (), -EKEYREJECTED, "not signed"),
        (lambda: signed(elf=image.kernel().elf()), (), -EKEYREJECTED, "entry"),
        (lambda: signed(elf=b"no ELF file" * 600), (), -EKEYREJECTED, "no ELF"),
        (signed, ((image.TEXT, image.TEXT + 1),), -EKEYREJECTED, "where the kernel goes"),
        (signed, ((0x1000, 0x2000),), -EKEYREJECTED, "above 1 MiB"),
    ],
    ids=["old", "stranger", "line", "unsigned", "entry", "no-elf", "module-below", "module-low"],
)
def test_a_refused_image_is_ordinary_memory(
    locked: Vtl0, file: Callable[[], bytes], modules: tuple[tuple[int, int], ...], result: int, why: str
) -> None:
    assert validate(locked, file(), modules=modules) == result
    assert why in locked.log()[-1]
    assert [locked.rights(gpa) for gpa in (KIMAGE, FILE)] == ["rwu", "rwu"]
    assert locked.call(Service.KEXEC_EXECUTE, 0).value == -errno.ENOENT


@pytest.mark.parametrize("kind", list(KexecType))
@pytest.mark.parametrize("gpa", [image.VTL1, image.TEXT, image.PML4], ids=["vtl1", "text", "page-table"])
def test_ranges_over_what_is_guarded_are_refused_and_change_nothing(locked: Vtl0, kind: KexecType, gpa: int) -> None:
    before = locked.rights(gpa)
    listed = [row for row in rows(signed(), kept=True) if row[3] != kind] + [(0, gpa, gpa + PAGE_SIZE, kind)]
    pa, count = locked.ranges(listed, LIST)
    assert locked.call(Service.KEXEC_VALIDATE, pa, count, 1).value == -errno.EACCES
    assert locked.rights(gpa) == before
    assert locked.rights(FILE) == "rwu"


def test_the_list_is_read_once(locked: Vtl0) -> None:
    """It is changed while the image is being sealed; what was sealed is what was read."""
    file = signed()

    def change(_number: int) -> None:
        locked.ranges([(0, image.VTL1, image.VTL1 + PAGE_SIZE, KexecType.KERNEL)] * 3, LIST)

    locked.before_resume = change
    assert validate(locked, file) == 0
    assert execute(locked).stand_down.image[0] // PAGE_SIZE == FILE // PAGE_SIZE


def test_an_image_changed_while_it_is_sealed_is_refused_or_the_one_that_was_signed(locked: Vtl0) -> None:
    locked.before_resume = lambda _number: locked.write(FILE + 200, b"changed too late")
    assert validate(locked, signed()) == 0
    assert b"changed too late" not in locked.ram.views[RamFile.SEALED][FILE : FILE + 0x10000]


@pytest.mark.parametrize("crash", [2, 1 << 40])
def test_a_purpose_that_is_none(locked: Vtl0, crash: int) -> None:
    assert locked.call(Service.KEXEC_EXECUTE, crash).value == -errno.EINVAL
    assert locked.call(Service.KEXEC_VALIDATE, 0, 0, crash).value == -errno.EINVAL


def test_the_policy_can_refuse(vtl0: Vtl0) -> None:
    vtl0.lock(POLICY + "lifecycle: {kexec: refuse}\n")
    assert validate(vtl0, signed()) == -errno.EPERM
    assert vtl0.call(Service.KEXEC_EXECUTE, 0).value == -errno.EPERM
    assert vtl0.call(Service.KEXEC_EXECUTE, 1).value == -errno.ENOENT
    assert "kexec: refused" in vtl0.machine.status().rules


# -------------------------------------------------------------------------------------------------------- the format


@given(st.binary(max_size=400))
def test_any_image_is_read_or_refused(data: bytes) -> None:
    whole = kernel_image(next_elf(), 2, LINE)
    for candidate in (data, data + whole[len(data) :]):
        try:
            kernel = read_kernel(candidate, image.RAM_SIZE)
        except BadKernel:
            continue
        assert kexec_image.LOW_END <= kernel.first < kernel.end <= image.RAM_SIZE


@given(st.binary(max_size=200))
def test_any_list_of_modules_is_read_or_refused(data: bytes) -> None:
    try:
        modules = read_modules(data)
    except BadKernel:
        return
    assert len(modules) == KEXEC_KIMAGE.unpack_from(data)[0]


@given(st.lists(st.binary(max_size=20).map(lambda name: name.replace(b"\0", b"")), max_size=8))
def test_the_information_structure_is_multiboots(names: list[bytes]) -> None:
    given_modules = [KexecModule(0x200000 + n, 0x200010 + n, name) for n, name in enumerate(names)]
    data = information(b"line", given_modules, 64 << 20)

    def text(at: int) -> bytes:
        return data[at - INFORMATION :].partition(b"\0")[0]

    flags, lower, upper, _, line, count, at = struct.unpack_from("<7I", data)
    assert (flags, lower, upper, count) == (1 | 4 | 8, 639, (63 << 20) >> 10, len(names))
    assert text(line) == b"line"
    for number, module in enumerate(given_modules):
        start, end, name, reserved = struct.unpack_from("<4I", data, at - INFORMATION + 16 * number)
        assert (start, end, text(name), reserved) == (*module, 0)
