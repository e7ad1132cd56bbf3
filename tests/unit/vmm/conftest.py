"""Machines of real parts between two fake levels, and boards without threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.vmm.fakes import FakeLevel
from vmm import designs
from vmm.board import Board
from vmm.devices.bus import PortBus
from vmm.devices.fw_cfg import FwCfg
from vmm.devices.testdev import TestDevice
from vmm.events import EventLog
from vmm.gate import Gate
from vmm.hyperv_msrs import SyntheticMsrs
from vmm.images import ImageStore
from vmm.machine import Machine
from vmm.memory import Memory
from vmm.processor import Processor
from vmm.states import Operation
from vmm.vtl import PartitionVtl, VpVtl
from vtlab.errors import NotFound
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import BootImage, InvalidateCode, Update
from vtlab.v1.vmm_pb2 import MachineSpec

RAM = 2 << 20
LOOK = Operation.READ_MEMORY


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def guest(log: list[str]) -> FakeLevel:
    return FakeLevel(0, log)


@pytest.fixture
def monitor(log: list[str]) -> FakeLevel:
    return FakeLevel(1, log)


@pytest.fixture
def spec() -> MachineSpec:
    return MachineSpec(ram_size=RAM, vp_count=1, vtl1=True)


@pytest.fixture
def make_machine(tmp_path: Path, log: list[str]) -> Iterator[Callable[..., tuple[Machine, FakeLevel, FakeLevel]]]:
    """Makes machines with their two levels; all are destroyed after the test."""
    images = ImageStore(tmp_path / "images")
    sha256, _ = images.add([b"\xf4"])
    made: list[Machine] = []

    def make(**fields: object) -> tuple[Machine, FakeLevel, FakeLevel]:
        guest, monitor = FakeLevel(0, log), FakeLevel(1, log)
        values = {"ram_size": RAM, "vp_count": 1, "vtl1": True, "image": BootImage(sha256=sha256)} | fields
        spec = MachineSpec(**values)  # type: ignore[arg-type]
        vm = f"vm{len(made)}"
        machine = Machine(vm, spec, tmp_path / vm, images, guest, monitor if spec.vtl1 else None, EventLog(vm))
        made.append(machine)
        return machine, guest, monitor

    yield make
    for machine in made:
        with suppress(NotFound):
            machine.destroy()


@pytest.fixture
def machine_parts(
    make_machine: Callable[..., tuple[Machine, FakeLevel, FakeLevel]],
) -> tuple[Machine, FakeLevel, FakeLevel]:
    return make_machine()


@pytest.fixture
def board(tmp_path: Path, spec: MachineSpec, guest: FakeLevel, monitor: FakeLevel) -> Iterator[Board]:
    """A board whose vCPU 0 is outside: handlers can be called directly."""
    made: list[Board] = []
    memory = Memory(tmp_path, RAM, lambda pages: made[0].post_all(Update(invalidate_code=InvalidateCode(gfns=pages))))
    gate = Gate(spec.vp_count, guest.kick)
    events = EventLog("vm")
    ports = PortBus([FwCfg(memory, 1, lambda event: events.record(vmm_pb2.EVENT_KIND_DEVICE, event)), TestDevice()])
    msrs, design = SyntheticMsrs(memory), designs.create(spec)
    result = Board("vm", spec, memory, events, gate, guest, monitor, PartitionVtl(True), msrs, ports, design)
    result.processors += [Processor(index, guest, monitor, gate, VpVtl()) for index in range(spec.vp_count)]
    made.append(result)
    yield result
    memory.close()


@pytest.fixture
def processor(board: Board) -> Processor:
    return board.processors[0]
