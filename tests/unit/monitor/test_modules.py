"""Modules: real signatures, sealed before they are verified, compared with what is loaded."""

from __future__ import annotations

import errno
import struct

import pytest
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7Options
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor import keys
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import Result, Vtl0
from vtl1_monitor import cms
from vtl1_monitor.cms import load_certificates
from vtl1_monitor.module_file import BadModule, expected_sections, split
from vtl1_monitor.rights import GUARDED_TABLE
from vtlab.services import ModuleType, PageTableOperation, Service

EKEYREJECTED = 129
FILE, TEXT, RODATA, DATA, LIST = (image.FREE + n * 0x4000 for n in (1, 2, 3, 4, 5))
TEXT_VA, RODATA_VA, DATA_VA = image.KERNEL + 0x300000, image.KERNEL + 0x304000, image.KERNEL + 0x308000

CODE = bytes.fromhex("e800000000 488b0500000000 48b8 0000000000000000 c3".replace(" ", ""))
"""call printk; mov rax, [rip + data]; movabs rax, table; ret. Relocations at 1, 8 and 14."""


def module_elf(code: bytes = CODE, relocation: int = 4, symbol: bytes = b"printk") -> bytes:
    """A relocatable file with .text, .rodata, .data and relocations of .text."""
    names = b"\0.text\0.rodata\0.data\0.rela.text\0.symtab\0.strtab\0"
    strings = b"\0" + symbol + b"\0"
    sections: list[tuple[str, int, int, bytes, int, int, int]] = [
        (".text", 1, 6, code, 0, 0, 0),
        (".rodata", 1, 2, b"a table of constants", 0, 0, 0),
        (".data", 1, 3, b"data", 0, 0, 0),
    ]
    symbols = bytes(24)
    symbols += struct.pack("<IBBHQQ", 1, 0x10, 0, 0, 0, 0)  # undefined: of the kernel
    symbols += struct.pack("<IBBHQQ", 0, 0x03, 0, 3, 0, 0)  # .data
    symbols += struct.pack("<IBBHQQ", 0, 0x03, 0, 2, 0, 0)  # .rodata
    rela = struct.pack("<QIIq", 1, relocation, 1, -4)
    rela += struct.pack("<QIIq", 8, 2, 2, -4)
    rela += struct.pack("<QIIq", 14, 1, 3, 2)
    sections += [
        (".rela.text", 4, 0, rela, 5, 1, 24),
        (".symtab", 2, 0, symbols, 6, 1, 24),
        (".strtab", 3, 0, strings, 0, 0, 0),
    ]
    body = bytearray(64)
    headers = [bytes(64)]
    for name, kind, flags, data, link, info, size in sections:
        place = names.index(name.encode() + b"\0")
        headers.append(struct.pack("<IIQQQQIIQQ", place, kind, flags, 0, len(body), len(data), link, info, 1, size))
        body += data
    headers.append(struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, len(body), len(names), 0, 0, 1, 0))
    body += names
    body[:64] = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, len(body), 0, 64, 0, 0, 64, len(headers), len(headers) - 1
    )
    return bytes(body) + b"".join(headers)


def loaded_text() -> bytes:
    """The code where it was loaded, worked out by hand."""
    text = bytearray(CODE)
    text[1:5] = struct.pack("<i", image.KERNEL + image.TEXT + 0x80 - 4 - (TEXT_VA + 1))
    text[8:12] = struct.pack("<i", DATA_VA - 4 - (TEXT_VA + 8))
    text[14:22] = struct.pack("<Q", RODATA_VA + 2)
    return bytes(text)


@pytest.fixture
def certificates() -> bytes:
    """Two certificates, one after the other."""
    return keys.der("module signer") + keys.der("second signer", 0)


@pytest.fixture
def policy() -> str:
    """VTL1 takes certificates from the section by itself."""
    return POLICY + "modules: {certificate_section: .certificates}\n"


class Loader:
    """Loads a module as a kernel would, then asks VTL1."""

    def __init__(self, vtl0: Vtl0) -> None:
        self.vtl0 = vtl0
        self.file = keys.appended(module_elf(), keys.cms(module_elf(), "module signer"))
        self.text = loaded_text()
        self.rodata = b"a table of constants"
        self.rows: list[tuple[int, int, int, int]] = []

    def load(self) -> None:
        self.vtl0.write(FILE, self.file)
        self.vtl0.write(TEXT, self.text.ljust(image.PAGE, b"\xcc"))
        self.vtl0.write(RODATA, self.rodata.ljust(image.PAGE, b"\0"))
        self.vtl0.write(DATA, b"data")
        self.rows = self.rows or [
            (0, FILE, FILE + len(self.file), ModuleType.ELF),
            (TEXT_VA, TEXT, TEXT + len(self.text), ModuleType.TEXT),
            (RODATA_VA, RODATA, RODATA + len(self.rodata), ModuleType.RODATA),
            (DATA_VA, DATA, DATA + 4, ModuleType.DATA),
        ]

    def validate(self, flags: int = 0) -> Result:
        self.load()
        pa, count = self.vtl0.ranges(self.rows, LIST)
        return self.vtl0.call(Service.VALIDATE_MODULE, pa, count, flags)


@pytest.fixture
def loader(locked: Vtl0) -> Loader:
    return Loader(locked)


def rights(vtl0: Vtl0) -> tuple[str, ...]:
    return tuple(vtl0.rights(gpa) for gpa in (FILE, TEXT, RODATA, DATA))


ORDINARY = ("rwu",) * 4


def test_a_signed_module_may_run(loader: Loader) -> None:
    vtl0 = loader.vtl0
    assert loader.validate().value == 1, vtl0.log()
    assert rights(vtl0) == ("rwu", "rk", "r", "rwu")
    assert vtl0.read(TEXT, len(CODE)) == loaded_text()
    assert vtl0.call(Service.UNLOAD_MODULE, 1).value == 0
    assert rights(vtl0) == ORDINARY
    assert vtl0.call(Service.UNLOAD_MODULE, 1).value == -errno.ENOENT


def test_a_key_on_a_curve(loader: Loader) -> None:
    loader.file = keys.appended(module_elf(), keys.cms(module_elf(), "second signer", 0))
    assert loader.validate().value > 0, loader.vtl0.log()


def _unsigned(loader: Loader) -> None:
    loader.file = module_elf()


def _changed(loader: Loader) -> None:
    loader.file = loader.file.replace(b"a table of constants", b"a table of CONSTANTS")


def _by_somebody_else(loader: Loader) -> None:
    loader.file = keys.appended(module_elf(), keys.cms(module_elf(), "stranger"))


def _weak_key(loader: Loader) -> None:
    loader.file = keys.appended(module_elf(), keys.cms(module_elf(), "weak", 1024))


def _with_attributes(loader: Loader) -> None:
    options = (PKCS7Options.DetachedSignature, PKCS7Options.Binary, PKCS7Options.NoCerts)
    loader.file = keys.appended(module_elf(), keys.cms(module_elf(), "module signer", options=options))


def _not_detached(loader: Loader) -> None:
    options = (PKCS7Options.Binary, PKCS7Options.NoAttributes, PKCS7Options.NoCerts)
    loader.file = keys.appended(module_elf(), keys.cms(module_elf(), "module signer", options=options))


def _other_type(loader: Loader) -> None:
    data = bytearray(loader.file)
    data[-28 - 12 + 2] = 1
    loader.file = bytes(data)


def _length_beyond(loader: Loader) -> None:
    data = bytearray(loader.file)
    data[-28 - 4 : -28] = struct.pack(">I", 1 << 31)
    loader.file = bytes(data)


def _other_text(loader: Loader) -> None:
    loader.text = loaded_text()[:-1] + b"\x90"


def _wrong_relocation(loader: Loader) -> None:
    loader.text = CODE


def _code_behind_the_text(loader: Loader) -> None:
    loader.text = loaded_text() + b"\xcc" * 100 + b"\x0f\x22\xe0"


def _other_rodata(loader: Loader) -> None:
    loader.rodata = b"A table of constants"


@pytest.mark.parametrize(
    "spoil",
    [
        _unsigned,
        _changed,
        _by_somebody_else,
        _weak_key,
        _with_attributes,
        _not_detached,
        _other_type,
        _length_beyond,
        _other_text,
        _wrong_relocation,
        _code_behind_the_text,
        _other_rodata,
    ],
)
def test_anything_else_is_rejected_and_undone(loader: Loader, spoil: object) -> None:
    spoil(loader)  # type: ignore[operator]
    assert loader.validate().value == -EKEYREJECTED
    assert rights(loader.vtl0) == ORDINARY
    assert loader.vtl0.read(TEXT, len(loader.text)) == loader.text


def test_the_file_is_verified_where_vtl0_cannot_write(loader: Loader) -> None:
    """After the seal VTL0 exchanges file and text in ram.rw: neither is looked at."""
    good = loader.file

    def exchange(_number: int) -> None:
        loader.vtl0.write(FILE, b"\0" * len(good))
        loader.vtl0.write(TEXT, b"\x90" * 64)

    loader.vtl0.before_resume = exchange
    assert loader.validate().value == 1, loader.vtl0.log()
    assert loader.vtl0.read(TEXT, len(CODE)) == loaded_text()


def test_the_list_is_read_once(loader: Loader) -> None:
    """VTL0 rewrites the list while VTL1 waits for the seal: the ranges judged are the ranges opened."""

    def rewrite(_number: int) -> None:
        loader.vtl0.ranges([(TEXT_VA, image.DATA, image.DATA + 4096, ModuleType.TEXT)] * 4, LIST)

    loader.vtl0.before_resume = rewrite
    assert loader.validate().value == 1
    assert loader.vtl0.rights(image.DATA) == "rwu"


@pytest.mark.parametrize(
    ("target", "number"),
    [
        (image.VTL1, errno.EACCES),
        (image.TEXT, errno.EACCES),
        (image.KERNEL_PT, errno.EACCES),
        (image.RAM_SIZE - 4, errno.EFAULT),
        (TEXT + 8, errno.EINVAL),
    ],
)
def test_memory_that_is_not_ordinary_is_no_module(loader: Loader, target: int, number: int) -> None:
    loader.load()
    loader.rows[1] = (TEXT_VA, target, target + 16, ModuleType.TEXT)
    before = dict(loader.vtl0.access)
    assert loader.validate().value == -number
    assert loader.vtl0.access == before


def test_ranges_may_not_overlap(loader: Loader) -> None:
    loader.load()
    loader.rows.append((DATA_VA, TEXT, TEXT + 16, ModuleType.DATA))
    assert loader.validate().value == -errno.EINVAL


def test_other_malformed_requests(loader: Loader) -> None:
    assert loader.validate(flags=1).value == -errno.EINVAL
    loader.rows = [row for row in loader.rows if row[3] != ModuleType.ELF]
    assert loader.validate().value == -errno.EINVAL
    loader.rows = [(0, FILE, FILE + 16, 99)]
    assert loader.validate().value == -errno.EINVAL


def test_text_mapped_elsewhere_was_not_relocated_for_there(loader: Loader) -> None:
    loader.load()
    loader.rows[1] = (image.KERNEL + image.DATA, TEXT, TEXT + len(loader.text), ModuleType.TEXT)
    assert loader.validate().value == -EKEYREJECTED


def test_init_memory_goes_and_read_only_comes(loader: Loader) -> None:
    loader.load()
    loader.rows[3] = (DATA_VA, DATA, DATA + 4, ModuleType.DATA)
    extra = image.FREE + 0x18000
    loader.rows += [
        (DATA_VA + 0x1000, extra, extra + 16, ModuleType.INIT_TEXT),
        (DATA_VA + 0x2000, extra + 0x1000, extra + 0x1010, ModuleType.RO_AFTER_INIT),
    ]
    assert loader.validate().value == 1, loader.vtl0.log()
    assert (loader.vtl0.rights(extra), loader.vtl0.rights(extra + 0x1000)) == ("rk", "rwu")
    assert loader.vtl0.call(Service.FREE_MODULE_INIT, 1).value == 0
    assert (loader.vtl0.rights(extra), loader.vtl0.rights(extra + 0x1000)) == ("rwu", "r")
    assert loader.vtl0.call(Service.UNLOAD_MODULE, 1).value == 0
    assert loader.vtl0.rights(extra + 0x1000) == "rwu"


def test_a_revoked_signer_is_nobody(loader: Loader, locked: Vtl0) -> None:
    signer = locked.machine.kdata.certificates[0]
    locked.machine.kdata.revoked.add((signer.issuer.public_bytes(), signer.serial_number))
    assert loader.validate().value == -EKEYREJECTED


class TestWithoutCertificates:
    @pytest.fixture
    def policy(self) -> str:
        return POLICY

    def test_nothing_is_let_in(self, loader: Loader) -> None:
        assert loader.validate().value == -errno.EACCES
        assert loader.vtl0.protects > 0
        assert rights(loader.vtl0) == ORDINARY


@pytest.mark.parametrize(("relocation", "symbol"), [(9, b"printk"), (4, b"absent")])
def test_unknown_relocations_and_symbols(relocation: int, symbol: bytes) -> None:
    addresses = {ModuleType.TEXT: TEXT_VA, ModuleType.RODATA: RODATA_VA, ModuleType.DATA: DATA_VA}
    with pytest.raises(BadModule):
        expected_sections(module_elf(relocation=relocation, symbol=symbol), addresses, {"printk": 1}.get)


@given(st.data())
def test_no_file_breaks_the_reader(data: st.DataObject) -> None:
    """A signed module with bytes changed, or cut: BadModule or nothing."""
    file = bytearray(keys.appended(module_elf(), b"sig"))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    addresses = {ModuleType.TEXT: TEXT_VA, ModuleType.RODATA: RODATA_VA, ModuleType.DATA: DATA_VA}
    try:
        expected_sections(
            split(bytes(file[: data.draw(st.integers(0, len(file)))] or file)).module, addresses, {"printk": 1}.get
        )
    except BadModule as error:
        assert str(error)  # noqa: PT017 - either outcome is right, any other exception is not


@given(st.binary(max_size=300))
def test_no_bytes_are_a_signature(signature: bytes) -> None:
    with pytest.raises(cms.BadSignature):
        cms.verify(signature, b"data", [keys.signer("module signer")[1]])


def test_init_memory_that_became_a_page_table_stays_one(loader: Loader) -> None:
    """VTL1 sealed it for another purpose since: freeing the module must not hand it to VTL0."""
    vtl0, page = loader.vtl0, DATA + 0x2000
    loader.load()
    for number, kind in enumerate((ModuleType.INIT_DATA, ModuleType.RO_AFTER_INIT)):
        at = page + number * image.PAGE
        loader.rows.append((DATA_VA + 0x10000 + number * image.PAGE, at, at + image.PAGE, kind))
    assert loader.validate().value == 1
    guard = vtl0.machine.guard
    assert guard is not None
    root = vtl0.read(min(guard.roots) * image.PAGE, image.PAGE)
    for table in (page, page + image.PAGE):
        vtl0.write(table, root)
        assert vtl0.call(Service.WRITE_PAGE_TABLE, table, 0, PageTableOperation.ADD_ROOT).value == 0
    for service in (Service.FREE_MODULE_INIT, Service.UNLOAD_MODULE):
        assert vtl0.call(service, 1).value == 0
        for table in (page, page + image.PAGE):
            assert vtl0.machine.memory.code(table // image.PAGE) == GUARDED_TABLE


def test_memory_of_another_module(loader: Loader) -> None:
    """Else unloading the first would open what is sealed for the second."""
    loader.load()
    assert loader.validate().value == 1
    loader.rows = [(0, FILE, FILE + len(loader.file), ModuleType.ELF), (TEXT_VA, DATA, DATA + 1, ModuleType.TEXT)]
    pa, count = loader.vtl0.ranges(loader.rows, LIST)
    assert loader.vtl0.call(Service.VALIDATE_MODULE, pa, count).value == -errno.EACCES


@pytest.mark.parametrize("version", [3, 66])
def test_a_certificate_of_another_version_is_refused(version: int) -> None:
    """Bug: the library's complaint of a version is no ValueError, and ended the call of VTL1's service by a defect."""
    data = keys.der("versioned")
    at = data.index(bytes.fromhex("a003020102")) + 4  # [0] INTEGER 2, which is X.509 version 3
    with pytest.raises(ValueError, match=f"{version} is not a valid X509 version"):
        load_certificates(data[:at] + bytes([version]) + data[at + 1 :])
