"""What the guest process can say and do as VTL0's CPU: exits that are not true, and its own memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

from vtl0_guest.session import Guest
from vtlab.ram import Ram, RamFile
from vtlab.session import Execute
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit

_honest = Guest.stream
_truth = threading.Event()
_kept: list[bytes] = []


def _changed(exit_: bytes, **fields: int) -> bytes:
    forged = Exit.FromString(exit_)
    for name, value in fields.items():
        setattr(forged, name, value)
    return forged.SerializeToString()


def _replayed(exit_: bytes) -> bytes:
    _kept.append(exit_)
    return _kept[-2] if len(_kept) > 3 else exit_


def _silent(exit_: bytes) -> bytes:
    _truth.wait()
    return exit_


_LIES: dict[str, Callable[[bytes], bytes]] = {
    "another vCPU": lambda exit_: _changed(exit_, vp_index=1),
    "a vCPU that no machine has": lambda exit_: _changed(exit_, vp_index=0xFFFF_FFFF),
    "a number to come": lambda exit_: _changed(exit_, sequence=Exit.FromString(exit_).sequence + 1),
    "the last of all numbers": lambda exit_: _changed(exit_, sequence=(1 << 64) - 1),
    "VTL1": lambda exit_: _changed(exit_, vtl=1),
    "an exit of before": _replayed,
    "no message": lambda _exit: b"\xff" * 64,
    "nothing": lambda _exit: b"",
    "100 KiB": lambda exit_: exit_ + Exit(serial=[vcpu_pb2.SerialOutput(data=bytes(100 << 10))]).SerializeToString(),
    "5 MiB": lambda exit_: exit_ + Exit(serial=[vcpu_pb2.SerialOutput(data=bytes(5 << 20))]).SerializeToString(),
    "silence": _silent,
}
NAMES = tuple(_LIES)


def lie(name: str) -> None:
    """Every exit of the next machine is answered so."""
    _truth.clear()
    _kept.clear()

    def stream(self: Guest, vp_index: int) -> Execute:
        answer = _honest(self, vp_index)
        return lambda enter: _LIES[name](answer(enter))

    Guest.stream = stream  # type: ignore[method-assign]


def be_honest() -> None:
    _truth.set()
    Guest.stream = _honest  # type: ignore[method-assign]


def overwrite(gpa: int, size: int) -> None:
    """In the file of its memory that VTL0's process may write."""
    (ram,) = (found for found in gc.get_objects() if isinstance(found, Ram) and found.views)
    view = ram.views[RamFile.WRITABLE]
    view[gpa : gpa + size] = bytes([0xCC]) * size


def overwrite_sealed(gpa: int) -> None:
    """The same by Python's own means in what VTL0 may not write."""
    (ram,) = (found for found in gc.get_objects() if isinstance(found, Ram) and found.views)
    try:
        ram.views[RamFile.SEALED][gpa] = 0
    except TypeError as error:
        raise OSError(1, str(error)) from None
