"""The functions of the Unicorn library that the core calls by address or without the Python wrapper's cost.

Unicorn's shared library exports QEMU's own functions too; `cpu_loop_exit` is what QEMU calls to leave a translated
block at the instruction whose state has just been restored.
"""

from __future__ import annotations

import ctypes

from unicorn.unicorn_py3 import unicorn as binding

library: ctypes.CDLL = binding.uclib

# uc_ctl argument: type | argument count << 26 | access mode << 30 (unicorn.h, UC_CTL).
_WRITE_WITHOUT_ARGUMENTS = 1 << 30
CTL_TB_FLUSH = 10 | _WRITE_WITHOUT_ARGUMENTS
CTL_TLB_FLUSH = 11 | _WRITE_WITHOUT_ARGUMENTS


class EngineUnsupported(RuntimeError):
    """This build of Unicorn differs from the one whose structures the core knows. Nothing runs on it."""


def address_of(name: str) -> int:
    """Address of an exported function. Raises EngineUnsupported if the library has none of that name."""
    try:
        function = getattr(library, name)
    except AttributeError:
        raise EngineUnsupported(f"Unicorn library: no function {name}") from None
    address = ctypes.cast(function, ctypes.c_void_p).value
    if not address:
        raise EngineUnsupported(f"Unicorn library: function {name} has no address")
    return address
