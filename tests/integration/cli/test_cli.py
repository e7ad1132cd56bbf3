"""Commands against toy servers: output, exit codes, one-line errors, nothing left running."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm import launcher
from vmm.cli.exit_codes import ExitCode
from vmm.cli.main import main
from vtlab.client import connect

TREE = Path(__file__).parents[3]
TOY = "tests.integration.client.toy"


class Cli:
    """Runs commands in this process, in a runtime folder of their own."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self._capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *self._capfd.readouterr()

    def json(self, *arguments: str | Path) -> Any:
        code, out, err = self(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    monkeypatch.setattr(launcher, "SERVERS", dict.fromkeys(launcher.SERVERS, TOY))
    monkeypatch.setattr(launcher, "_roomy_base", lambda: tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("sys.stdin", None)
    for name in ("VTLAB_VMM", "VTLAB_MONITOR", "VTLAB_TRUST"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield Cli(capfd)
    signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.glob(f"{launcher.PREFIX}*")) == [], "a laboratory was left behind"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "guest.bin"
    path.write_bytes(b"exit 42")
    return path


def error_line(result: tuple[int, str, str]) -> str:
    """The one line on stderr."""
    _, out, err = result
    assert out == ""
    assert err.startswith("vtlab: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("vtlab: ").strip()


# ---------------------------------------------------------------------------------------------------------------- run


def test_run_returns_the_debug_exit_as_qemu_would(cli: Cli, image: Path) -> None:
    assert cli("run", image) == (85, "hello\n", "")
    assert cli("run", "-kernel", image, "-m", "4", "-smp", "1", "-append", "a b", "-no-reboot") == (85, "hello\n", "")


def test_run_as_json(cli: Cli, image: Path) -> None:
    code, out, err = cli("run", image, "--json")
    assert (code, err) == (85, "")
    assert json.loads(out) == {
        "exit_code": 85,
        "state": "STOPPED",
        "reason": "debug exit",
        "debug_exit": 42,
        "generation": 0,
        "serial": ["hello\n", "on COM2\n"],
    }


def test_run_sends_ports_to_files(cli: Cli, image: Path, tmp_path: Path) -> None:
    com1, com2 = tmp_path / "1", tmp_path / "2"
    assert cli("run", image, "-serial", f"file:{com1}", "-serial", f"file:{com2}") == (85, "", "")
    assert (com1.read_text(), com2.read_text()) == ("hello\n", "on COM2\n")
    assert cli("run", image, "-serial", "null", "-serial", "stdio") == (85, "on COM2\n", "")


def test_run_tells_of_a_guest_that_failed(cli: Cli, image: Path) -> None:
    image.write_bytes(b"fail")
    code, out, err = cli("run", image)
    assert (code, out) == (ExitCode.GUEST_FAILED, "hello\n")
    assert "failed: the core broke" in err


def test_run_stops_a_guest_that_takes_too_long(cli: Cli, image: Path) -> None:
    image.write_bytes(b"spin")
    code, out, err = cli("run", image, "--timeout", "0.3")
    assert (code, out) == (ExitCode.TIMED_OUT, "hello\n")
    assert err.startswith("vtlab: machine 'vm-")
    assert err.endswith("': did not end in 0.3 s\n")


def test_run_with_modules(cli: Cli, image: Path, tmp_path: Path) -> None:
    (tmp_path / "module").write_bytes(b"m")
    assert cli("run", image, "-initrd", f"{tmp_path / 'module'} x=1")[0] == 85
    missing = tmp_path / "missing"
    assert error_line(cli("run", image, "-initrd", str(missing))) == f"{missing}: No such file or directory"


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["run"], ExitCode.BAD_INPUT, "image: give one, as an argument or by -kernel"),
        (["run", "/nonexistent"], ExitCode.BAD_INPUT, "/nonexistent: No such file or directory"),
        (["run", "/"], ExitCode.BAD_INPUT, "/: Is a directory"),
        (["run", "IMAGE", "-m", "3M"], ExitCode.BAD_INPUT, "-m 3M: RAM must be a multiple of 2 MiB"),
        (
            ["run", "IMAGE", "-serial", "tcp:1"],
            ExitCode.BAD_INPUT,
            "-serial tcp:1: expected stdio, file:PATH, null or none",
        ),
        (["run", "IMAGE", "-serial", "file:/x/y"], ExitCode.BAD_INPUT, "/x/y: No such file or directory"),
        (["run", "IMAGE", "-smp", "0"], ExitCode.USAGE, "Invalid value for '-smp'"),
        (["run", "IMAGE", "-nope"], ExitCode.USAGE, "No such option"),
        (["run", "IMAGE", "--rules", "/nonexistent"], ExitCode.BAD_INPUT, "/nonexistent: no such file"),
        (
            ["run", "IMAGE", "--vmm", "unix:/nonexistent", "--trust", "/t"],
            ExitCode.UNAVAILABLE,
            "trust folder /t: no credentials",
        ),
        (["run", "IMAGE", "--vmm", "unix:/nonexistent"], ExitCode.UNAVAILABLE, "or set VTLAB_TRUST"),
        (["nonsense"], ExitCode.USAGE, "No such command 'nonsense'"),
        (["regs"], ExitCode.UNAVAILABLE, "none is running: start one with `vtlab up`"),
        (["mem", "zero"], ExitCode.BAD_INPUT, "address: 'zero' is not a number"),
        (["mem", "0", "--write", "xy"], ExitCode.BAD_INPUT, "--write: 'xy' is not a row of bytes"),
        (["regs", "--set", "rax"], ExitCode.BAD_INPUT, "--set rax: expected NAME=VALUE"),
        (["policy", "check", "/nonexistent"], ExitCode.BAD_INPUT, "/nonexistent: No such file or directory"),
        (["attack", "nonsense"], ExitCode.BAD_INPUT, "attack 'nonsense': is none of "),
    ],
)
def test_bad_input_is_named_in_one_line(cli: Cli, image: Path, arguments: list[str], code: int, line: str) -> None:
    result = cli(*(str(image) if argument == "IMAGE" else argument for argument in arguments))
    assert line in error_line(result)
    assert result[0] == code


def test_an_image_larger_than_ram(cli: Cli, image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate((2 << 20) + 1)
    result = cli("run", image, "-m", "2M")
    assert error_line(result) == f"{image}: has 2097153 bytes, more than the machine's 2097152 bytes of RAM"
    assert result[0] == ExitCode.BAD_INPUT


def test_an_image_that_the_loader_refuses(cli: Cli, image: Path) -> None:
    image.write_bytes(b"bad")
    result = cli("run", image)
    assert error_line(result) == f"{image}: e_machine is 3"
    assert result[0] == ExitCode.BAD_INPUT


def test_a_server_that_does_not_start(cli: Cli, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTLAB_TEST_FAULT", "monitor:die")
    result = cli("run", image)
    assert error_line(result) == "monitor: ended with code 7 at start: toy: dying"
    assert result[0] == ExitCode.INTERNAL


def test_a_defect_is_one_line_too(cli: Cli, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_text: str) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("vmm.cli.run.parse_ram", broken)
    monkeypatch.delenv("VTLAB_DEBUG", raising=False)
    result = cli("run", image)
    assert error_line(result) == "internal error: ZeroDivisionError: oops (VTLAB_DEBUG=1 shows where)"
    assert result[0] == ExitCode.INTERNAL


def test_rules_of_a_file_reach_the_monitor(cli: Cli, image: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text("WORD = 'pinned'\ndef rule():\n    return WORD\nrules = [rule]\n")
    script = f"""
from vmm import launcher
from vmm.cli.laboratory import given_or_private, load_rules
launcher.SERVERS = dict.fromkeys(launcher.SERVERS, {TOY!r})
with given_or_private("", "", "", {str(rules)!r}) as lab:
    print(lab.policy.get("a").rules[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(TREE)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("pinned\n", "")
    rules.write_text("rules = 1 / 0")
    assert error_line(cli("run", image, "--rules", rules)) == f"{rules}: ZeroDivisionError: division by zero"
    rules.write_text("")
    assert error_line(cli("run", image, "--rules", rules)) == f"{rules}: does not define `rules`"


# -------------------------------------------------------------------------------------- a laboratory in another process

PROGRAM = f"""
import sys
from vmm import launcher
launcher.SERVERS = dict.fromkeys(launcher.SERVERS, {TOY!r})
from vmm.cli.main import main
sys.exit(main())
"""


class Program:
    """The program as a process, with toy servers; killed at the end of the block if it is still there."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(TREE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._pending = b""

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def line(self, timeout: float = 30) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))
            part = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            assert part, f"it said no more than {self._pending!r}"
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def type(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Its exit code, after a signal if one is given, and what it said on stderr."""
        if number is not None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err.decode()


@pytest.fixture
def up(cli: Cli) -> Iterator[Program]:
    with Program("up", "--json") as program:
        yield program
        program.end(signal.SIGTERM)


def test_up_is_found_by_other_commands(cli: Cli, up: Program, image: Path) -> None:
    up.line()

    with connect() as lab, lab.create(image, name="one") as machine:
        values = cli.json("regs", "--set", "rip=0x1000", "--set", "msr:0x10=7")
        assert (values["rip"], values["msrs"]) == ("0x1000", {"0x10": "0x7"})
        assert "rip\t0x1000\n" in cli("regs", "--vm", "one")[1]
        assert cli.json("mem", "0x2000", "4", "--write", "01 02")["hex"] == "01020000"
        assert cli("mem", "0x2000", "2")[1] == f"{0x2000:016x}  01 02{' ' * 43}  |..|\n"
        assert cli.json("mem", "0x3000", "2", "--virtual")["hex"] == "0102"
        machine.start()
        assert cli.json("events", "--kind", "serial", "-n", "1")["kind"] == "EVENT_KIND_SERIAL"
        assert "COM1 b'hello\\n'" in cli("events", "--kind", "serial", "-n", "1")[1]
        assert cli.json("policy", "get") == {}
        assert cli.json("policy", "lock") == {"locked": True}
        assert cli.json("policy", "set", image)["text"] == "exit 42"
        assert "machine 'two': no such machine" in error_line(cli("regs", "--vm", "two"))
        with lab.create(image, name="two"):
            assert "several machines: one, two" in error_line(cli("regs"))
        result = cli("regs", "--set", "cr0=0")
        assert error_line(result) == "register CR0: WP is pinned"
        assert result[0] == ExitCode.REFUSED
    assert "the laboratory has none" in error_line(cli("regs"))


def test_up_ends_with_sigterm_and_leaves_no_trace(cli: Cli, up: Program, tmp_path: Path) -> None:
    started = json.loads(up.line())
    assert up.end(signal.SIGTERM) == (128 + signal.SIGTERM, "")
    assert not Path(started["directory"]).exists()
    assert [pid for pid in started["pids"].values() if Path(f"/proc/{pid}").exists()] == []
    assert list(tmp_path.rglob("lab.json")) == []
    assert cli("regs")[0] == ExitCode.UNAVAILABLE


def test_up_ends_with_ctrl_c(up: Program, tmp_path: Path) -> None:
    up.line()
    assert up.end(signal.SIGINT) == (0, "")
    assert list(tmp_path.rglob("lab.json")) == []


def test_up_ends_when_one_of_the_three_does(up: Program) -> None:
    os.kill(json.loads(up.line())["pids"]["guest"], signal.SIGTERM)
    code, said = up.end()
    assert (code, said.splitlines()[-1]) == (ExitCode.UNAVAILABLE, "vtlab: guest: ended with code 0")


def test_up_for_people(cli: Cli) -> None:
    with Program("up", "--listen-vmm", "127.0.0.1:0") as program:
        lines = [program.line() for _ in range(4)]
        assert program.end(signal.SIGINT) == (0, "")
    assert lines[0].startswith("# processes: ")
    assert [line.split("=")[0] for line in lines[1:]] == [
        "export VTLAB_VMM",
        "export VTLAB_MONITOR",
        "export VTLAB_TRUST",
    ]
    assert lines[1].startswith("export VTLAB_VMM=127.0.0.1:")


def test_policy_check_needs_no_laboratory(cli: Cli, image: Path) -> None:
    code, out, err = cli("policy", "check", image, "--image", image)
    assert (code, out, err) == (ExitCode.NEGATIVE, "", f"{image}:3: a: no\n")


def test_stdin_is_typed_and_output_is_live(cli: Cli, image: Path) -> None:
    image.write_bytes(b"spin")
    with Program("run", image) as program:
        assert program.line() == "hello"
        program.type(b"ping\n")
        assert program.line() == "PING"
        program.type(b"quit\n")
        assert program.line() == "bye"
        assert program.end() == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, 143)])
def test_a_signal_ends_run_and_all_that_it_started(cli: Cli, image: Path, number: signal.Signals, code: int) -> None:
    image.write_bytes(b"spin")
    with Program("run", image) as program:
        assert program.line() == "hello"
        assert program.end(number) == (code, "")
