"""Flat binaries: raw bytes at an address that the user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vtl0_guest.loaders import states
from vtl0_guest.loaders.target import Target
from vtlab.v1 import registers_pb2, vcpu_pb2

START_MODES: dict[int, Callable[[Target, int], registers_pb2.ProcessorState]] = {
    vcpu_pb2.START_MODE_REAL: states.real_mode,
    vcpu_pb2.START_MODE_PROTECTED: states.protected_mode,
    vcpu_pb2.START_MODE_LONG: states.long_mode,
}


def load_flat(
    image: bytes, boot: vcpu_pb2.BootImage, _modules: Sequence[bytes], target: Target
) -> registers_pb2.ProcessorState:
    """Loads the bytes at boot.load_address and starts at boot.entry in boot.start_mode."""
    if not image:
        raise target.bad("is empty")
    start = START_MODES.get(boot.start_mode)
    if start is None:
        raise target.bad("start_mode: a flat image needs one: real, protected or long")
    target.put(boot.load_address, image, "load_address")
    if not boot.load_address <= boot.entry < boot.load_address + len(image):
        raise target.bad(f"entry {boot.entry:#x} is outside the image")
    return start(target, boot.entry)
