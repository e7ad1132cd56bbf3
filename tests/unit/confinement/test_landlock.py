"""Landlock on kernels of every version: what is asked for, and no more than the kernel knows."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from vtlab.confinement import landlock
from vtlab.confinement.landlock import Access

CREATE, ADD, RESTRICT = 444, 445, 446


class Kernel:
    """One with that version, which takes only what it knows."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.handled: tuple[int, int, int] = (0, 0, 0)
        self.paths: list[int] = []
        self.ports: list[tuple[int, int]] = []
        self.restricted = False

    def __call__(self, number: int, *arguments: Any) -> int:
        if number == CREATE and arguments[0] is None:
            return self.version
        if number == CREATE:
            attribute, size, flags = arguments
            assert flags == 0
            assert size == (8 if self.version < 4 else 16 if self.version < 6 else 24)
            words = ctypes.cast(attribute, ctypes.POINTER(ctypes.c_uint64 * 3)).contents
            self.handled = words[0], words[1], words[2]
            return os.open("/dev/null", os.O_RDONLY)
        if number == ADD:
            _, kind, rule, flags = arguments
            assert flags == 0
            words = ctypes.cast(rule, ctypes.POINTER(ctypes.c_uint64 * 2)).contents
            assert words[0] & ~self.handled[kind - 1] == 0, "a right that the ruleset does not handle is EINVAL"
            self.paths.append(words[0]) if kind == 1 else self.ports.append((words[0], words[1]))
            return 0
        assert number == RESTRICT
        self.restricted = True
        return 0


@pytest.mark.parametrize("version", range(1, 9))
def test_each_version(version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = Kernel(version)
    monkeypatch.setattr(landlock, "system_call", kernel)
    files = {tmp_path: Access.READ_FILE | Access.TRUNCATE | Access.REFER, tmp_path / "absent": Access.READ_FILE}
    assert landlock.restrict(files, bind=[80], connect=[443]) == version
    assert kernel.restricted
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    assert kernel.handled[0] == (1 << bits) - 1
    assert kernel.ports == ([(1, 80), (2, 443)] if version >= 4 else [])
    assert kernel.handled[2] == (3 if version >= 6 else 0)
    assert len(kernel.paths) == 1


def test_a_file_gets_the_rights_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel refuses a rule about a file that gives a right on folders."""
    kernel = Kernel(7)
    monkeypatch.setattr(landlock, "system_call", kernel)
    (tmp_path / "file").touch()
    landlock.restrict({tmp_path / "file": Access.READ_FILE | Access.READ_DIR | Access.MAKE_REG})
    assert kernel.paths == [Access.READ_FILE]


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_arguments: Any) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(landlock, "system_call", absent)
    assert landlock.abi() == 0
    with pytest.raises(OSError, match="not implemented"):
        landlock.restrict({})


def test_what_is_kept_is_told() -> None:
    assert landlock.kept(0) == ()
    assert landlock.kept(3) == ("files", "truncation")
    assert landlock.kept(9) == ("files", "truncation", "TCP ports", "signals")
