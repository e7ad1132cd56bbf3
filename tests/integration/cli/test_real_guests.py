"""`vtlab run` and the SDK with the real servers and real machine code: exit codes, serial, bad input, death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tenacity

from vmm.cli.exit_codes import ExitCode
from vmm.launcher import launch
from vtlab.client import Lab, Machine
from vtlab.errors import BadImage, NotFound, VtlabError, WrongState
from vtlab.v1 import vcpu_pb2, vmm_pb2

ORIGIN = 0x7C00
# Real-mode programs at ORIGIN.
SAY_AND_EXIT = bytes.fromhex("baf803 b068ee b069ee b00aee b02ae6f4 faf4")  # "hi\n" on COM1, then OUT 0xF4, 0x2A
SPIN = bytes.fromhex("ebfe")
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee 3c71 75ef b001e6f4")  # bytes of COM1, until "q"
TRIPLE_FAULT = bytes.fromhex("0f011e1000 cc") + bytes(10) + bytes(6)  # LIDT of a limit 0 at DS:0x10, then INT3


def boot(lab: Lab, code: bytes, **options: object) -> Machine:
    """A machine for one of the programs, not started."""
    return lab.create(
        code,
        ram=2 << 20,
        image_format=vcpu_pb2.IMAGE_FORMAT_FLAT,
        load_address=ORIGIN,
        entry=ORIGIN,
        start_mode=vcpu_pb2.START_MODE_REAL,
        **options,  # type: ignore[arg-type]
    )


def vtlab(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The program as users call it."""
    return subprocess.run(
        [sys.executable, "-m", "vmm.cli.main", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.fixture
def program(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "program.bin"
    path.write_bytes(request.param)
    return path


@pytest.mark.parametrize("program", [SAY_AND_EXIT], indirect=True)
def test_serial_and_debug_exit(program: Path) -> None:
    done = vtlab("run", program, "--flat", hex(ORIGIN), "-m", "2M")
    assert (done.returncode, done.stdout, done.stderr) == ((0x2A << 1) | 1, "hi\n", "")


@pytest.mark.parametrize("program", [ECHO], indirect=True)
def test_what_is_typed_reaches_com1(program: Path) -> None:
    done = vtlab("run", program, "--flat", hex(ORIGIN), "-m", "2M", stdin="abcq")
    assert (done.returncode, done.stdout, done.stderr) == (3, "abcq", "")


@pytest.mark.parametrize("program", [TRIPLE_FAULT], indirect=True)
def test_a_triple_fault_without_reboot_ends_it(program: Path) -> None:
    done = vtlab("run", program, "--flat", hex(ORIGIN), "-m", "2M", "-no-reboot")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("program", [SPIN], indirect=True)
def test_a_guest_that_never_ends(program: Path) -> None:
    done = vtlab("run", program, "--flat", hex(ORIGIN), "-m", "2M", "--timeout", "0.5")
    assert (done.returncode, done.stdout) == (ExitCode.TIMED_OUT, "")
    assert done.stderr.endswith("did not end in 0.5 s\n")


@pytest.mark.parametrize(
    ("cut", "detail"),
    [(1 << 20, ""), (1000, ": "), (52, ": "), (3, ": format: no Linux kernel, neither multiboot nor ELF")],
    ids=["whole", "segments cut", "headers cut", "magic cut"],
)
def test_truncated_images_are_named(lab: Lab, tmp_path: Path, image: Path, cut: int, detail: str) -> None:
    path = tmp_path / "cut.elf"
    path.write_bytes(image.read_bytes()[:cut])
    if not detail:
        with lab.create(path) as machine:
            machine.start()
        return
    before = len(lab.machines())
    with pytest.raises(BadImage) as wrong:
        start_and_destroy(lab, path)
    assert str(wrong.value).startswith(f"{path}{detail}")
    assert len(lab.machines()) == before


def start_and_destroy(lab: Lab, image: Path, ram: int = 64 << 20) -> None:
    with lab.create(image, ram=ram) as machine:
        machine.start()


def test_segments_beyond_ram_are_named(lab: Lab, tmp_path: Path, image: Path) -> None:
    path = tmp_path / "guest.elf"
    path.write_bytes(image.read_bytes())
    with path.open("r+b") as file:
        file.truncate((2 << 20) + 4096)
    with pytest.raises(BadImage, match="more than the machine's 2097152 bytes of RAM") as wrong:
        start_and_destroy(lab, path, 2 << 20)
    assert wrong.value.subject == str(path)


def test_operations_in_the_wrong_state(lab: Lab) -> None:
    with boot(lab, SPIN) as machine:
        for operation in (machine.pause, machine.resume, machine.stop):
            with pytest.raises(WrongState) as early:
                operation()
            assert (early.value.state, early.value.operation) == ("CREATED", operation.__name__)
        machine.start()
        with pytest.raises(WrongState) as twice:
            machine.start()
        assert (twice.value.subject, twice.value.state) == (f"machine '{machine.name}'", "RUNNING")
        machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING)
        machine.stop()
        with pytest.raises(WrongState):
            machine.resume()
    with pytest.raises(NotFound, match=f"machine '{machine.name}'"):
        machine.info()


def test_a_running_guest_is_inspected_and_changed(lab: Lab) -> None:
    with boot(lab, SPIN) as machine:
        machine.start()
        state = machine.registers()
        assert state.registers.cs.base + state.registers.rip == ORIGIN
        assert machine.read_memory(ORIGIN, 2) == SPIN
        machine.write_memory(ORIGIN + 0x100, SAY_AND_EXIT)
        machine.write_memory(ORIGIN, bytes.fromhex("e9fd00"))  # JMP to it, over the loop that runs
        assert machine.wait_serial("hi\n") == "hi\n"
        assert machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED).debug_exit == 0x2A


def test_reset_starts_again(lab: Lab) -> None:
    with boot(lab, SPIN) as machine:
        machine.start()
        machine.write_memory(0x1000, b"secret")
        assert machine.reset().generation == machine.info().generation
        machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING)
        assert machine.read_memory(0x1000, 6) == bytes(6)
        assert machine.info().generation > 0


@pytest.mark.parametrize("role", ["guest", "vmm"])
def test_a_killed_process_is_an_error_and_no_hang(tmp_path: Path, role: str) -> None:
    with launch(directory=tmp_path) as lab:
        machine = boot(lab, SPIN)
        machine.start()
        os.kill(lab.pids[role], signal.SIGKILL)
        with pytest.raises(VtlabError) as failed:
            machine.wait_serial("never", timeout=30)
        assert not isinstance(failed.value, TimeoutError)
        assert "did not" not in str(failed.value)
        pids = list(lab.pids.values())
    all_gone(pids)
    assert list(tmp_path.iterdir()) == []


@tenacity.retry(stop=tenacity.stop_after_delay(10), wait=tenacity.wait_fixed(0.02), reraise=True)
def all_gone(pids: list[int]) -> None:
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_doctor_finds_this_machine_fit() -> None:
    done = vtlab("doctor")
    assert done.returncode == 0, done.stdout
    assert "a guest ran to its end" in done.stdout.splitlines()[-1] or "fix" in done.stdout.splitlines()[-1]
