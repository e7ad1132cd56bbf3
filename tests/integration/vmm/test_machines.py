"""Machines of three real processes, with guests of a few instructions."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.integration.vmm import images
from tests.waiting import wait_until
from vmm.launcher import launch
from vmm.supervisor import Budget
from vtlab.client import Lab, Machine, calls
from vtlab.errors import BadArgument, LimitExceeded, NotFound, PeerUnavailable, WrongState
from vtlab.hyperv.hypercalls import HypercallCode
from vtlab.hyperv.status import HvStatus
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import IMAGE_FORMAT_FLAT, START_MODE_PROTECTED

RUNNING = vmm_pb2.MACHINE_STATE_RUNNING
PAUSED = vmm_pb2.MACHINE_STATE_PAUSED
STOPPED = vmm_pb2.MACHINE_STATE_STOPPED
FAILED = vmm_pb2.MACHINE_STATE_FAILED
Boot = Callable[..., Machine]
TIMEOUT = 30.0


def create(lab: Lab, code: bytes, **options: object) -> Machine:
    return lab.create(
        code,
        ram=16 << 20,
        image_format=IMAGE_FORMAT_FLAT,
        load_address=images.LOAD,
        entry=images.LOAD,
        start_mode=START_MODE_PROTECTED,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def boot(lab: Lab) -> Iterator[Boot]:
    """Creates and starts a machine; destroyed after the test."""
    made: list[Machine] = []

    def run(code: bytes, **options: object) -> Machine:
        made.append(create(lab, code, **options))
        made[-1].start()
        return made[-1]

    yield run
    for machine in made:
        machine.destroy()


def counted(machine: Machine) -> int:
    return int.from_bytes(machine.read_memory(images.RESULT, 4), "little")


def debug_exit(machine: Machine) -> int:
    return machine.wait_state(STOPPED, timeout=TIMEOUT).debug_exit


def test_a_paused_machine_stands_still(boot: Boot) -> None:
    machine = boot(images.COUNTER)
    wait_until(lambda: counted(machine) > 0, TIMEOUT)
    machine.pause()
    before = counted(machine)
    assert counted(machine) == before
    assert machine.registers().registers.rip >= images.LOAD
    machine.resume()
    wait_until(lambda: counted(machine) > before, TIMEOUT)


def test_set_registers_runs_no_instruction(boot: Boot) -> None:
    machine = boot(images.COUNTER)
    machine.pause()
    before = counted(machine)
    state = machine.set_registers({"rax": 0x1234, "rip": 0x10_0002})
    assert (state.registers.rax, state.registers.rip) == (0x1234, 0x10_0002)
    assert counted(machine) == before
    assert machine.registers().registers == state.registers


def test_registers_of_a_running_machine(boot: Boot) -> None:
    machine = boot(images.COUNTER)
    for value in range(3):
        assert machine.set_registers({"rbx": value}).registers.rbx == value
    assert machine.state == RUNNING
    before = counted(machine)
    wait_until(lambda: counted(machine) > before, TIMEOUT)


def test_hijack_runs_foreign_code(boot: Boot) -> None:
    machine = boot(images.COUNTER)
    code = images.assemble("mov eax, 7\n" + images.FINISH)
    machine.hijack(code, 0x30_0000, {"rip": 0x30_0000})
    assert debug_exit(machine) == 7


@pytest.mark.parametrize("code", [images.HALTED, images.IDLE], ids=["interrupts off", "interrupts on"])
def test_hijack_of_a_halted_guest(boot: Boot, code: bytes) -> None:
    machine = boot(code)
    wait_until(lambda: machine.registers().registers.rax == 0x4A17, TIMEOUT)
    machine.hijack(images.assemble("mov eax, 7\n" + images.FINISH), 0x30_0000, {"rip": 0x30_0000})
    assert debug_exit(machine) == 7


def test_written_code_is_executed(boot: Boot) -> None:
    """Code that was translated already and is then changed from outside."""
    machine = boot(images.COUNTER)
    wait_until(lambda: counted(machine) > 0, TIMEOUT)
    machine.pause()
    machine.write_memory(images.LOAD, images.assemble("mov eax, 9\n" + images.FINISH).ljust(32, b"\x90"))
    machine.set_registers({"rip": images.LOAD})
    machine.resume()
    assert debug_exit(machine) == 9


def test_serial_both_ways(boot: Boot) -> None:
    machine = boot(images.ECHO)
    machine.write_serial(0, "HAL")
    assert machine.wait_serial("IBM", timeout=TIMEOUT).endswith("IBM")


def test_reset_leaves_nothing(boot: Boot) -> None:
    machine = boot(images.RESET_ONCE_SEEN)
    wait_until(lambda: machine.info().generation >= 3, TIMEOUT)
    assert machine.info().state == RUNNING
    assert "0xcf9" in machine.info().reason


@pytest.mark.parametrize("code", [images.RESET_ONCE_SEEN, images.TRIPLE_FAULT], ids=["0xcf9", "triple fault"])
def test_stop_on_reset(boot: Boot, code: bytes) -> None:
    machine = boot(code, stop_on_reset=True)
    ended = machine.wait_state(STOPPED, timeout=TIMEOUT)
    assert not ended.HasField("debug_exit")
    assert "0xcf9" in ended.reason or "triple fault" in ended.reason
    assert machine.registers().registers.rip >= images.LOAD
    assert machine.reset().generation == 2


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (0x7FFF, HvStatus.INVALID_HYPERCALL_CODE),
        (HypercallCode.ENABLE_PARTITION_VTL, HvStatus.INVALID_PARTITION_ID),
        (HypercallCode.ENABLE_PARTITION_VTL | 1 << 17, HvStatus.INVALID_HYPERCALL_INPUT),
    ],
)
def test_hypercalls(boot: Boot, value: int, status: HvStatus) -> None:
    machine = boot(images.hypercall(value))
    assert debug_exit(machine) == status
    exits = [event.exit for event in machine.events(("exit",), until_now=True)]
    (exit_,) = [one for one in exits if one.HasField("hypercall")]
    assert exit_.registers.rax & 0xFFFFFFFF == value


def test_vtl_call_without_vtl1_is_an_undefined_opcode(boot: Boot) -> None:
    machine = boot(images.hypercall(HypercallCode.VTL_CALL), stop_on_reset=True)
    assert "triple fault" in machine.wait_state(STOPPED, timeout=TIMEOUT).reason


def test_fw_cfg_dma(boot: Boot) -> None:
    machine = boot(images.FW_CFG_DMA)
    assert debug_exit(machine).to_bytes(4, "little") == b"QEMU"
    (event,) = machine.events(("device",), until_now=True)
    assert (event.device.gpa, event.device.size, event.device.refused) == (0x30_0000, 4, False)


def test_operations_in_the_wrong_state(lab: Lab) -> None:
    with create(lab, images.COUNTER) as machine:
        with pytest.raises(WrongState, match="resume"):
            machine.resume()
        machine.start()
        with pytest.raises(WrongState, match="RUNNING") as caught:
            machine.start()
        assert caught.value.operation == "start"
        with pytest.raises(LimitExceeded, match=machine.name):
            create(lab, images.COUNTER)
        assert machine.state == RUNNING
    with pytest.raises(NotFound, match=machine.name):
        machine.info()


def test_an_image_larger_than_ram_leaves_no_machine(lab: Lab) -> None:
    with pytest.raises(BadArgument, match="ram_size"):
        lab.create(b"\xf4", ram=4096)
    assert lab.machines() == []


@pytest.mark.parametrize("victim", [Role.GUEST, Role.MONITOR])
def test_a_level_that_dies_for_good(victim: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vCPU stays stopped, and the laboratory says who is gone."""
    monkeypatch.setattr(calls, "RESTART_BUDGET", 0.5)
    with launch(budget=Budget(deaths=1)) as lab:
        machine = create(lab, images.COUNTER)
        machine.start()
        wait_until(lambda: counted(machine) > 0, TIMEOUT)
        os.kill(lab.pids[victim], signal.SIGKILL)
        assert str(lab.supervisor.wait_failure()).startswith(
            f"{victim}: ended 1 times within 0 s, at last with code -9"
        )
        with pytest.raises(PeerUnavailable, match="vmm at"):
            machine.pause()
        machine.close()
