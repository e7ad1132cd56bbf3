"""fw_cfg by QEMU's specification, and its DMA with VTL0's rights."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.board import Board
from vmm.devices.fw_cfg import SCRATCH_NAME, SCRATCH_SIZE, Control, Key
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.vcpu_pb2 import PageAccess, ProtectionUpdate

REQUEST = 0x1000


def item(board: Board, key: int, size: int) -> bytes:
    """By the traditional interface."""
    board.ports.write(0x510, 2, key)
    return bytes(board.ports.read(0x511, 1) for _ in range(size))


def dma(board: Board, control: int, length: int, address: int, request: int = REQUEST) -> int:
    """The control word afterwards."""
    board.memory.write(request, struct.pack(">IIQ", control, length, address), vtl=1)
    board.ports.write(0x514, 4, int.from_bytes((request >> 32).to_bytes(4, "big"), "little"))
    board.ports.write(0x518, 4, int.from_bytes((request & 0xFFFFFFFF).to_bytes(4, "big"), "little"))
    return int.from_bytes(board.memory.read(request, 4, vtl=1), "big")


def files(board: Board) -> dict[str, tuple[int, int]]:
    count = int.from_bytes(item(board, Key.FILE_DIRECTORY, 4), "big")
    found = {}
    for _ in range(count):
        size, key, _, name = struct.unpack(">IHH56s", bytes(board.ports.read(0x511, 1) for _ in range(64)))
        found[name.rstrip(b"\0").decode()] = (key, size)
    return found


def select(key: int) -> int:
    return key << 16 | Control.SELECT


def protect(board: Board, page: int, store: vcpu_pb2.PageStore.ValueType, *, read: bool) -> None:
    board.protect([ProtectionUpdate(runs=[page, 1], access=PageAccess(read=read), store=store)])


def refusals(board: Board) -> list[vmm_pb2.DeviceEvent]:
    return [event.device for event in board.events.kept((vmm_pb2.EVENT_KIND_DEVICE,)) if event.device.refused]


def test_well_known_items(board: Board) -> None:
    assert item(board, Key.SIGNATURE, 4) == b"QEMU"
    assert item(board, Key.ID, 4) == b"\3\0\0\0"
    assert int.from_bytes(item(board, Key.RAM_SIZE, 8), "little") == board.memory.size
    assert int.from_bytes(item(board, Key.NB_CPUS, 2), "little") == 1
    assert item(board, 0x7777, 4) == bytes(4)
    assert item(board, Key.SIGNATURE, 6) == b"QEMU\0\0"


def test_dma_signature(board: Board) -> None:
    high = board.ports.read(0x514, 4).to_bytes(4, "little")
    low = board.ports.read(0x518, 4).to_bytes(4, "little")
    assert high + low == b"QEMU CFG"


def test_scratch_round_trip(board: Board) -> None:
    key, size = files(board)[SCRATCH_NAME]
    assert size == SCRATCH_SIZE
    board.memory.write(0x2000, b"payload!")
    assert dma(board, select(key) | Control.WRITE, 8, 0x2000) == 0
    assert dma(board, select(key) | Control.READ, 16, 0x3000) == 0
    assert board.memory.read(0x3000, 16) == b"payload!" + bytes(8)
    assert dma(board, select(key) | Control.SKIP, 4, 0) == 0
    assert dma(board, Control.READ, 4, 0x4000) == 0
    assert board.memory.read(0x4000, 4) == b"oad!"


def test_reads_past_the_end_are_zero(board: Board) -> None:
    board.memory.write(0x3000, b"\xff" * 8)
    assert dma(board, select(Key.SIGNATURE) | Control.READ, 8, 0x3000) == 0
    assert board.memory.read(0x3000, 8) == b"QEMU" + bytes(4)


@pytest.mark.parametrize(("key", "length"), [(Key.SIGNATURE, 4), (0x20, SCRATCH_SIZE + 1), (0x7777, 1)])
def test_writes_that_do_not_fit(board: Board, key: int, length: int) -> None:
    assert dma(board, select(key) | Control.WRITE, length, 0x2000) == Control.ERROR


def test_dma_writes_of_code_are_told_to_the_guest(board: Board) -> None:
    dma(board, select(Key.SIGNATURE) | Control.READ, 4, 0x3000)
    pages = [gfn for update in board.processors[0]._pending for gfn in update.invalidate_code.gfns]
    assert 3 in pages


@pytest.mark.parametrize("store", [vcpu_pb2.PAGE_STORE_SEALED, vcpu_pb2.PAGE_STORE_PRIVATE])
def test_dma_into_a_guarded_page_is_refused(board: Board, store: vcpu_pb2.PageStore.ValueType) -> None:
    """The attack: the guest programs a device to write what its kernel may not."""
    board.memory.write(0x3000, b"text")
    protect(board, 3, store, read=store == vcpu_pb2.PAGE_STORE_SEALED)
    assert dma(board, select(Key.SIGNATURE) | Control.READ, 4, 0x3000) == Control.ERROR
    assert dma(board, select(Key.SIGNATURE) | Control.READ, 4, 0x2FFE) == Control.ERROR
    assert board.memory.read(0x3000, 4, vtl=1) == b"text"
    assert board.memory.read(0x2FFE, 2) == bytes(2)
    assert [event.gpa for event in refusals(board)] == [0x3000, 0x2FFE]
    assert "page 0x3" not in refusals(board)[0].what
    assert "VTL0 may not write" in refusals(board)[0].what


def test_dma_out_of_a_private_page_is_refused(board: Board) -> None:
    key, _ = files(board)[SCRATCH_NAME]
    board.memory.write(0x3000, b"secret")
    protect(board, 3, vcpu_pb2.PAGE_STORE_PRIVATE, read=False)
    assert dma(board, select(key) | Control.WRITE, 6, 0x3000) == Control.ERROR
    assert item(board, key, 6) == bytes(6)


def test_a_request_in_a_guarded_page(board: Board) -> None:
    protect(board, 1, vcpu_pb2.PAGE_STORE_PRIVATE, read=False)
    control = select(Key.SIGNATURE) | Control.READ
    assert dma(board, control, 4, 0x3000) == control  # not read, so not answered either
    assert board.memory.read(0x3000, 4) == bytes(4)
    assert refusals(board)[0].gpa == REQUEST


def test_a_request_that_cannot_be_answered(board: Board) -> None:
    protect(board, 1, vcpu_pb2.PAGE_STORE_SEALED, read=True)
    before = board.memory.read(REQUEST, 16)
    board.memory.write(REQUEST, struct.pack(">IIQ", Control.SKIP, 1, 0), vtl=1)
    board.ports.write(0x518, 4, int.from_bytes(REQUEST.to_bytes(4, "big"), "little"))
    assert board.memory.read(REQUEST, 4) == struct.pack(">I", Control.SKIP)
    assert before != board.memory.read(REQUEST, 16)
    assert refusals(board)[0].what.startswith("answer")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    accesses=st.lists(
        st.tuples(st.booleans(), st.integers(0x510, 0x51B), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)),
        max_size=12,
    ),
    request=st.binary(min_size=16, max_size=16),
)
def test_any_sequence_of_accesses(board: Board, accesses: list[tuple[bool, int, int, int]], request: bytes) -> None:
    """Whatever a guest does to the ports, a private page neither changes nor is read."""
    protect(board, 7, vcpu_pb2.PAGE_STORE_PRIVATE, read=False)
    board.memory.write(0x7000, b"secret", vtl=1)
    board.memory.write(REQUEST, request)
    for write, port, size, value in accesses:
        if write:
            board.ports.write(port, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= board.ports.read(port, size) < 1 << 8 * size
    dma(board, select(0x20) | Control.WRITE, PAGE_SIZE, 0x7000)
    assert board.memory.read(0x7000, 6, vtl=1) == b"secret"
    assert b"secret" not in item(board, 0x20, SCRATCH_SIZE)
