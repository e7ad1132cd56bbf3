"""The SDK against a toy VMM and monitor in this process: what it sends, what it waits for, how it fails."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.client.toy import ToyMonitor, ToyVmm
from vtlab.channels import BoundServer, ServerConfig, serve
from vtlab.client import Addresses, Lab, Machine, calls, connect
from vtlab.errors import (
    AlreadyExists,
    BadArgument,
    BadImage,
    Cancelled,
    NotFound,
    PeerUnavailable,
    PermissionDenied,
    Refused,
    TimedOut,
    WrongState,
)
from vtlab.trust.certificates import ensure_trust
from vtlab.v1 import monitor_pb2_grpc, registers_pb2, vmm_pb2, vmm_pb2_grpc


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_trust(tmp_path_factory.mktemp("trust"))


@pytest.fixture
def vmm_server(trust: Path, tmp_path: Path) -> Iterator[BoundServer]:
    def register(server: grpc.Server) -> None:
        vmm_pb2_grpc.add_VmmServiceServicer_to_server(ToyVmm(), server)

    server = serve(ServerConfig((f"unix:{tmp_path}/v",), trust, "vmm", tmp_path), register)
    yield server
    server.stop(0)


@pytest.fixture
def monitor_server(trust: Path, tmp_path: Path) -> Iterator[BoundServer]:
    def register(server: grpc.Server) -> None:
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(ToyMonitor(), server)

    server = serve(ServerConfig((f"unix:{tmp_path}/m",), trust, "monitor", tmp_path), register)
    yield server
    server.stop(0)


@pytest.fixture
def lab(vmm_server: BoundServer, monitor_server: BoundServer, trust: Path) -> Iterator[Lab]:
    with connect(vmm_server.addresses[0], monitor_server.addresses[0], trust) as lab:
        yield lab


@pytest.fixture
def machine(lab: Lab) -> Iterator[Machine]:
    with lab.create(b"image", name="a") as machine:
        yield machine


def test_the_block_destroys_the_machine(lab: Lab) -> None:
    with lab.create(b"image", ram=4 << 20, command_line="heki=1", modules=[b"one", (b"two", "x=1")]) as machine:
        spec = machine.info().spec
        assert [one.vm for one in lab.machines()] == [machine.name]
    assert (spec.ram_size, spec.image.command_line, spec.vtl1) == (4 << 20, "heki=1", True)
    assert [module.command_line for module in spec.image.modules] == ["", "x=1"]
    assert lab.machines() == []
    with pytest.raises(NotFound, match=f"machine '{machine.name}'"):
        lab.machine(machine.name)


def test_an_error_in_the_block_is_the_one_that_is_seen(lab: Lab) -> None:
    def fail_after_the_end() -> None:
        with lab.create(b"image") as machine:
            machine.destroy()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_the_end()


def test_a_large_image_travels_in_chunks(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(range(256)) * (10 << 10))  # 2.5 MiB
    with lab.create(path) as machine:
        assert machine.info().state == vmm_pb2.MACHINE_STATE_CREATED


def test_images_at_fault_are_named(lab: Lab, tmp_path: Path) -> None:
    missing, folder, empty, large, bad = (tmp_path / name for name in ("missing", "folder", "empty", "large", "bad"))
    folder.mkdir()
    empty.touch()
    large.write_bytes(b"x")
    with large.open("r+b") as file:
        file.truncate(64 << 30)
    bad.write_bytes(b"bad")
    for path, detail in [
        (missing, "No such file or directory"),
        (folder, "Is a directory"),
        (empty, "is empty"),
        (large, "has 68719476736 bytes, more than the machine's 67108864 bytes of RAM"),
        (bad, "e_machine is 3"),
    ]:
        with pytest.raises(BadImage) as wrong:
            lab.create(path)
        assert str(wrong.value) == f"{path}: {detail}"
    assert lab.machines() == []


def test_two_of_a_name_and_two_starts(lab: Lab, machine: Machine) -> None:
    with pytest.raises(AlreadyExists, match="machine 'a': the name is taken"):
        lab.create(b"image", name="a")
    machine.start()
    with pytest.raises(WrongState) as twice:
        machine.start()
    assert (twice.value.state, twice.value.operation) == ("RUNNING", "start")


def test_moves_and_waits(machine: Machine) -> None:
    machine.start()
    assert machine.pause().state == vmm_pb2.MACHINE_STATE_PAUSED
    assert machine.wait_state(vmm_pb2.MACHINE_STATE_PAUSED).vm == "a"
    machine.resume()
    with pytest.raises(TimedOut, match=r"no state STOPPED in 0\.05 s"):
        machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=0.05)
    timer = threading.Timer(0.1, machine.stop)
    timer.start()
    assert machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED).reason == "by the operator"
    timer.join()
    with pytest.raises(WrongState, match=r"is STOPPED \(by the operator\), not RUNNING"):
        machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING)


def test_serial_ports_are_read_in_the_background(machine: Machine) -> None:
    machine.start()
    assert machine.wait_serial("hello") == "hello"
    machine.write_serial(1, "ping\npong\n")
    reader = machine.serial_reader(1)
    assert reader.read_line() == "PING"
    assert reader.read_until(re.compile(r"P.NG")) == "PONG"
    assert reader.read_line() == ""
    with pytest.raises(TimedOut, match=r"no serial output 'never' on COM2 in 0\.05 s; COM1 last said 'hello"):
        machine.wait_serial("never", port=1, timeout=0.05)
    assert machine.serial(1) == "PING\nPONG\n"
    assert machine.serial_reader(1, from_now=True).read() == b""


def test_a_machine_that_ended_is_not_waited_for(machine: Machine) -> None:
    machine.start()
    machine.write_serial(0, "quit\n")
    machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED)
    assert machine.serial(0) == "hello\nbye\n"
    with pytest.raises(WrongState, match=r"is STOPPED \(the guest quit\), so no serial output 'more'"):
        machine.wait_serial("more", timeout=60)


def test_lost_events_are_told(machine: Machine) -> None:
    machine.write_serial(0, "lose\n")
    machine.write_serial(0, "x")
    machine.wait_serial("X")
    with pytest.raises(TimedOut, match="7 events were lost"):
        machine.wait_serial("more", timeout=0.01)


def test_a_vmm_that_dies_ends_the_waiting(lab: Lab, vmm_server: BoundServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it was away for longer than a restart may take, which is a second here."""
    monkeypatch.setattr(calls, "RESTART_BUDGET", 1.0)
    machine = lab.create(b"image")
    machine.start()
    timer = threading.Timer(0.2, vmm_server.stop, [0])
    timer.start()
    with pytest.raises(PeerUnavailable, match="vmm at unix:"):
        machine.wait_serial("never", timeout=30)
    timer.join()
    with pytest.raises(PeerUnavailable), machine:
        pass


def test_registers(machine: Machine) -> None:
    table = registers_pb2.TableRegister(base=0x1000, limit=0xFF)
    state = machine.set_registers({"rip": 0x100000, "RAX": (1 << 64) - 1, "gdtr": table}, {0xC0000082: 5})
    assert (state.registers.rip, state.registers.rax, state.gdtr) == (0x100000, (1 << 64) - 1, table)
    assert machine.registers().msrs[0] == registers_pb2.MsrValue(index=0xC0000082, value=5)
    with pytest.raises(Refused) as refused:
        machine.set_registers({"cr0": 1})
    assert refused.value.rule == "registers.cr0"
    for name, value, detail in [
        ("cr9", 0, "is none of rax"),
        ("rax", -1, "does not fit"),
        ("rax", 1 << 64, "does not fit"),
    ]:
        with pytest.raises(BadArgument, match=detail):
            machine.set_registers({name: value})
    assert machine.hijack(b"\xf4", 0x2000, {"rip": 0x2000}).registers.rip == 0x100000
    assert machine.read_memory(0x2000, 1) == b"\xf4"


def test_memory_travels_in_parts(machine: Machine) -> None:
    data = bytes(range(256)) * 4097  # 1 MiB and a page
    machine.write_memory(0x1000, data)
    assert machine.read_memory(0x1000, len(data)) == data
    assert machine.read_memory(0x1000, 0) == b""


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_an_address_that_is_none_is_named(machine: Machine, address: int) -> None:
    for use in (lambda: machine.read_memory(address, 8), lambda: machine.write_memory(address, b"x")):
        with pytest.raises(BadArgument, match="gpa"):
            use()
    with pytest.raises(BadArgument, match="gva"):
        machine.translate(address)


def test_virtual_memory_is_read_page_by_page(machine: Machine) -> None:
    machine.write_memory(0x2FFE, b"ab")
    machine.write_memory(0x1000, b"cd")
    assert machine.translate(0x1FFE).gpa == 0xFFE
    assert machine.read_virtual(0x3FFE, 2) == b"ab"
    machine.write_memory(0x5000, b"cd")
    assert machine.read_virtual(0x3FFE, 4) == b"abcd"
    with pytest.raises(BadArgument, match="address 0x100000: is not mapped"):
        machine.read_virtual(0xFFFFF, 2)


def test_events_by_kind(machine: Machine) -> None:
    machine.start()
    events = machine.events(["state"], from_sequence=2)
    assert next(events).state.state == vmm_pb2.MACHINE_STATE_RUNNING
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(BadArgument, match="event kind 'weather': is none of state, exit"):
        machine.events(["weather"])


def test_policy(lab: Lab, machine: Machine) -> None:
    assert lab.policy.set(machine, "version: 1").text == "version: 1"
    assert lab.policy.lock("a").locked
    assert lab.policy.check("x").problems[0].line == 3
    assert next(lab.policy.verdicts(machine)).rule == "text"
    assert lab.policy.get(machine).rules == []


def test_a_lab_that_was_closed_says_so(lab: Lab) -> None:
    lab.policy.check("x")
    lab.close()
    with pytest.raises(Cancelled, match=r"vmm .* the channel to it was closed"):
        lab.machines()
    with pytest.raises(Cancelled, match=r"monitor .* the channel to it was closed"):
        lab.policy.check("x")


def test_an_absent_monitor_is_named(vmm_server: BoundServer, trust: Path) -> None:
    address = vmm_server.addresses[0]
    with Lab(Addresses(address, "unix:/nonexistent", trust), timeout=0.3) as lab:
        assert lab.machines() == []
        with pytest.raises(PeerUnavailable, match="monitor at unix:/nonexistent: no answer"):
            lab.policy.get("a")
    with Lab(Addresses(address, "", trust)) as lab, pytest.raises(PeerUnavailable, match="set VTLAB_MONITOR"):
        lab.policy.get("a")


def test_an_observer_only_looks(vmm_server: BoundServer, trust: Path) -> None:
    with connect(vmm_server.addresses[0], "", trust, role="observer") as lab:
        assert lab.machines() == []
        with pytest.raises(PermissionDenied, match="role observer: may not call"):
            lab.create(b"image")


def test_addresses_from_the_environment(
    vmm_server: BoundServer, trust: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("VTLAB_VMM", "VTLAB_MONITOR", "VTLAB_TRUST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PeerUnavailable, match="none is running: start one with `vtlab up`, or set VTLAB_VMM"):
        connect()
    for name, value in Addresses(vmm_server.addresses[0], "", trust).environment().items():
        monkeypatch.setenv(name, value)
    with connect() as lab:
        assert lab.machines() == []
