"""The command line of vtlab-qemu: what test runners pass, what is refused by name, and what is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.cli import qemu
from vmm.cli.qemu_arguments import MEANINGLESS, Arguments, Query, parse
from vmm.cli.qemu_cpu import FIXED, SHOWN, parse_cpu
from vmm.cli.qemu_options import SerialTarget
from vtl0_guest.cpu.cpuid import cpuid
from vtlab.errors import BadArgument
from vtlab.x86.paging import PHYSICAL_BITS

# What kvm-unit-tests' x86/run puts before a test's own options.
RUNNER = [
    *("--no-reboot", "-nodefaults", "-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"),
    *("-vnc", "none", "-serial", "stdio", "-machine", "accel=tcg", "-kernel"),
]


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel.flat"
    path.write_bytes(b"kernel")
    return str(path)


def understood(*words: str) -> Arguments:
    arguments = parse(words)
    assert isinstance(arguments, Arguments)
    return arguments


def test_what_the_runner_passes(kernel: str) -> None:
    arguments = understood(
        *RUNNER, kernel, "-smp", "2", "-cpu", "kvm64,hv_vpindex,hv_synic", "-device", "hyperv-testdev",
        "--append", "10000000 17", "-m", "2g", "-initrd", "/tmp/env",
    )  # fmt: skip
    assert arguments == Arguments(
        kernel=kernel,
        modules=(("/tmp/env", "/tmp/env"),),
        command_line="10000000 17",
        ram=2 << 30,
        processors=2,
        serial=(SerialTarget(stdio=True), SerialTarget()),
        no_reboot=True,
        devices=("hyperv-testdev",),
    )


def test_without_options_it_is_as_qemu_has_it(kernel: str) -> None:
    assert understood("-kernel", kernel) == Arguments(kernel=kernel, ram=128 << 20)
    assert understood("-kernel", kernel, "-nographic").serial[0].stdio


def test_the_last_of_several_holds(kernel: str) -> None:
    assert understood("-kernel", "absent", "-smp", "1", "-kernel", kernel, "-smp", "cpus=3,cores=3").processors == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("-netdev user,id=n", "-netdev"),
        ("-global a.b=c", "-global"),
        ("--object memory-backend-ram", "--object"),
        ("-d int", "-d"),
        ("disk.img", "disk.img"),
        ("-device e1000,netdev=n", "-device e1000"),
        ("-device intel-iommu,intremap=on", "-device intel-iommu"),
        ("-device isa-debug-exit", "-device isa-debug-exit"),
        ("-device isa-debug-exit,iobase=0x501", "-device isa-debug-exit: property 'iobase'"),
        ("-device pc-testdev,id=x", "-device pc-testdev: property 'id'"),
        ("-machine microvm", "-machine microvm"),
        ("-M pc,vmport=on", "-machine: property 'vmport'"),
        ("-machine pit=off", "-machine: property 'pit'"),
        ("-machine accel=kvm", "-accel kvm"),
        ("-accel hvf", "-accel hvf"),
        ("-vnc :0", "-vnc :0"),
        ("-display gtk", "-display gtk"),
        ("-smp 0", "-smp 0"),
        ("-smp two", "-smp two"),
        ("-m 64,slots=2", "-m 64,slots=2"),
        ("-cpu +x2apic", "-cpu +x2apic"),
        ("-cpu max,hv_syndbg", "-cpu max: 'hv-syndbg'"),
        ("-serial tcp::1", "-serial tcp::1"),
        ("-append", "-append"),
    ],
)
def test_what_is_not_supported_is_named(kernel: str, words: str, named: str) -> None:
    with pytest.raises(BadArgument) as refused:
        parse(["-kernel", kernel, *words.split()])
    assert refused.value.subject == named


def test_a_kernel_is_needed() -> None:
    with pytest.raises(BadArgument, match="-kernel: is needed"):
        parse(["-nodefaults"])
    with pytest.raises(BadArgument, match="could not open kernel file '_NO_FILE_4Uhere_'"):  # what the runner greps
        parse([*RUNNER, "_NO_FILE_4Uhere_", "-smp", "2"])


@pytest.mark.parametrize("option", MEANINGLESS)
def test_what_has_no_meaning_here_changes_nothing(kernel: str, option: str) -> None:
    values = MEANINGLESS[option]
    words = [] if values is None else [values[0] if values else "anything"]
    assert parse(["-kernel", kernel, f"-{option}", *words]) == parse(["-kernel", kernel])


@pytest.mark.parametrize(
    ("words", "about"),
    [
        ("-device ?", "device"),
        ("-machine help", "machine"),
        ("-M ?", "machine"),
        ("-cpu ?", "cpu"),
        ("-accel help", "accel"),
        ("--help", "help"),
        ("-h", "help"),
        ("-version", "version"),
    ],
)
def test_questions(words: str, about: str) -> None:
    assert parse(words.split()) == Query(about)


def test_answers_hold_what_the_runner_greps(capsys: pytest.CaptureFixture[str]) -> None:
    assert [qemu.main([word]) for word in ("--help", "-version")] == [0, 0]
    text = capsys.readouterr().out
    assert text.startswith("QEMU ")
    assert qemu.main(["-device", "?"]) == 0
    devices = capsys.readouterr().out
    assert '"pc-testdev"' in devices
    assert "pci-testdev" not in devices
    assert [qemu.main([option, "?"]) for option in ("-machine", "-cpu", "-accel")] == [0, 0, 0]


def test_errors_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert qemu.main(["-netdev", "user"]) == 1
    assert capsys.readouterr().err == "vtlab: -netdev: is not supported\n"


@pytest.mark.parametrize(
    ("text", "vsm", "warnings"),
    [
        ("max", False, ()),
        ("qemu64,+x2apic,+tsc-deadline,-pcid,-svm", False, ()),
        ("kvm64,hv_vpindex,hv_vsm,hv-stimer-direct,hv_time", True, ()),
        ("kvm64,hv_vsm=off,hv-spinlocks=0x1fff", False, ()),
        ("max,vendor=AuthenticAMD,phys-bits=40,host-phys-bits=off,migratable=no", False, ()),
        ("max,+vmx", False, ("CPU feature 'vmx' is not offered",)),
        ("qemu64,-x2apic", False, ("CPU feature 'x2apic' cannot be hidden",)),
        ("max,vendor=GenuineIntel", False, ("CPU property 'vendor' is AuthenticAMD, not GenuineIntel",)),
        ("max,pmu=7", False, ("CPU property 'pmu=7' has no effect",)),
    ],
)
def test_processors(text: str, vsm: bool, warnings: tuple[str, ...]) -> None:
    features = parse_cpu(text)
    assert (features.vsm, features.warnings) == (vsm, warnings)


@pytest.mark.parametrize("name", SHOWN)
def test_a_feature_that_is_said_to_be_shown_is(name: str) -> None:
    leaf, register, bit = SHOWN[name]
    assert cpuid(leaf, 0, 0, 1, 0, apic_enabled=True)[register] >> bit & 1


def test_fixed_properties_are_the_processors() -> None:
    _, low, high, middle = cpuid(0, 0, 0, 1, 0, apic_enabled=True)
    vendor = b"".join(part.to_bytes(4, "little") for part in (low, middle, high))
    assert {"vendor": vendor.decode(), "phys-bits": str(PHYSICAL_BITS)} == FIXED
