"""The public kvm-unit-tests (x86) on this machine, where VTLAB_KVM_UNIT_TESTS names a folder with their *.flat images.

They are driven as the suite's own runner drives QEMU, by `vtlab-qemu`. Exit code 1 is the suite's word for success.
Not in the table: tests of hardware virtualisation and of what only KVM or a feature of the host has (docs/limits.md).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vtlab.client import Lab

FOLDER = os.environ.get("VTLAB_KVM_UNIT_TESTS", "")
SUCCESS = 1
TIMEOUT = 120.0  # seconds; each takes a few alone, but tests run beside others
RUNNER = (
    "--no-reboot -nodefaults -device pc-testdev -device isa-debug-exit,iobase=0xf4,iosize=0x4 "
    "-vnc none -serial stdio -machine accel=tcg"
)
HYPERV = "kvm64,hv_vpindex,hv_synic"
# Image and the options that the suite's unittests.cfg gives it.
CASES = [
    ("eventinj", ""),
    ("hypercall", ""),
    ("hyperv_clock", "-smp 2 -cpu kvm64,hv_time"),
    ("hyperv_connections", f"-smp 2 -cpu {HYPERV} -device hyperv-testdev"),
    ("hyperv_stimer", f"-smp 2 -cpu {HYPERV},hv_time,hv_stimer -device hyperv-testdev"),
    ("hyperv_synic", f"-smp 2 -cpu {HYPERV} -device hyperv-testdev"),
    ("hyperv_vsm", f"-smp 2 -cpu {HYPERV},hv_vsm,hv_time,hv_stimer,hv_vapic,hv-stimer-direct,hv-xmm-input"),
    ("ioapic", "-cpu qemu64"),
    ("ioapic", "-smp 4 -cpu qemu64,+x2apic"),
    ("memory", "-cpu max"),
    ("pcid", "-cpu qemu64,-pcid,-invpcid"),
    ("rdpru", "-cpu max"),
    ("realmode", ""),
    ("rmap_chain", ""),
    ("setjmp", ""),
    ("smap", "-cpu max"),
    ("smptest", "-smp 2"),
    ("smptest", "-smp 3"),
    ("syscall", "-cpu Opteron_G1,vendor=AuthenticAMD"),
    ("tsc", "-cpu kvm64,+rdtscp"),
    ("umip", "-cpu qemu64,+umip"),
    ("vmexit", "-append cpuid"),
    ("vmexit", "-append inl_from_pmtimer"),
    ("vmexit", "-append tscdeadline_immed"),
    ("vmexit", "-smp 2 -append ipi"),
    ("vmexit", "-smp 2 -append ipi_halt"),
    ("vmexit", "-smp 2 -append toggle_cr0_wp"),
    ("xsave", "-cpu max"),
]


@pytest.fixture
def image(request: pytest.FixtureRequest) -> Path:
    """The image, or a skip that says what is missing."""
    if not FOLDER:
        pytest.skip("VTLAB_KVM_UNIT_TESTS names no folder with the *.flat images of kvm-unit-tests")
    path = Path(FOLDER) / f"{request.param}.flat"
    if not path.is_file():
        pytest.skip(f"VTLAB_KVM_UNIT_TESTS: {FOLDER} has no {path.name}")
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The file of variables that the runner hands to each test."""
    path = tmp_path / "environment"
    path.write_text("QEMU_ACCEL=tcg\nERRATA_FORCE=y\n")
    return path


@pytest.mark.timeout(TIMEOUT + 30)
@pytest.mark.parametrize(("image", "options"), CASES, indirect=["image"])
def test_the_suite_reports_success(lab: Lab, image: Path, options: str, environment: Path) -> None:
    where = lab.addresses
    arguments = shlex.split(f"{RUNNER} {options}")
    run = subprocess.run(
        [sys.executable, "-m", "vmm.cli.qemu", *arguments, "-kernel", image, "-initrd", environment],
        env=os.environ | {"VTLAB_VMM": where.vmm, "VTLAB_MONITOR": where.monitor, "VTLAB_TRUST": str(where.trust)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    output = run.stdout.decode(errors="replace")
    failures = [line for line in output.splitlines() if line.startswith("FAIL")]
    assert (failures, run.returncode) == ([], SUCCESS), output[-2000:] + run.stderr.decode(errors="replace")
