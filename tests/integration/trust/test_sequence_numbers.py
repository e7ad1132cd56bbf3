"""A hostile peer on VcpuService.Run of both real levels: numbers that repeat, skip, or carry other content.

It holds the VMM's certificate, since nobody else reaches this RPC at all (test_roles).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from tests.integration.trust.calls import connect_as
from vmm.launcher import LocalLab
from vtlab.client import Lab
from vtlab.errors import Conflict, VtlabError
from vtlab.ram import MACHINES, RamFile, create_ram_files, link_to_stores, remove_machine
from vtlab.status import from_rpc_error
from vtlab.trust.roles import Role
from vtlab.v1 import monitor_pb2, monitor_pb2_grpc, registers_pb2, vcpu_pb2, vcpu_pb2_grpc
from vtlab.v1.vcpu_pb2 import AttachRequest, BootImage, Enter, Exit, RunRequest, RunResponse

RAM = 2 << 20
# In real mode: INC AX; OUT 0x10, AL; back. Each OUT exits.
COUNTING = bytes.fromhex("40 e6 10 eb fb")
PATIENCE = 30
HALF_WRITE = Exit(
    vp_index=0,
    register_write=vcpu_pb2.RegisterWrite(name=registers_pb2.REGISTER_NAME_CR4, old_value=0x20, new_value=0x30),
)


class Stream:
    """One Run call, entered by hand."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: SimpleQueue[RunRequest | None] = SimpleQueue()
        self._call: Any = vcpu_pb2_grpc.VcpuServiceStub(channel).Run(iter(self._requests.get, None), timeout=PATIENCE)

    def enter(self, enter: Enter) -> Exit:
        """Raises the VtlabError that the level refuses with."""
        self._requests.put(RunRequest(enter=enter))
        try:
            response: RunResponse = next(self._call)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "level") from None
        return response.exit

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


@pytest.fixture(params=[0, 1], ids=["guest", "monitor"])
def vtl(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def channel(lab: Lab, vtl: int) -> Iterator[grpc.Channel]:
    """To a level that is attached to a machine of this test."""
    assert isinstance(lab, LocalLab)
    state = lab.directory / "vmm"
    folder = state / MACHINES / "repeated"
    folder.mkdir()
    link_to_stores(folder, state, [file.value for file in RamFile])
    create_ram_files(folder, RAM)
    (folder / "image").write_bytes(COUNTING)
    image = BootImage(
        path="image",
        sha256=hashlib.sha256(COUNTING).digest(),
        format=vcpu_pb2.IMAGE_FORMAT_FLAT,
        load_address=0x7C00,
        entry=0x7C00,
        start_mode=vcpu_pb2.START_MODE_REAL,
    )
    request = AttachRequest(
        vm="repeated",
        generation=1,
        vtl=vtl,
        vp_count=1,
        ram_size=RAM,
        memory_directory=str(folder),
        image=image,
    )
    with connect_as(lab, (Role.GUEST, Role.MONITOR)[vtl], Role.VMM) as opened:
        stub = vcpu_pb2_grpc.VcpuServiceStub(opened)
        stub.Attach(request, timeout=PATIENCE)
        yield opened
        stub.Detach(vcpu_pb2.DetachRequest(vm="repeated"), timeout=PATIENCE)
    remove_machine(folder)


@pytest.fixture
def stream(channel: grpc.Channel) -> Iterator[Stream]:
    opened = Stream(channel)
    yield opened
    opened.close()


def enter(sequence: int, vtl: int) -> Enter:
    if vtl:
        return Enter(sequence=sequence, reason=vcpu_pb2.ENTER_REASON_INTERCEPT, intercept=HALF_WRITE)
    resolution = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMPLETE if sequence > 1 else 0)  # type: ignore[arg-type]
    return Enter(sequence=sequence, reason=vcpu_pb2.ENTER_REASON_RESUME, resolution=resolution)


def done(lab: Lab, channel: grpc.Channel, vtl: int) -> int:
    """How often something really happened: OUTs of the guest, verdicts of the monitor."""
    if not vtl:
        request = vcpu_pb2.GetStateRequest(vp_index=0)
        state = vcpu_pb2_grpc.VcpuServiceStub(channel).GetState(request, timeout=PATIENCE).state
        return int(state.registers.rax & 0xFFFF)
    with connect_as(lab, Role.MONITOR, Role.OBSERVER) as looking:
        watch = monitor_pb2.WatchVerdictsRequest(vm="repeated", until_now=True)
        return len(list(monitor_pb2_grpc.MonitorServiceStub(looking).WatchVerdicts(watch, timeout=PATIENCE)))


def test_a_repeated_enter_is_answered_and_does_nothing(
    lab: Lab, channel: grpc.Channel, stream: Stream, vtl: int
) -> None:
    exits = [stream.enter(enter(1, vtl))]
    exits += [stream.enter(enter(1, vtl)) for _ in range(3)]
    assert all(exit_ == exits[0] for exit_ in exits)
    assert done(lab, channel, vtl) == 1
    second = stream.enter(enter(2, vtl))
    assert second.sequence == 2
    assert done(lab, channel, vtl) == 2


def test_on_a_new_stream_too(lab: Lab, channel: grpc.Channel, stream: Stream, vtl: int) -> None:
    first = stream.enter(enter(1, vtl))
    other = Stream(channel)
    try:
        assert other.enter(enter(1, vtl)) == first
        assert other.enter(enter(2, vtl)).sequence == 2
        assert done(lab, channel, vtl) == 2
    finally:
        other.close()


@pytest.mark.parametrize(
    ("numbers", "refused"),
    [((), 0), ((), 2), ((), (1 << 64) - 1), ((1,), 3), ((1, 2), 1), ((1, 2, 3), 1)],
    ids=["zero", "not the first", "the last of all", "a gap", "an old one", "a very old one"],
)
def test_other_numbers_are_refused(
    lab: Lab, channel: grpc.Channel, stream: Stream, vtl: int, numbers: tuple[int, ...], refused: int
) -> None:
    for number in numbers:
        stream.enter(enter(number, vtl))
    before = done(lab, channel, vtl)
    with pytest.raises(Conflict, match=f"enter {refused} after enter {len(numbers)}"):
        stream.enter(enter(refused, vtl))
    assert done(lab, channel, vtl) == before == len(numbers)


def test_a_number_with_another_content_is_refused(lab: Lab, channel: grpc.Channel, stream: Stream, vtl: int) -> None:
    stream.enter(enter(1, vtl))
    changed = enter(1, vtl)
    changed.status = 5
    with pytest.raises(Conflict, match="repeated with another content"):
        stream.enter(changed)
    assert done(lab, channel, vtl) == 1
    again = Stream(channel)
    assert again.enter(enter(1, vtl)).sequence == 1
    again.close()


def test_another_vcpu_is_not_entered(channel: grpc.Channel, stream: Stream, vtl: int) -> None:
    strange = enter(1, vtl)
    strange.vp_index = 1
    with pytest.raises(VtlabError, match="vCPU 1"):
        stream.enter(strange)


def test_an_older_generation_is_refused(channel: grpc.Channel, vtl: int, tmp_path: Path) -> None:
    request = AttachRequest(
        vm="repeated", generation=0, vtl=vtl, vp_count=1, ram_size=RAM, memory_directory=str(tmp_path)
    )
    with pytest.raises(grpc.RpcError) as refused:
        vcpu_pb2_grpc.VcpuServiceStub(channel).Attach(request, timeout=PATIENCE)
    error = from_rpc_error(refused.value, "level")
    assert isinstance(error, Conflict)
    assert "generation 0 after 1" in str(error)
