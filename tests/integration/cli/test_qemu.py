"""`vtlab-qemu` as a test runner calls it: the guest's words on stdout, QEMU's exit codes."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = 1 << 20
HEADER = 48  # bytes of multiboot header and padding before the code
# 32-bit code: the module's first byte ("env file") and a newline to COM1, then OUT 0xF4 of EAX.
SAY_AND_EXIT = bytes.fromhex("8b7318 8b36 8a06 66baf803 ee b00a ee b800000000 e6f4 f4")
TRIPLE_FAULT = bytes.fromhex("6a00 6a00 0f011c24 cc")  # LIDT of a limit 0, then INT3
SAY_AND_SPIN = bytes.fromhex("66baf803 b073 ee b00a ee ebfe")
RUNNER = [
    *("--no-reboot", "-nodefaults", "-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"),
    *("-vnc", "none", "-serial", "stdio", "-machine", "accel=tcg", "-m", "4M", "-kernel"),
]


@pytest.fixture
def kernel(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A multiboot image of the code, with its stack below it."""
    flags = 1 << 16  # load by the addresses in the header
    code: bytes = b"\xbc" + struct.pack("<I", LOAD) + request.param  # MOV ESP, LOAD
    end = LOAD + HEADER + len(code)
    header = struct.pack(
        "<8I", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF, LOAD, LOAD, end, end, LOAD + HEADER
    )
    path = tmp_path / "tiny.flat"
    path.write_bytes(header.ljust(HEADER, b"\0") + code)
    return path


def start(kernel: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vmm.cli.qemu", *RUNNER, str(kernel), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kernel", [SAY_AND_EXIT], indirect=True)
def test_a_guest_says_what_its_environment_holds_and_succeeds(kernel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    environment.write_text("ERRATA_FORCE=y\n")
    run = start(kernel, "-cpu", "max,+vmx", "-initrd", str(environment))
    output, errors = run.communicate(timeout=50)
    assert (output, run.returncode) == ("E\n", 1)
    assert errors == "vtlab: warning: CPU feature 'vmx' is not offered\n"


@pytest.mark.parametrize("kernel", [TRIPLE_FAULT], indirect=True)
def test_a_machine_that_would_reset_ends_with_0(kernel: Path) -> None:
    run = start(kernel)
    assert (*run.communicate(timeout=50), run.returncode) == ("", "", 0)


@pytest.mark.parametrize("kernel", [SAY_AND_SPIN], indirect=True)
def test_a_runner_that_gives_up_is_told_so(kernel: Path) -> None:
    run = start(kernel)
    assert run.stdout is not None
    assert run.stdout.readline() == "s\n"
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=50)
    assert (errors, run.returncode) == ("vtlab: terminating on signal 15\n", 0)
