"""Landlock (Linux Documentation/userspace-api/landlock.rst): files and ports that a process may use from now on.

It binds the thread that asks for it, and all threads and processes that this one makes afterwards. What a thread has
open already stays open, with the rights it was opened with. It also ends ptrace of every process outside, and with it
/proc/PID/mem and the like; root and capabilities change nothing about it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from enum import IntFlag
from pathlib import Path

from vtlab.confinement.kernel import system_call

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH, _NET_PORT = 1, 2


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_ALL = Access((1 << 16) - 1)
# ABI version from which the kernel knows a right; the others are there from the first one.
_SINCE = {Access.REFER: 2, Access.TRUNCATE: 3, Access.IOCTL_DEV: 5}
_OF_A_FILE = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
_BIND_TCP, _CONNECT_TCP = 1, 2
_TCP_SINCE, _SCOPES_SINCE = 4, 6
_ABSTRACT_UNIX_SOCKET, _SIGNAL = 1, 2


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("ports", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _Port(ctypes.Structure):
    _fields_ = (("allowed", ctypes.c_uint64), ("port", ctypes.c_uint64))


def abi() -> int:
    """Version of the kernel's Landlock; 0 where there is none, or where it is switched off."""
    try:
        return system_call(_CREATE_RULESET, None, 0, _ASK_VERSION)
    except OSError:
        return 0


def kept(version: int) -> tuple[str, ...]:
    """What that version keeps a process from, in words."""
    found = [(1, "files"), (3, "truncation"), (_TCP_SINCE, "TCP ports"), (_SCOPES_SINCE, "signals")]
    return tuple(name for since, name in found if version >= since)


def restrict(files: Mapping[Path, Access], bind: Iterable[int] = (), connect: Iterable[int] = ()) -> int:
    """Binds this thread and what it makes from now on. The process needs PR_SET_NO_NEW_PRIVS.

    Args:
        files: file or folder, with all below it -> rights. Those that are not there are passed over.
        bind, connect: TCP ports.

    Returns:
        The version that holds.

    Raises:
        OSError: there is no Landlock, or more than 16 rulesets hold already.
    """
    version = system_call(_CREATE_RULESET, None, 0, _ASK_VERSION)
    known = _ALL & ~_missing(version)
    ruleset = _Ruleset(known)
    size = 8
    if version >= _TCP_SINCE:
        ruleset.ports, size = _BIND_TCP | _CONNECT_TCP, 16
    if version >= _SCOPES_SINCE:
        ruleset.scoped, size = _ABSTRACT_UNIX_SOCKET | _SIGNAL, 24
    descriptor = system_call(_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    try:
        for path, access in files.items():
            _allow_path(descriptor, path, access & known)
        if version >= _TCP_SINCE:
            for right, ports in ((_BIND_TCP, bind), (_CONNECT_TCP, connect)):
                for port in ports:
                    system_call(_ADD_RULE, descriptor, _NET_PORT, ctypes.byref(_Port(right, port)), 0)
        system_call(_RESTRICT_SELF, descriptor, 0)
    finally:
        os.close(descriptor)
    return version


def _missing(version: int) -> Access:
    found = Access(0)
    for right, since in _SINCE.items():
        if version < since:
            found |= right
    return found


def _allow_path(ruleset: int, path: Path, access: Access) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # what cannot be reached needs no right
        return
    try:
        rule = _PathBeneath(access if path.is_dir() else access & _OF_A_FILE, parent)
        if rule.allowed:
            system_call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(parent)
