"""Boot images: flat binaries, ELF, multiboot 1, Linux kernels. Every offset of a file is checked before it is used.

A loader turns a file into writes to guest memory and the state that the first vCPU starts in. Files come from outside:
whatever is wrong with one is a BadImage that names the file and the field at fault, and nothing else is ever raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vtl0_guest.loaders.bzimage import load_bzimage
from vtl0_guest.loaders.detect import detect
from vtl0_guest.loaders.elf import load_elf
from vtl0_guest.loaders.flat import load_flat
from vtl0_guest.loaders.multiboot import load_multiboot
from vtl0_guest.loaders.target import Target, Write
from vtlab.errors import BadImage
from vtlab.v1 import registers_pb2, vcpu_pb2

Loader = Callable[[bytes, vcpu_pb2.BootImage, Sequence[bytes], Target], registers_pb2.ProcessorState]

_LOADERS: dict[int, Loader] = {
    vcpu_pb2.IMAGE_FORMAT_FLAT: load_flat,
    vcpu_pb2.IMAGE_FORMAT_ELF: load_elf,
    vcpu_pb2.IMAGE_FORMAT_MULTIBOOT: load_multiboot,
    vcpu_pb2.IMAGE_FORMAT_BZIMAGE: load_bzimage,
}
_WITH_MODULES = frozenset({vcpu_pb2.IMAGE_FORMAT_MULTIBOOT, vcpu_pb2.IMAGE_FORMAT_BZIMAGE})


def load(
    image: bytes, boot: vcpu_pb2.BootImage, modules: Sequence[bytes], write: Write, ram_size: int, vp_count: int = 1
) -> registers_pb2.ProcessorState:
    """Loads an image and its modules; returns the state that vCPU 0 starts in.

    Args:
        image: the file's bytes; `boot` says what it is, and `boot.path` names it in errors.
        modules: bytes of boot.modules, in order. Multiboot takes any number, a Linux kernel one.
        write: stores bytes at a guest-physical address; called with ranges inside RAM only.
        ram_size: bytes of guest RAM.
        vp_count: vCPUs of the machine.

    Raises:
        BadImage: the image or a module cannot be loaded. Memory may have been written by then.
    """
    image_format = detect(image, boot) if boot.format == vcpu_pb2.IMAGE_FORMAT_DETECT else boot.format
    loader = _LOADERS.get(image_format)
    if loader is None:
        raise BadImage(boot.path, f"format {image_format} is not one that can be loaded")
    if boot.modules and image_format not in _WITH_MODULES:
        raise BadImage(boot.path, "modules: only a multiboot image or a Linux kernel takes modules")
    return loader(image, boot, modules, Target(boot.path, ram_size, write, vp_count))
