"""From rows to a guest that boots wherever a multiboot 1 kernel does: the prebuilt kernel with the table appended.

The image is flat, as multiboot's address fields allow; load_end_addr says how long it is. It needs two vCPUs, 32 MiB, a
16550 at 0x3F8 and, to end, isa-debug-exit at 0xF4: 0 is that every row is ok.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

from vtlab.client.symbols import Section, Symbols
from vtlab.errors import LimitExceeded
from vtlab_conformance.layout import Op
from vtlab_conformance.steps import Row, record

_KERNELS = "vtl0_guest.kernels"  # data of the package; nothing of it is run here
_MAGIC = b"VTLC"
_VERSION = 1
# Of the multiboot header, which begins the image: load_end_addr.
_LOAD_END = 20


@cache
def symbols() -> Symbols:
    """Of the prebuilt kernel."""
    return Symbols(Path(str(files(_KERNELS).joinpath("conformance", "conformance.elf"))))


@cache
def _kernel() -> bytes:
    """From image_start to where the table begins."""
    known = symbols()
    start: int = known["image_start"]
    end: int = known["rows"]
    image = bytearray(end - start)
    sections: list[Section] = list(known.sections.values())
    for section in sections:
        if start <= section.physical < end:
            image[section.physical - start : section.physical - start + section.size] = section.data
    return bytes(image)


def table(rows: Iterable[Row]) -> bytes:
    """What the guest interprets: magic, version, records."""
    records: bytes = b"".join(row.encode() for row in rows) + record(Op.END)
    return _MAGIC + struct.pack("<I", _VERSION) + records


def image(rows: Iterable[Row]) -> bytes:
    """The guest with those rows. Raises LimitExceeded if there is not enough room for them."""
    data = table(rows)
    begin: int = symbols()["rows"]
    room: int = symbols()["rows_end"] - begin
    if len(data) > room:
        raise LimitExceeded("table of rows", f"{len(data)} bytes, more than {room}")
    whole = bytearray(_kernel() + data)
    struct.pack_into("<I", whole, _LOAD_END, begin + len(data))
    return bytes(whole)
