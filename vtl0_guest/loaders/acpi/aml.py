"""An encoder for the little ACPI Machine Language that a DSDT of fixed devices needs.

Source: ACPI 6.5, chapter 20 ("ACPI Machine Language specification") and 6.4 ("Resource data types"). Every function
returns the bytes of one term; terms are joined by concatenation.
"""

from __future__ import annotations

import re
import struct

_ZERO, _ONE, _BYTE, _WORD, _DWORD, _QWORD, _STRING = b"\x00", b"\x01", b"\x0a", b"\x0b", b"\x0c", b"\x0e", b"\x0d"
_NAME, _SCOPE, _BUFFER, _PACKAGE, _DEVICE = b"\x08", b"\x10", b"\x11", b"\x12", b"\x5b\x82"
_END_TAG = b"\x79\x00"
_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
# Largest lengths that 1 to 4 bytes of PkgLength hold.
_LENGTHS = (0x3F, 0xFFF, 0xF_FFFF, 0xFFF_FFFF)


def name_string(path: str) -> bytes:
    """A path of one or two segments, absolute if it starts with a backslash. Raises ValueError for other names."""
    root = path.startswith("\\")
    segments = path.removeprefix("\\").split(".")
    if len(segments) > 2 or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise ValueError(f"{path!r} is not an ACPI name")
    padded = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    return b"\\" * root + (b"\x2e" if len(segments) == 2 else b"") + padded


def _with_length(content: bytes) -> bytes:
    """PkgLength, which counts itself, and the content."""
    for extra, largest in enumerate(_LENGTHS):
        total = len(content) + 1 + extra
        if total <= largest:
            if not extra:
                return bytes([total]) + content
            return bytes([extra << 6 | total & 15]) + (total >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"{len(content):#x} bytes are too many for one package")


def integer(value: int) -> bytes:
    """The shortest encoding of a number below 2**64."""
    if value in (0, 1):
        return (_ZERO, _ONE)[value]
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit in 64 bits")


def string(text: str) -> bytes:
    """A string of ASCII characters without zero."""
    return _STRING + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A plug-and-play identifier as PNP0501: three letters of 5 bits, four hexadecimal digits, big endian."""
    first, second, third = (ord(letter) - 0x40 for letter in text[:3])
    return _DWORD + struct.pack(">HH", first << 10 | second << 5 | third, int(text[3:], 16))


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return _NAME + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """Package of at most 255 elements."""
    return _PACKAGE + _with_length(bytes([len(elements)]) + b"".join(elements))


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {terms}."""
    return _SCOPE + _with_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {terms}."""
    return _DEVICE + _with_length(name_string(path) + b"".join(terms))


def io_ports(first: int, count: int) -> bytes:
    """Resource: `count` fixed I/O ports, decoded with 16 bits."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def irq(number: int) -> bytes:
    """Resource: an ISA interrupt, edge triggered and active high."""
    return struct.pack("<BH", 0x22, 1 << number)


def resources(*descriptors: bytes) -> bytes:
    """A resource template: the descriptors and an end tag that asks for no checksum."""
    data = b"".join(descriptors) + _END_TAG
    return _BUFFER + _with_length(integer(len(data)) + data)
