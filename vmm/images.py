"""Uploaded images under their SHA-256, and copies of them for the levels of a machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vtlab.errors import BadArgument, LimitExceeded, NotFound

CHUNK = 1 << 20
MAX_IMAGE = 512 << 20
MAX_IMAGES = 256


class ImageStore:
    """A folder of images. Thread-safe: a file appears whole, or not at all."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory

    def add(self, chunks: Iterable[bytes]) -> tuple[bytes, int]:
        """Stores what arrives; returns its SHA-256 and size in bytes.

        Raises:
            BadArgument: empty, or a chunk over 1 MiB.
            LimitExceeded: the image is too large, or there are too many.
        """
        if sum(1 for _ in self._directory.iterdir()) >= MAX_IMAGES:
            raise LimitExceeded("image store", f"holds {MAX_IMAGES} images already", limit=MAX_IMAGES)
        digest = hashlib.sha256()
        size = 0
        descriptor, name = tempfile.mkstemp(dir=self._directory, prefix=".")
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    size += len(chunk)
                    if len(chunk) > CHUNK:
                        raise BadArgument("chunk", f"has {len(chunk)} bytes, more than {CHUNK}")
                    if size > MAX_IMAGE:
                        raise LimitExceeded("image", f"is larger than {MAX_IMAGE} bytes", limit=MAX_IMAGE)
                    digest.update(chunk)
                    file.write(chunk)
            if not size:
                raise BadArgument("image", "is empty")
            partial.replace(self._directory / digest.hexdigest())
        finally:
            partial.unlink(missing_ok=True)
        return digest.digest(), size

    def copy(self, sha256: bytes, target: Path) -> None:
        """A copy of an image: whoever may write there must not be able to change the stored one.

        Raises:
            NotFound: no such image was uploaded.
            FileExistsError: the target is there already.
        """
        source = self._directory / sha256.hex()
        if len(sha256) != hashlib.sha256().digest_size or not source.is_file():
            raise NotFound(f"image {sha256.hex() or '(none)'}", "was not uploaded")
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK)
        target.chmod(0o644)
