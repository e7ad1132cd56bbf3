"""The disk: it moves pages with VTL0's rights, and keeps them over RESET."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.vmm.fakes import FakeLevel
from vmm import client_access
from vmm.board import Board
from vmm.devices.disk import (
    CAPACITY,
    COMMAND,
    COUNT,
    FIRST,
    MAX_PAGES,
    PAGE,
    READ_PAGES,
    WRITE_PAGES,
    Disk,
    DiskController,
)
from vmm.machine import Machine
from vmm.machines import check_spec
from vmm.states import Operation
from vtlab.errors import BadArgument, Unsupported
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.vcpu_pb2 import PageAccess, ProtectionUpdate
from vtlab.v1.vmm_pb2 import MachineSpec

PAGES = 8


@pytest.fixture
def board(board: Board, tmp_path: Path) -> Iterator[Board]:
    board.disk = Disk(tmp_path / "disk", PAGES * PAGE_SIZE)
    log: list[vmm_pb2.DeviceEvent] = []
    board.ports.add(DiskController(board.disk, board.memory, log.append))
    yield board
    board.disk.close()


def transfer(board: Board, command: int, first: int, count: int, page: int) -> bool:
    for port, value in ((FIRST, first), (COUNT, count), (PAGE, page), (COMMAND, command)):
        board.ports.write(port, 4, value)
    return not board.ports.read(COMMAND, 4)


def test_pages_go_there_and_back(board: Board) -> None:
    board.memory.write(3 * PAGE_SIZE, b"one".ljust(PAGE_SIZE, b"1") + b"two")
    assert transfer(board, WRITE_PAGES, 5, 2, 3)
    assert transfer(board, READ_PAGES, 6, 1, 9)
    assert board.memory.read(9 * PAGE_SIZE, 3) == b"two"
    assert client_access.read_disk(board, 5 * PAGE_SIZE, 3) == b"one"
    assert board.ports.read(CAPACITY, 4) == PAGES


@pytest.mark.parametrize(
    ("command", "first", "count", "page"),
    [
        *((3, 0, 1, 1), (0, 0, 1, 1)),
        *((READ_PAGES, PAGES, 1, 1), (WRITE_PAGES, PAGES - 1, 2, 1), (READ_PAGES, 0xFFFFFFFF, 1, 1)),
        *((READ_PAGES, 0, 0, 1), (READ_PAGES, 0, MAX_PAGES + 1, 1)),
        *((READ_PAGES, 0, 1, 0xFFFFFFFF), (WRITE_PAGES, 0, 1, 0x200)),
    ],
)
def test_a_transfer_that_cannot_be(board: Board, command: int, first: int, count: int, page: int) -> None:
    assert not transfer(board, command, first, count, page)
    assert client_access.read_disk(board, 0, PAGES * PAGE_SIZE) == bytes(PAGES * PAGE_SIZE)


@pytest.mark.parametrize("command", [READ_PAGES, WRITE_PAGES])
def test_dma_has_the_rights_of_vtl0(board: Board, command: int) -> None:
    """Two pages, the second closed: nothing of either moves."""
    board.memory.write(3 * PAGE_SIZE, b"A" * 2 * PAGE_SIZE)
    client_access.write_disk(board, 0, b"B" * 2 * PAGE_SIZE)
    board.protect([ProtectionUpdate(runs=[4, 1], access=PageAccess(), store=vcpu_pb2.PAGE_STORE_SEALED)])
    assert not transfer(board, command, 0, 2, 3)
    assert board.memory.read(3 * PAGE_SIZE, 1) == b"A"
    assert board.memory.read(4 * PAGE_SIZE, 1, vtl=1) == b"A"
    assert client_access.read_disk(board, 0, 1) == b"B"


def test_what_was_selected_outlives_the_vmm(board: Board) -> None:
    transfer(board, READ_PAGES, 2, 3, 0xFFFFFF)
    (device,) = (one for one in board.ports.devices if isinstance(one, DiskController))
    assert board.disk is not None
    again = DiskController(board.disk, board.memory, lambda _event: None)
    again.restore(device.save())
    assert [again.read(port, 4) for port in (FIRST, COUNT, PAGE, COMMAND)] == [2, 3, 0xFFFFFF, 1]
    with pytest.raises(ValueError, match="3 bytes"):
        again.restore(b"abc")


def test_a_disk_outlives_reset_and_ends_with_the_machine(
    make_machine: Callable[..., tuple[Machine, FakeLevel, FakeLevel]], tmp_path: Path
) -> None:
    machine, _, _ = make_machine(disk_size=PAGE_SIZE)
    with machine.doing(Operation.WRITE_DISK) as board:
        client_access.write_disk(board, 8, b"kept")
    machine.start()
    machine.reset()
    machine.stop()
    with machine.doing(Operation.READ_DISK) as board:
        assert client_access.read_disk(board, 0, 16) == bytes(8) + b"kept" + bytes(4)
        with pytest.raises(BadArgument, match="are not on a disk"):
            client_access.read_disk(board, PAGE_SIZE - 1, 2)
        with pytest.raises(BadArgument, match="are more than"):
            client_access.read_disk(board, 0, 1 << 21)
    assert (tmp_path / machine.vm / "disk").stat().st_mode & 0o777 == 0o600
    machine.destroy()
    assert not (tmp_path / machine.vm).exists()


def test_a_machine_without_one(make_machine: Callable[..., tuple[Machine, FakeLevel, FakeLevel]]) -> None:
    machine, _, _ = make_machine()
    with machine.doing(Operation.READ_DISK) as board:
        assert board.ports.read(CAPACITY, 4) == 0xFFFFFFFF
        with pytest.raises(Unsupported, match="has no disk"):
            client_access.read_disk(board, 0, 1)


@pytest.mark.parametrize("size", [1, PAGE_SIZE + 1, 2 << 30])
def test_a_size_that_no_disk_has(size: int) -> None:
    with pytest.raises(BadArgument, match=r"spec\.disk_size"):
        check_spec("vm", MachineSpec(ram_size=2 << 20, vp_count=1, disk_size=size))
