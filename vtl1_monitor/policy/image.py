"""The boot image as VTL1 sees it: sections, symbols and the bytes that a loader puts into memory.

Addresses are guest-physical: the load address (p_paddr) of the segment that holds the linked address. Raises
vtlab.errors.BadImage for files that cannot be read, NotFound for names that are absent.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from vtlab.errors import BadImage, NotFound
from vtlab.ram import PAGE_SIZE

_SHF_ALLOC = 2
_SHN_ABS = "SHN_ABS"
# Bytes of program headers, as many as Linux takes (fs/binfmt_elf.c), and section headers. A file may claim 65,535 of
# each and more, which all read the same bytes.
_MAX_PROGRAM_HEADERS = 64 << 10
_MAX_SECTIONS = 16 << 10


@dataclass(frozen=True)
class Area:
    """A named part of the image: linked address, load address, size in bytes."""

    name: str
    gva: int
    gpa: int
    size: int

    @property
    def end(self) -> int:
        return self.gpa + self.size


@dataclass(frozen=True)
class _Segment:
    gva: int
    gpa: int
    size: int
    data: bytes


class BootImage:
    """Sections and symbols of one image.

    Attributes:
        name: the file, for messages.
        sha256: of the file.
        is_elf: others have no sections and no symbols.
    """

    def __init__(self, data: bytes, name: str = "image", flat_address: int | None = None) -> None:
        """Reads the whole file at once, so that later lookups cannot fail half-way."""
        self.name = name
        self.sha256 = hashlib.sha256(data).digest()
        self.is_elf = data[:4] == b"\x7fELF"
        self._segments: list[_Segment] = []
        self._sections: dict[str, Area] = {}
        self._symbols: dict[str, Area] = {}
        self._globals: dict[str, int] = {}
        if self.is_elf:
            try:
                self._read(ELFFile(io.BytesIO(data)))
            except (ELFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
                raise BadImage(name, f"is no readable ELF file: {error}") from None
        elif flat_address is not None:
            self._segments.append(_Segment(flat_address, flat_address, len(data), data))

    def _read(self, elf: ELFFile) -> None:
        if elf.num_segments() * elf.header.e_phentsize > _MAX_PROGRAM_HEADERS or elf.num_sections() > _MAX_SECTIONS:
            raise ValueError(f"{elf.num_segments()} program headers, {elf.num_sections()} sections")
        for segment in elf.iter_segments("PT_LOAD"):
            header = segment.header
            data = bytes(segment.data())[: header.p_memsz]
            self._segments.append(_Segment(header.p_vaddr, header.p_paddr, header.p_memsz, data))
        for section in elf.iter_sections():
            if section.header.sh_flags & _SHF_ALLOC and section.header.sh_size:
                gpa = self._load_address(section.header.sh_addr, section.header.sh_size)
                if gpa is not None:
                    area = Area(section.name, section.header.sh_addr, gpa, section.header.sh_size)
                    self._sections.setdefault(section.name, area)
            if isinstance(section, SymbolTableSection):
                self._read_symbols(section)

    def _read_symbols(self, table: SymbolTableSection) -> None:
        for symbol in table.iter_symbols():
            entry = symbol.entry
            if not symbol.name or entry.st_shndx == "SHN_UNDEF":
                continue
            if entry.st_info.bind == "STB_GLOBAL":
                self._globals[symbol.name] = entry.st_value
            gpa = None if entry.st_shndx == _SHN_ABS else self._load_address(entry.st_value, 1)
            if gpa is not None:
                self._symbols.setdefault(symbol.name, Area(symbol.name, entry.st_value, gpa, entry.st_size))

    def _load_address(self, gva: int, size: int) -> int | None:
        for segment in self._segments:
            if segment.gva <= gva and gva + size <= segment.gva + segment.size:
                return segment.gpa + gva - segment.gva
        return None

    def section(self, name: str) -> Area:
        """A loaded section. Raises NotFound."""
        if name not in self._sections:
            raise NotFound(name, f"no section {name} is loaded by {self.name}" if self.is_elf else self._not_elf())
        return self._sections[name]

    def symbol(self, name: str) -> Area:
        """A symbol in loaded memory. Raises NotFound."""
        if name not in self._symbols:
            raise NotFound(name, f"no symbol {name} in {self.name}" if self.is_elf else self._not_elf())
        return self._symbols[name]

    def global_value(self, name: str) -> int | None:
        """Linked value of a global symbol, which modules may refer to."""
        return self._globals.get(name)

    def gpa(self, gva: int, size: int) -> int | None:
        """Load address of linked bytes, if one segment holds them all."""
        return self._load_address(gva, size)

    def _not_elf(self) -> str:
        return f"{self.name} is no ELF file and has no sections or symbols"

    def expected(self, gpa: int, size: int) -> bytes:
        """What loading leaves at these addresses in zeroed memory."""
        result = bytearray(size)
        for segment in self._segments:
            first = max(gpa, segment.gpa)
            last = min(gpa + size, segment.gpa + len(segment.data))
            if first < last:
                result[first - gpa : last - gpa] = segment.data[first - segment.gpa : last - segment.gpa]
        return bytes(result)

    @property
    def loaded(self) -> list[tuple[int, int, bytes]]:
        """What a loader puts into memory: load address, bytes there, and the file's part of them; the rest is zero."""
        return [(segment.gpa, segment.size, segment.data) for segment in self._segments]

    def neighbours(self, area: Area) -> list[Area]:
        """Other loaded sections that share the last page of the area."""
        last_page = (area.end - 1) // PAGE_SIZE * PAGE_SIZE
        tail = range(max(area.end, last_page), last_page + PAGE_SIZE)
        return [other for other in self._sections.values() if other.gpa < tail.stop and other.end > tail.start and tail]


@lru_cache(maxsize=4)  # a machine that starts again has the same image; reading its symbols is what costs
def read_image(data: bytes, name: str, flat_address: int | None = None) -> BootImage:
    """BootImage of these bytes; nothing changes one once it is read. Raises BadImage."""
    return BootImage(data, name, flat_address)
