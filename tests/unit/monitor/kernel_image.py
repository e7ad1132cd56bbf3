"""A made-up kernel as an ELF file, with page tables as its boot code would build them. Nothing of it ever runs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vtlab.services import PATCH_RECORD

KERNEL = 0xFFFF_FFFF_8000_0000
PAGE = 4096
RAM_SIZE = 4 << 20

Write = Callable[[int, bytes], None]

TEXT, PRIVILEGED, RODATA, PATCHES, CERTIFICATES, POLICY = (0x100000 + n * PAGE for n in (0, 2, 3, 4, 5, 6))
DATA, VTL1, HYPERCALL_PAGE = (0x100000 + n * PAGE for n in (8, 10, 12))
FREE = 0x140000  # ordinary memory from here to the page tables
PML4, KERNEL_PDPT, KERNEL_PD, KERNEL_PT, LOW_PDPT, LOW_PD = (0x200000 + n * PAGE for n in range(6))

P, RW, US, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63

PATCH_SITE = TEXT + 0x40
CROSSING_SITE = TEXT + PAGE - 2
JUMP = bytes.fromhex("e90b000000")


def text_bytes() -> bytes:
    """Two pages: NOPs of five bytes at the patch sites, a pattern elsewhere."""
    text = bytearray((i * 7 + 3) & 0xFF for i in range(2 * PAGE))
    for site in (PATCH_SITE, CROSSING_SITE):
        text[site - TEXT : site - TEXT + 5] = bytes.fromhex("0f1f440000")
    return bytes(text)


def patch_list() -> bytes:
    """Both sites, a record of zeros between them."""
    records = [PATCH_RECORD.pack(KERNEL + site, 0, 5, JUMP) for site in (PATCH_SITE, CROSSING_SITE)]
    return records[0] + bytes(PATCH_RECORD.size) + records[1]


@dataclass
class Section:
    """Loaded at `gpa`, linked at KERNEL + gpa; `data` None is NOBITS of `size`."""

    name: str
    gpa: int
    size: int
    data: bytes | None = None
    flags: int = 2


@dataclass
class KernelImage:
    """Sections and symbols (name -> (gpa, size))."""

    sections: list[Section] = field(default_factory=list)
    symbols: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def elf(self) -> bytes:
        """One PT_LOAD a section; section headers, symbol table."""
        names = b"\0" + b"".join(one.name.encode() + b"\0" for one in self.sections) + b".symtab\0.strtab\0.shstrtab\0"
        strings = b"\0" + b"".join(name.encode() + b"\0" for name in self.symbols)
        body = bytearray(0x1000)
        program = b""
        headers = [bytes(64)]
        for one in self.sections:
            offset = len(body)
            body += (one.data or b"").ljust(-(-len(one.data or b"") // PAGE) * PAGE, b"\0")
            kind, stored = (1, len(one.data)) if one.data is not None else (8, 0)
            program += struct.pack("<IIQQQQQQ", 1, 7, offset, KERNEL + one.gpa, one.gpa, stored, one.size, PAGE)
            name = names.index(b"\0" + one.name.encode() + b"\0") + 1
            headers.append(
                struct.pack("<IIQQQQIIQQ", name, kind, one.flags, KERNEL + one.gpa, offset, one.size, 0, 0, 1, 0)
            )
        symtab = bytes(24)
        for symbol, (gpa, size) in self.symbols.items():
            index = next(n + 1 for n, one in enumerate(self.sections) if one.gpa <= gpa < one.gpa + one.size)
            place = strings.index(b"\0" + symbol.encode() + b"\0") + 1
            symtab += struct.pack("<IBBHQQ", place, 0x11, 0, index, KERNEL + gpa, size)
        for header, section_type, data, link, entry in (
            (b".symtab", 2, symtab, len(self.sections) + 2, 24),
            (b".strtab", 3, strings, 0, 0),
            (b".shstrtab", 3, names, 0, 0),
        ):
            place = names.index(b"\0" + header + b"\0") + 1
            headers.append(
                struct.pack("<IIQQQQIIQQ", place, section_type, 0, 0, len(body), len(data), link, 1, 1, entry)
            )
            body += data
        identification = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        count = len(self.sections)
        body[:64] = identification + struct.pack(
            "<HHIQQQIHHHHHH",
            2,
            62,
            1,
            KERNEL + TEXT,
            64,
            len(body),
            0,
            64,
            56,
            count,
            64,
            len(headers),
            len(headers) - 1,
        )
        body[64 : 64 + len(program)] = program
        return bytes(body) + b"".join(headers)

    def load(self, write: Write) -> None:
        """Calls write(gpa, data) for every stored section."""
        for one in self.sections:
            if one.data is not None:
                write(one.gpa, one.data)


def kernel(policy: bytes = b"", certificates: bytes = b"") -> KernelImage:
    """The kernel that the tests guard."""
    return KernelImage(
        [
            Section(".text", TEXT, 2 * PAGE, text_bytes(), 6),
            Section(".text.privileged", PRIVILEGED, 64, b"\x0f\x22\xc0\xc3".ljust(64, b"\x90"), 6),
            Section(".rodata", RODATA, 100, bytes(range(100))),
            Section(".patches", PATCHES, 72, patch_list()),
            Section(".certificates", CERTIFICATES, max(1, len(certificates)), certificates or b"\0"),
            Section(".vtlab.policy", POLICY, max(1, len(policy)), policy or b"\0"),
            Section(".data", DATA, 16, b"data data data d", 3),
            Section(".vtl1", VTL1, 2 * PAGE, None, 3),
            Section(".bss", HYPERCALL_PAGE, 2 * PAGE, None, 3),
        ],
        {
            "start": (TEXT, 16),
            "secret_table": (RODATA, 100),
            "vtl1_memory": (VTL1, 2 * PAGE),
            "hypercall_page": (HYPERCALL_PAGE, PAGE),
            "printk": (TEXT + 0x80, 8),
        },
    )


def build_page_tables(write: Write) -> None:
    """Kernel mapped by 4 KiB pages at KERNEL, all RAM at 0 by 2 MiB pages, writable and never executable."""
    tables = {table: [0] * 512 for table in (PML4, KERNEL_PDPT, KERNEL_PD, KERNEL_PT, LOW_PDPT, LOW_PD)}
    tables[PML4][511] = KERNEL_PDPT | P | RW
    tables[PML4][0] = LOW_PDPT | P | RW
    tables[KERNEL_PDPT][510] = KERNEL_PD | P | RW
    tables[KERNEL_PD][0] = KERNEL_PT | P | RW
    for gpa in range(TEXT, RODATA, PAGE):
        tables[KERNEL_PT][gpa >> 12] = gpa | P
    for gpa in range(RODATA, DATA, PAGE):
        tables[KERNEL_PT][gpa >> 12] = gpa | P | NX
    for gpa in range(DATA, HYPERCALL_PAGE, PAGE):
        tables[KERNEL_PT][gpa >> 12] = gpa | P | RW | NX
    tables[KERNEL_PT][HYPERCALL_PAGE >> 12] = HYPERCALL_PAGE | P
    tables[LOW_PDPT][0] = LOW_PD | P | RW
    for index in range(RAM_SIZE >> 21):
        tables[LOW_PD][index] = index << 21 | P | RW | PS | NX
    for table, entries in tables.items():
        write(table, struct.pack("<512Q", *entries))
