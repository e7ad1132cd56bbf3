"""What a process inherits and does not need: descriptors, capabilities, limits, and being looked into."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
from collections.abc import Iterable
from pathlib import Path

from vtlab.confinement import kernel

_VERSION_3 = 0x20080522
_CAPABILITIES = 64
# Bytes of a file that the guest process may write: its log is the only one, and it may not fill the disk.
LOG_LIMIT = 16 << 20


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def inherited() -> list[int]:
    """The descriptors above 2 that came through execve, which are those without FD_CLOEXEC."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names, not paths
        try:
            if int(name) > 2 and not fcntl.fcntl(int(name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                found.append(int(name))
        except OSError:  # the one that listed them
            continue
    return found


def close_inherited(keep: Iterable[int]) -> None:
    """Closes them all but for `keep`."""
    for descriptor in set(inherited()).difference(keep):
        os.close(descriptor)


def give_up_capabilities(readable: Iterable[Path] = ()) -> bool:
    """Drops all capabilities for good, unless one of the folders cannot be read without them.

    Returns:
        False if they were kept, as for root in an installation that others own.

    Raises:
        OSError: the kernel refuses, as where another process gave it.
    """
    if os.geteuid() == 0:
        before = _get()
        _set(0, before[1])
        if not all(_reads(path) for path in readable):
            _set(*before)
            return False
        _set(before[1], before[1])
        for number in range(_CAPABILITIES):
            try:
                kernel.prctl(kernel.PR_CAPBSET_DROP, number)
            except OSError:  # no such capability, or no right to drop it, which no_new_privs makes up for
                break
    kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    _set(0, 0)
    return True


def _reads(folder: Path) -> bool:
    try:
        os.listdir(folder)  # noqa: PTH208 - only whether it works
    except PermissionError:
        return False
    except OSError:
        return True  # it is no folder, or not there: nothing that privileges change
    return True


def _get() -> tuple[int, int]:
    data = (ctypes.c_uint32 * 6)()
    kernel.capget(ctypes.byref(_Header(_VERSION_3, 0)), data)
    return data[0] | data[3] << 32, data[1] | data[4] << 32


def _set(effective: int, permitted: int) -> None:
    low, high = (1 << 32) - 1, 32
    halves = [effective & low, permitted & low, 0, effective >> high, permitted >> high, 0]
    kernel.capset(ctypes.byref(_Header(_VERSION_3, 0)), (ctypes.c_uint32 * 6)(*halves))


def no_new_privileges() -> None:
    """No program that this process could start has more rights than it."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


def stay_unseen() -> None:
    """No core dump, and no process of the same user may trace this one or read its memory and descriptors."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def limit_files() -> None:
    """Bounds how large a file this process can make or write."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = LOG_LIMIT if hard == resource.RLIM_INFINITY else min(hard, LOG_LIMIT)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


_KEPT_NAMES = frozenset({"HOME", "LANG", "LANGUAGE", "PATH", "TMPDIR", "TZ"})
_KEPT_PREFIXES = ("GRPC_", "LC_", "OTEL_", "PYTHON", "VTLAB_")


def forget_environment() -> None:
    """Overwrites what the user's environment says beyond what a server reads: tokens and passwords are often in it."""
    for name in [name for name in os.environ if not _is_kept(name)]:
        del os.environ[name]
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(fields[at - 3]) for at in (50, 51))  # env_start, env_end of proc(5)
    if not 0 < start < end:
        return
    at = start
    for one in ctypes.string_at(start, end - start).split(b"\0"):
        if not _is_kept(one.partition(b"=")[0].decode("utf-8", "replace")):
            ctypes.memset(at, 0, len(one))
        at += len(one) + 1


def _is_kept(name: str) -> bool:
    return name in _KEPT_NAMES or name.startswith(_KEPT_PREFIXES)
