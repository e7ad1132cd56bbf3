"""Which format a file is, by its own magic numbers."""

from __future__ import annotations

from vtl0_guest.loaders.elf import MAGIC
from vtl0_guest.loaders.multiboot import find_header
from vtlab.errors import BadImage
from vtlab.v1 import vcpu_pb2


def detect(image: bytes, boot: vcpu_pb2.BootImage) -> vcpu_pb2.ImageFormat.ValueType:
    """A valid multiboot header comes first, then ELF. A flat binary has no magic and must be named.

    Raises:
        BadImage: neither, or an empty file.
    """
    if not image:
        raise BadImage(boot.path, "is empty")
    if find_header(image) is not None:
        return vcpu_pb2.IMAGE_FORMAT_MULTIBOOT
    if image.startswith(MAGIC):
        return vcpu_pb2.IMAGE_FORMAT_ELF
    raise BadImage(boot.path, "format: neither multiboot nor ELF; a flat image must be named as one")
