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


@pytest.fixture(params=[1, 2], ids=["1 CPU", "2 CPUs"])
def com2(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """COM2 of a guest that said it is ready, on so many processors."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "com2"))
    listener.listen()
    listener.settimeout(BOUND)
    command = [
        *(str(QEMU), "-cpu", "max", "-smp", str(request.param), "-m", "64"),
        *("-display", "none", "-no-reboot", "-nodefaults"),
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


# Done in this order, on one machine for each number of processors.
COMMANDS = [
    ("ping", r"ok pong"),
    ("module good", r"ok 0x600d000[01]"),
    ("read 0x1234 8", r"fault vector=14 error=0x0 rip=0xffffffff8010[0-9a-f]{4} cr2=0x1234"),
    ("control 3 0", r"error errno=22"),
    ("nonsense", r"error no such command"),
]
CPU_1_WORKS = r"fault vector=14 error=0x0 rip=0xffffffff8010[0-9a-f]{4} cr2=0x1234"
ON_CPU_1 = [
    ("on 1 read 0x1234 8", CPU_1_WORKS),
    ("cpu offline 1", r"ok 0x0"),
    ("on 1 read 0x1234 8", r"error errno=22"),
    ("cpu online 1", r"ok 0x0"),
    ("on 1 read 0x1234 8", CPU_1_WORKS),
    ("ping", r"ok pong"),
]


def test_commands_answer(com2: socket.socket, request: pytest.FixtureRequest) -> None:
    with com2.makefile() as lines:
        for command, answer in COMMANDS + (ON_CPU_1 if "2 CPUs" in request.node.name else []):
            com2.sendall(f"{command}\n".encode())
            assert re.fullmatch(answer, lines.readline().rstrip("\n")), command
