"""VTL1's own memory in the guest: keys and the open nonce live in the `private` file, where an attack on them is real.

They are in the last SIZE bytes of the first private range of the policy; what VTL0 left in the rest of the range stays.
Without a private range they live in this process only.

Layout: magic (16), nonce key (32), counter u64 (8), open nonce (32), state of the nonce (1: open), zeros.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct

from vtlab.ram import Ram, RamFile
from vtlab.services import NONCE_SIZE

SIZE = 256
_MAGIC = b"vtlab secrets 1\0"
_LAYOUT = struct.Struct("<16s32sQ32sB")


class Secrets:
    """Keys of one machine. Attributes: `gpa` of the block, None if it is not in guest memory."""

    def __init__(self, ram: Ram | None = None, gpa: int | None = None) -> None:
        """Makes new keys. Args: `gpa` of SIZE bytes that are VTL1's already."""
        self.gpa = gpa
        self._ram = ram
        self._own = bytearray(SIZE)
        self._store(_MAGIC, os.urandom(32), 0, bytes(NONCE_SIZE), 0)

    @property
    def block(self) -> bytes:
        """All of it, for VTL1's sealed store."""
        return self._read()

    @block.setter
    def block(self, data: bytes) -> None:
        self._write(data)

    def fresh_nonce(self) -> bytes:
        """A nonce that was never given before, unpredictable to VTL0; the one before is void."""
        magic, key, counter, _, _ = self._load()
        counter += 1
        nonce = hmac.digest(key, counter.to_bytes(8, "little"), hashlib.sha256)
        self._store(magic, key, counter, nonce, 1)
        return nonce

    def take_nonce(self) -> bytes | None:
        """The open nonce, which is void from now on; None if there is none."""
        magic, key, counter, nonce, is_open = self._load()
        self._store(magic, key, counter, bytes(NONCE_SIZE), 0)
        return nonce if is_open else None

    def wipe(self) -> None:
        """Leaves zeros."""
        self._write(bytes(SIZE))

    def _load(self) -> tuple[bytes, bytes, int, bytes, int]:
        return _LAYOUT.unpack(self._read()[: _LAYOUT.size])

    def _read(self) -> bytes:
        if self._ram is None or self.gpa is None:
            return bytes(self._own)
        return self._ram.views[RamFile.PRIVATE][self.gpa : self.gpa + SIZE]

    def _store(self, *fields: object) -> None:
        self._write(_LAYOUT.pack(*fields).ljust(SIZE, b"\0"))

    def _write(self, data: bytes) -> None:
        if self._ram is None or self.gpa is None:
            self._own[:] = data
        else:
            self._ram.views[RamFile.PRIVATE][self.gpa : self.gpa + SIZE] = data
