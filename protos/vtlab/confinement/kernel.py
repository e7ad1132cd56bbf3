"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4


def system_call(number: int, *arguments: Any) -> int:
    """Its result. Integers are passed with 64 bits, bytes and ctypes buffers by address. Raises OSError."""
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _result(_libc.syscall(ctypes.c_long(number), *words))


def prctl(option: int, *arguments: int) -> int:
    """prctl(2). Raises OSError."""
    words = [ctypes.c_ulong(one) for one in (*arguments, 0, 0, 0, 0)[:4]]
    return _result(_libc.prctl(option, *words))


def capget(header: Any, data: Any) -> int:
    """capget(2). Raises OSError."""
    return _result(_libc.capget(header, data))


def capset(header: Any, data: Any) -> int:
    """capset(2). Raises OSError."""
    return _result(_libc.capset(header, data))


def _result(value: int) -> int:
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return value
