"""Which format a file is, by its own magic numbers."""

from __future__ import annotations

from vtl0_guest.loaders.bzimage import is_bzimage
from vtl0_guest.loaders.elf import MAGIC
from vtl0_guest.loaders.multiboot import find_header
from vtlab.errors import BadImage
from vtlab.v1 import vcpu_pb2


def detect(image: bytes, boot: vcpu_pb2.BootImage) -> vcpu_pb2.ImageFormat.ValueType:
    """A Linux setup header comes first, then a valid multiboot header, then ELF. A flat binary must be named.

    Raises:
        BadImage: none of them, or an empty file.
    """
    if not image:
        raise BadImage(boot.path, "is empty")
    if is_bzimage(image):
        return vcpu_pb2.IMAGE_FORMAT_BZIMAGE
    if find_header(image) is not None:
        return vcpu_pb2.IMAGE_FORMAT_MULTIBOOT
    if image.startswith(MAGIC):
        return vcpu_pb2.IMAGE_FORMAT_ELF
    raise BadImage(boot.path, "format: no Linux kernel, neither multiboot nor ELF; a flat image must be named as one")
