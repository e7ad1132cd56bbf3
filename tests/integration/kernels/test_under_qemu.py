"""The kernel boots on an implementation of x86 that is not ours, so its ideas of the processor are the manuals'."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtl0_guest.kernels import selfguard_image, signed_module

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64")
BOUND = 30.0  # seconds


@pytest.fixture
def com2(tmp_path: Path) -> Iterator[socket.socket]:
    """COM2 of a guest that said it is ready."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "com2"))
    listener.listen()
    listener.settimeout(BOUND)
    command = [
        *(str(QEMU), "-cpu", "max", "-m", "64", "-display", "none", "-no-reboot", "-nodefaults"),
        *("-kernel", str(selfguard_image()), "-initrd", f"{signed_module()} good", "-append", "heki=0"),
        *("-serial", f"file:{tmp_path / 'com1'}", "-serial", f"unix:{tmp_path / 'com2'}"),
    ]
    with subprocess.Popen(command) as qemu, listener:
        try:
            connection, _ = listener.accept()
            deadline = time.monotonic() + BOUND
            while "selfguard: ready" not in (tmp_path / "com1").read_text():
                assert time.monotonic() < deadline, (tmp_path / "com1").read_text()
                time.sleep(0.02)
            with connection:
                connection.settimeout(BOUND)
                yield connection
        finally:
            qemu.kill()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("ping", r"ok pong"),
        ("module good", r"ok 0x600d000[01]"),
        ("read 0x1234 8", r"fault vector=14 error=0x0 rip=0xffffffff8010[0-9a-f]{4} cr2=0x1234"),
        ("control 3 0", r"error errno=22"),
        ("nonsense", r"error no such command"),
    ],
)
def test_commands_answer(com2: socket.socket, command: str, answer: str) -> None:
    com2.sendall(f"{command}\n".encode())
    with com2.makefile() as lines:
        assert re.fullmatch(answer, lines.readline().rstrip("\n"))
