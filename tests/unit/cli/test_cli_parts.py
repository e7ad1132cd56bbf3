"""Pure parts of the command line: options as QEMU's, exit codes, and lines for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.cli import checks
from vmm.cli.exit_codes import OF_ERROR, ExitCode, of_debug_exit, of_error
from vmm.cli.inspect import hex_lines, registers_as_dict
from vmm.cli.qemu_options import FlatStart, SerialTarget, parse_flat, parse_modules, parse_ram, parse_serial
from vmm.cli.run import with_seed
from vtlab import errors, status
from vtlab.client.describe import describe_exit, detail
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64", 64 << 20),
        ("64M", 64 << 20),
        ("1g", 1 << 30),
        ("2048K", 2 << 20),
        ("size=4M", 4 << 20),
        ("2097152B", 2 << 20),
    ],
)
def test_ram(text: str, size: int) -> None:
    assert parse_ram(text) == size


@pytest.mark.parametrize("text", ["", "0", "1M", "3M", "64X", "-64M", "64.5M", "0x40", "64 M"])
def test_bad_ram(text: str) -> None:
    with pytest.raises(errors.BadArgument, match=f"-m {text}"):
        parse_ram(text)


@given(st.integers(1, 1 << 20))
def test_any_multiple_of_the_granule_is_accepted(granules: int) -> None:
    assert parse_ram(f"{granules * 2}M") == granules * 2 << 20


@pytest.mark.parametrize(
    ("given_options", "targets"),
    [
        ([], (SerialTarget(stdio=True), SerialTarget())),
        (["null"], (SerialTarget(), SerialTarget())),
        (["file:a:b", "stdio"], (SerialTarget(file=Path("a:b")), SerialTarget(stdio=True))),
        (["none", "mon:stdio"], (SerialTarget(), SerialTarget(stdio=True))),
    ],
)
def test_serial(given_options: list[str], targets: tuple[SerialTarget, SerialTarget]) -> None:
    assert parse_serial(given_options) == targets


@pytest.mark.parametrize("options", [["tcp:1"], ["file:"], ["file"], ["stdio", "stdio"], ["null", "null", "null"]])
def test_bad_serial(options: list[str]) -> None:
    with pytest.raises(errors.BadArgument, match="-serial"):
        parse_serial(options)


def test_modules() -> None:
    assert parse_modules("") == []
    assert parse_modules("a x=1,b") == [("a", "a x=1"), ("b", "b")]
    assert parse_modules("a,,b c,,d") == [("a,b", "a,b c,d")]


def test_flat() -> None:
    assert parse_flat("") is None
    assert parse_flat("0x7c00") == FlatStart(0x7C00, "real")
    assert parse_flat("4096,long") == FlatStart(4096, "long")
    for bad in ("x", "-1", "0,virtual", ",real"):
        with pytest.raises(errors.BadArgument, match=f"--flat {bad}"):
            parse_flat(bad)


@pytest.mark.parametrize(
    ("given_options", "complete"),
    [
        ("--deterministic", "--deterministic 0"),
        ("--deterministic guest.elf", "--deterministic 0 guest.elf"),
        ("--deterministic 7 guest.elf", "--deterministic 7 guest.elf"),
        ("guest.elf --deterministic -m 64", "guest.elf --deterministic 0 -m 64"),
        ("guest.elf --deterministic -1", "guest.elf --deterministic -1"),  # is refused
        ("guest.elf", "guest.elf"),
    ],
)
def test_a_run_that_repeats_needs_no_seed(given_options: str, complete: str) -> None:
    assert with_seed(given_options.split()) == complete.split()


def test_every_error_has_a_code_that_no_guest_can_return() -> None:
    assert set(OF_ERROR) == set(status.TABLE)
    assert all(code % 2 == 0 for code in OF_ERROR.values())
    assert of_error(errors.VtlabError("a", "b")) is ExitCode.INTERNAL


@pytest.mark.parametrize(("value", "code"), [(0, 1), (1, 3), (0x2A, 0x55), (0x80, 1), (0xFFFFFFFF, 0xFF)])
def test_debug_exit(value: int, code: int) -> None:
    assert of_debug_exit(value) == code


def test_hex_lines() -> None:
    assert hex_lines(0x1000, bytes(range(0x39, 0x3C)) + b"\0") == [
        "0000000000001000  39 3a 3b 00                                       |9:;.|"
    ]
    assert [line[:16] for line in hex_lines(0, bytes(33))] == ["0" * 16, "0" * 14 + "10", "0" * 14 + "20"]


def test_registers_as_dict() -> None:
    state = registers_pb2.ProcessorState(
        registers=registers_pb2.Registers(rip=0xFFFFFFFF80000000, cs=registers_pb2.Segment(selector=8)),
        msrs=[registers_pb2.MsrValue(index=0xC0000080, value=0x500)],
        debug=[1],
    )
    values = registers_as_dict(state)
    assert values["rip"] == "0xffffffff80000000"
    assert values["cs"]["selector"] == "0x8"
    assert values["interrupt_shadow"] is False
    assert values["msrs"] == {"0xc0000080": "0x500"}
    assert values["dr"] == ["0x1"]


@pytest.mark.parametrize("reason", [field.name for field in vcpu_pb2.Exit.DESCRIPTOR.oneofs_by_name["reason"].fields])
def test_every_exit_has_a_line(reason: str) -> None:
    one = vcpu_pb2.Exit(registers=registers_pb2.Registers(rip=0x1234))
    getattr(one, reason).SetInParent()
    assert describe_exit(one).endswith(" at RIP 0x1234")


@pytest.mark.parametrize("name", [field.name for field in vmm_pb2.Event.DESCRIPTOR.oneofs_by_name["detail"].fields])
def test_every_event_has_a_line(name: str) -> None:
    event = vmm_pb2.Event()
    getattr(event, name).SetInParent()
    assert detail(event)


def test_lines_say_what_matters() -> None:
    write = vcpu_pb2.RegisterWrite(name=registers_pb2.REGISTER_NAME_CR0, old_value=0x80010033, new_value=0x80000033)
    one = vcpu_pb2.Exit(registers=registers_pb2.Registers(rip=0x100000), register_write=write)
    denied = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_DENY, reason="registers.cr0")
    verdict = vmm_pb2.Event(verdict=vmm_pb2.Verdict(exit=one, resolution=denied))
    assert detail(verdict) == "deny (registers.cr0): CR0 0x80010033 -> 0x80000033 at RIP 0x100000"
    access = vcpu_pb2.PageAccess(read=True, user_execute=True)
    update = vcpu_pb2.ProtectionUpdate(runs=[1, 2, 8, 3], access=access, store=vcpu_pb2.PAGE_STORE_SEALED)
    assert detail(vmm_pb2.Event(protection=update)) == "5 pages r--u sealed"


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        ("rich>=1", ""),
        ("rich<1", r"rich is .*, not <1"),
        ("rich>=13.9,<9999", ""),
        ("rich==1.2.3", r"rich is .*, not ==1\.2\.3"),
        ("no-such-package>=1", "no-such-package is missing"),
    ],
)
def test_package_requirements(monkeypatch: pytest.MonkeyPatch, requirement: str, problem: str) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _name: [requirement, 'pytest>=9999; extra == "dev"'])
    finding = checks.packages()
    if problem:
        assert finding.level is checks.Level.FAILURE
        assert finding.fix
        import re

        assert re.fullmatch(problem, finding.detail)
    else:
        assert finding.level is checks.Level.OK
