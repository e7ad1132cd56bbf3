"""A file that only this monitor can read, and that nobody can change or put back to an earlier one unnoticed.

    magic (16) | counter u64 | nonce (12) | AES-256-GCM of the content, with magic and counter authenticated

The key lies beside it, for this process's user alone. Each seal counts one up; the counter is kept in a file of its
own, written after the store, so that a store with a lower number is an old one. Files are replaced whole, and flushed
before.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_MAGIC = b"vtlab sealed 2\0\0"
_HEADER = struct.Struct("<16sQ")
_COUNTER = struct.Struct("<Q")
_NONCE, _KEY = 12, 32


class BrokenSeal(Exception):
    """The store is damaged, another's, of another version, or an old one."""


class SealedStore:
    """One file in a folder of the monitor's."""

    def __init__(self, folder: Path) -> None:
        """Makes a key where there is none. Raises BrokenSeal if the key or the counter is damaged."""
        self._store, self._counter_file = folder / "sealed", folder / "sealed.counter"
        key = folder / "sealed.key"
        if not key.exists():
            _replace(key, AESGCM.generate_key(8 * _KEY))
        if key.stat().st_size != _KEY:
            raise BrokenSeal(f"{key} has {key.stat().st_size} bytes")
        self._cipher = AESGCM(key.read_bytes())
        self._counter = self._read_counter()

    def _read_counter(self) -> int:
        try:
            (counter,) = _COUNTER.unpack(self._counter_file.read_bytes())
        except FileNotFoundError:
            return 0
        except struct.error:
            raise BrokenSeal(f"{self._counter_file} is damaged") from None
        return int(counter)

    @property
    def counter(self) -> int:
        """How often something was sealed or wiped here."""
        return self._counter

    def seal(self, content: bytes) -> None:
        """Replaces what was sealed. It is there after the death of this process at any instant, or what was before."""
        counter = self._counter + 1
        header = _HEADER.pack(_MAGIC, counter)
        nonce = os.urandom(_NONCE)
        _replace(self._store, header + nonce + self._cipher.encrypt(nonce, content, header))
        _replace(self._counter_file, _COUNTER.pack(counter))
        self._counter = counter

    def unseal(self) -> bytes | None:
        """What was sealed last; None if nothing is. Raises BrokenSeal."""
        try:
            data = self._store.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) < _HEADER.size + _NONCE:
            raise BrokenSeal("the sealed store is truncated")
        header, nonce = data[: _HEADER.size], data[_HEADER.size : _HEADER.size + _NONCE]
        magic, counter = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise BrokenSeal("the sealed store is of another version")
        try:
            content = self._cipher.decrypt(nonce, data[_HEADER.size + _NONCE :], header)
        except InvalidTag:
            raise BrokenSeal("the sealed store was changed") from None
        if counter < self._counter:
            raise BrokenSeal(f"the sealed store is an old one: number {counter}, and {self._counter} was sealed")
        self._counter = counter
        return content

    def wipe(self) -> None:
        """Nothing is sealed from here on; what was cannot be put back."""
        self._counter += 1
        _replace(self._counter_file, _COUNTER.pack(self._counter))
        self._store.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
