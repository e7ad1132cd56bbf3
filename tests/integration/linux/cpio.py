"""An initial RAM disk in the "newc" format (Linux Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple

DIRECTORY = stat.S_IFDIR | 0o755
PROGRAM = stat.S_IFREG | 0o755
CHARACTER_DEVICE = stat.S_IFCHR | 0o600
_TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """A file; `device` is (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive; every entry belongs to root and has no time."""
    out = b""
    for number, entry in enumerate([*entries, Entry(_TRAILER, 0)], 1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        out += _padded(b"070701" + b"".join(b"%08X" % field for field in fields) + name) + _padded(entry.data)
    return out
