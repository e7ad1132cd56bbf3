"""Reads the files of a boot image below the machine's folder, each checked against its SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vtlab.errors import BadImage

# Bytes; what is larger is no boot image.
MAX_FILE = 1 << 30


def read_file(folder: Path, name: str, sha256: bytes) -> bytes:
    """The bytes that were hashed, read once.

    Raises:
        BadImage: the name leads out of the folder, the file cannot be read or is too large, or its hash differs.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadImage(name, "path: is outside the machine's folder")
    try:
        if path.stat().st_size > MAX_FILE:
            raise BadImage(name, f"size: larger than {MAX_FILE} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(name, f"cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).digest() != sha256:
        raise BadImage(name, "sha256: the file is not the one that was named")
    return data
