"""Boot images and modules on their way to the VMM, which keeps them under their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

from vtlab.errors import BadImage
from vtlab.v1 import vmm_pb2

CHUNK = 1 << 20  # bytes; the contract's limit

ImageSource = str | PathLike[str] | bytes


@dataclass(frozen=True)
class Image:
    """An image in memory.

    Attributes:
        name: the file, for error messages.
        data: its bytes.
    """

    name: str
    data: bytes

    def sha256(self) -> bytes:
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    def chunks(self) -> Iterator[vmm_pb2.UploadImageRequest]:
        """The requests that upload it; an empty image is one empty chunk."""
        for start in range(0, max(len(self.data), 1), CHUNK):
            yield vmm_pb2.UploadImageRequest(chunk=self.data[start : start + CHUNK])


def read_image(source: ImageSource, limit: int) -> Image:
    """Reads an image from a file, or takes its bytes.

    Args:
        source: path or bytes.
        limit: bytes of RAM of the machine that is to boot it.

    Raises:
        BadImage: unreadable, empty, or larger than the limit.
    """
    if isinstance(source, bytes):
        image = Image(f"image of {len(source)} bytes", source)
    else:
        path = Path(source)
        try:
            if (size := path.stat().st_size) > limit:  # without reading gigabytes first
                raise BadImage(str(path), f"has {size} bytes, more than the machine's {limit} bytes of RAM")
            image = Image(str(path), path.read_bytes())
        except OSError as error:
            raise BadImage(str(path), error.strerror or str(error)) from None
    if not image.data:
        raise BadImage(image.name, "is empty")
    if len(image.data) > limit:
        raise BadImage(image.name, f"has {len(image.data)} bytes, more than the machine's {limit} bytes of RAM")
    return image
