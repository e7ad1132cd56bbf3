"""A stock kernel with no command line but console=ttyS0: it boots, works and ends; and it is guarded from outside."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.linux.conftest import PATIENCE
from tests.integration.linux.images import Images
from vmm.cli.exit_codes import ExitCode
from vtlab.client import Lab, Machine
from vtlab.errors import Refused, WrongState
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.x86.registers import Cr4

Boot = Callable[..., Machine]
STOPPED = vmm_pb2.MACHINE_STATE_STOPPED
POLICY = Path(__file__).parents[3] / "deploy" / "policies" / "linux.yaml"
SHELL = "init: shell"

pytestmark = pytest.mark.timeout(400)


def command(machine: Machine, text: str) -> str:
    """What a shell command says; it must succeed."""
    status, said = ask(machine, text)
    assert status == 0, said
    return said


def ask(machine: Machine, text: str) -> tuple[int, str]:
    """Exit status and output of a shell command."""
    reader = machine.serial_reader(from_now=True)
    machine.write_serial(0, f"{text}\n")
    said = reader.read_until(re.compile(r"init: status (\d+)\r?\n"), PATIENCE)
    return int(said.split()[-1]), said.rpartition("init: status")[0]


@pytest.mark.parametrize("vp_count", [1, 2])
def test_it_boots_counts_and_reboots(boot: Boot, vp_count: int) -> None:
    machine = boot(vp_count, LOOP=2000)
    machine.wait_serial(re.compile(rf"init: started at [\d.]+ with {vp_count} processors"), timeout=PATIENCE)
    machine.wait_serial(re.compile(r"init: counted to 2000 from [\d.]+ to [\d.]+"), timeout=PATIENCE)
    end = machine.wait_state(STOPPED, timeout=PATIENCE)
    assert "0xcf9" in end.reason
    assert "reboot: machine restart" in machine.serial()


def test_it_switches_itself_off(boot: Boot) -> None:
    end = boot(LOOP=1, THEN="poweroff").wait_state(STOPPED, timeout=PATIENCE)
    assert "ACPI S5" in end.reason


def test_devices_are_found_and_interrupt(boot: Boot) -> None:
    machine = boot(LOOP=1, THEN="shell")
    machine.wait_serial(SHELL, timeout=PATIENCE)
    interrupts = command(machine, "cat /proc/interrupts")
    assert re.search(r"4: +[1-9]\d* +\S*IO-APIC +4-edge +ttyS0", interrupts)
    assert re.search(r"9: +\d+ +\S*IO-APIC +9-fasteoi +acpi", interrupts)
    assert "ttyS1" in command(machine, "cat /proc/tty/driver/serial; dmesg | grep ttyS1")
    log = command(machine, "dmesg")
    assert not re.search(r"ACPI (BIOS )?(Error|Warning)", log), "the tables are right"
    assert not re.search(r"Call Trace|WARNING|BUG:", log)


def test_guarding_needs_a_policy(boot: Boot) -> None:
    machine = boot(LOOP=1, THEN="shell")
    machine.wait_serial(SHELL, timeout=PATIENCE)
    with pytest.raises(Refused, match="no operator's policy"):
        machine.guard()
    assert not machine.info().vtl1_enabled
    command(machine, "true")


# Bytes of clear_user_erms and its kind.
_CLEAR_USER_SIZE = 16


def symbols(machine: Machine, pattern: str) -> list[int]:
    """Addresses of the kernel's symbols that match, as the kernel tells its root."""
    return [int(line.split()[0], 16) for line in command(machine, f"grep '{pattern}' /proc/kallsyms").splitlines()]


def hijack(machine: Machine, within: list[int], function: int, argument: int) -> None:
    """Makes a process call a function of the kernel, out of another that holds no lock, which would outlive it."""
    for _ in range(1000):
        machine.pause()
        registers = machine.registers().registers
        if any(start <= registers.rip < start + _CLEAR_USER_SIZE for start in within):
            machine.hijack(registers={"rip": function, "rdi": argument})
            return
        machine.resume()
    pytest.fail("no process was found there")


def test_a_guarded_kernel_cannot_be_made_to_clear_smep_and_lives_on(lab: Lab, boot: Boot) -> None:
    machine = boot(LOOP=1, THEN="shell")
    machine.wait_serial(SHELL, timeout=PATIENCE)
    lab.policy.set(machine, POLICY.read_text(), POLICY.name)
    assert machine.guard().vtl1_enabled
    with pytest.raises(WrongState, match="enabled already"):
        machine.guard()
    (write_cr4,) = symbols(machine, " native_write_cr4$")
    clear_user = symbols(machine, " clear_user_")
    cr4 = machine.registers().registers.cr4
    assert cr4 & Cr4.SMEP

    command(machine, "dd if=/dev/zero of=/dev/null bs=4M &")
    reader = machine.serial_reader(from_now=True)
    hijack(machine, clear_user, write_cr4, cr4 & ~Cr4.SMEP)
    oops = reader.read_until("end trace", PATIENCE)
    assert "general protection fault" in oops
    assert "native_write_cr4" in oops
    status, _ = ask(machine, "wait $!")
    assert status >= 128, "the process was killed, the kernel goes on"
    assert "alive" in command(machine, "echo alive")
    assert machine.registers().registers.cr4 & Cr4.SMEP
    with pytest.raises(Refused):
        machine.set_registers({"cr4": cr4 & ~Cr4.SMEP})


def test_cpu_1_goes_and_comes_back_with_pins_in_force(lab: Lab, boot: Boot) -> None:
    machine = boot(2, LOOP=1, THEN="shell")
    machine.wait_serial(SHELL, timeout=PATIENCE)
    lab.policy.set(machine, POLICY.read_text(), POLICY.name)
    machine.guard()
    online = "/sys/devices/system/cpu/cpu1/online"
    assert "1" in command(machine, f"echo 0 > {online}; nproc").split()
    assert "2" in command(machine, f"echo 1 > {online}; nproc").split()
    command(machine, "taskset 2 true")
    verdicts = [one for one in lab.policy.verdicts_so_far(machine) if one.exit.HasField("state_load")]
    *admitted, left = [one.resolution.action for one in verdicts]
    assert admitted
    assert set(admitted) == {vcpu_pb2.ACTION_RETRY}, "pages of the trampoline, sealed and as they were"
    assert left == vcpu_pb2.ACTION_COMMIT, "and behind it all pins"
    for vp_index in (0, 1):
        state = machine.registers(vp_index)
        assert state.registers.cr4 & Cr4.SMEP, vp_index
        with pytest.raises(Refused):
            machine.set_registers({"cr4": state.registers.cr4 & ~Cr4.SMEP}, vp_index=vp_index)
    assert not re.search(r"Call Trace|BUG:", command(machine, "dmesg"))


def test_the_command_line_guards_what_it_boots(images: Images) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vmm.cli.main", "run", "-kernel", images.kernel, "-initrd", images.initrd),
            *("-append", "console=ttyS0 LOOP=500", "-m", "256M", "-no-reboot", "--policy", POLICY),
            *("-guard-on", "init: started", "--timeout", str(PATIENCE)),
        ],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")
    assert "init: counted to 500" in done.stdout
    assert "general protection" not in done.stdout
