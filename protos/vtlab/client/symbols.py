"""Names and addresses of a guest kernel, from its ELF file, as an attacker who has the kernel image knows them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from vtlab.errors import BadImage, NotFound

SHF_EXECINSTR = 4


@dataclass(frozen=True)
class Section:
    """One section that is in memory.

    Attributes:
        address: virtual, as linked.
        physical: where it is loaded.
        data: its bytes in the file; zeros where the file has none.
    """

    name: str
    address: int
    physical: int
    size: int
    data: bytes
    executable: bool


class Symbols:
    """`symbols["text_start"]` is an address. Raises NotFound for a name that the image lacks."""

    def __init__(self, image: str | PathLike[str]) -> None:
        """Reads an ELF file. Raises BadImage."""
        self.image = Path(image)
        try:
            with self.image.open("rb") as stream:
                self._read(ELFFile(stream))
        except OSError as error:
            raise BadImage(str(image), error.strerror or str(error)) from None
        except (ELFError, OverflowError) as error:
            raise BadImage(str(image), str(error)) from None

    def _read(self, elf: ELFFile) -> None:
        segments = [segment.header for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
        self._segments = [(s["p_vaddr"], s["p_memsz"], s["p_paddr"]) for s in segments]
        self.sections: dict[str, Section] = {}
        for section in elf.iter_sections():
            if not section["sh_flags"] & 2 or not section["sh_size"]:  # SHF_ALLOC
                continue
            address, size = section["sh_addr"], section["sh_size"]
            data = bytes(size) if section["sh_type"] == "SHT_NOBITS" else bytes(section.data())
            executable = bool(section["sh_flags"] & SHF_EXECINSTR)
            self.sections[section.name] = Section(section.name, address, self.physical(address), size, data, executable)
        table = elf.get_section_by_name(".symtab")
        symbols = list(table.iter_symbols()) if isinstance(table, SymbolTableSection) else []
        self._addresses = {symbol.name: int(symbol["st_value"]) for symbol in symbols if symbol.name}
        kinds = ("STT_FUNC", "STT_OBJECT", "STT_NOTYPE")
        named = [s for s in symbols if s.name and s["st_info"]["type"] in kinds and s["st_shndx"] != "SHN_ABS"]
        self._sorted = sorted((int(symbol["st_value"]), symbol.name) for symbol in named)

    def __getitem__(self, name: str) -> int:
        if name not in self._addresses:
            raise NotFound(f"symbol {name!r}", f"is not in {self.image.name}")
        return self._addresses[name]

    def __contains__(self, name: str) -> bool:
        return name in self._addresses

    def physical(self, place: int | str) -> int:
        """Guest-physical address of a linked address or a symbol. Raises NotFound."""
        address = self[place] if isinstance(place, str) else place
        for start, size, physical in self._segments:
            if start <= address < start + size:
                return int(physical + address - start)
        raise NotFound(f"address {address:#x}", f"is in no segment of {self.image.name}")

    def describe(self, address: int) -> str:
        """ "driver_checksum+0x4" for an address of the image, else the number."""
        index = bisect_right(self._sorted, (address, "\x7f")) - 1
        inside = any(start <= address < start + size for start, size, _ in self._segments)
        if index < 0 or not inside:
            return f"{address:#x}"
        start, name = self._sorted[index]
        return name if address == start else f"{name}+{address - start:#x}"

    def find_code(self, pattern: bytes) -> Iterator[int]:
        """Addresses in executable sections where these bytes stand, at any offset."""
        for section in self.sections.values():
            if not section.executable:
                continue
            at = section.data.find(pattern)
            while at >= 0:
                yield section.address + at
                at = section.data.find(pattern, at + 1)
