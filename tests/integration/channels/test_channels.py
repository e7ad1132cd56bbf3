"""Servers and channels over real sockets: who gets in, what errors look like, how a server ends."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.waiting import wait_until
from vtlab.channels import BoundServer, ServerConfig, dial, serve
from vtlab.errors import (
    BadArgument,
    InternalError,
    LimitExceeded,
    PeerUnavailable,
    PermissionDenied,
    VtlabError,
    WrongState,
)
from vtlab.health import main as health_main
from vtlab.status import translated
from vtlab.trust.certificates import ensure_trust
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2, vmm_pb2_grpc


class Toy(vmm_pb2_grpc.VmmServiceServicer):
    """Fails in the ways that a server can."""

    def GetMachine(
        self, request: vmm_pb2.GetMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.GetMachineResponse:
        return vmm_pb2.GetMachineResponse(machine=vmm_pb2.Machine(vm=request.vm))

    def StartMachine(
        self, request: vmm_pb2.StartMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.StartMachineResponse:
        raise WrongState(f"machine '{request.vm}'", state="RUNNING", operation="start")

    def StopMachine(
        self, request: vmm_pb2.StopMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.StopMachineResponse:
        raise KeyError("surprise")

    def WatchEvents(
        self, request: vmm_pb2.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[vmm_pb2.WatchEventsResponse]:
        yield vmm_pb2.WatchEventsResponse(event=vmm_pb2.Event(sequence=1))
        if request.vm == "forever":
            closed = threading.Event()
            context.add_callback(closed.set)
            closed.wait()
        raise WrongState(f"machine '{request.vm}'", "went away")


def register(server: grpc.Server) -> None:
    vmm_pb2_grpc.add_VmmServiceServicer_to_server(Toy(), server)  # type: ignore[abstract]


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_trust(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
def config(trust: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    state = tmp_path_factory.mktemp("vmm")
    return ServerConfig((f"unix:{state}/s", "127.0.0.1:0"), trust, "vmm", state)


@pytest.fixture(scope="module")
def server(config: ServerConfig) -> Iterator[BoundServer]:
    server = serve(config, register)
    yield server
    server.stop(0)


@pytest.fixture(params=[0, 1], ids=["unix", "tcp"])
def address(server: BoundServer, request: pytest.FixtureRequest) -> str:
    return server.addresses[int(request.param)]


def test_both_listeners_answer(address: str, trust: Path) -> None:
    assert not address.endswith(":0")
    with dial(address, trust, "operator", "vmm") as channel:
        answer = vmm_pb2_grpc.VmmServiceStub(channel).GetMachine(vmm_pb2.GetMachineRequest(vm="a"))
    assert answer.machine.vm == "a"


def test_errors_come_back_as_themselves(address: str, trust: Path) -> None:
    with dial(address, trust, "operator", "vmm") as channel:
        stub = vmm_pb2_grpc.VmmServiceStub(channel)
        with pytest.raises(WrongState) as refused, translated("vmm"):
            stub.StartMachine(vmm_pb2.StartMachineRequest(vm="a"))
        assert (refused.value.subject, refused.value.state) == ("machine 'a'", "RUNNING")
        stream = stub.WatchEvents(vmm_pb2.WatchEventsRequest(vm="a"))
        assert next(stream).event.sequence == 1
        with pytest.raises(WrongState, match="machine 'a': went away"), translated("vmm"):
            next(stream)
        with pytest.raises(InternalError, match=r"vmm: .*StopMachine: KeyError: 'surprise'"), translated("vmm"):
            stub.StopMachine(vmm_pb2.StopMachineRequest(vm="a"))


@pytest.mark.parametrize("role", [Role.GUEST, Role.MONITOR, Role.VMM, Role.OBSERVER])
def test_roles_without_the_right_are_refused(server: BoundServer, trust: Path, role: Role) -> None:
    if role is Role.GUEST:
        with pytest.raises(PermissionDenied, match=r"role guest: may not call grpc\.health"):
            dial(server.addresses[0], trust, role, "vmm")
        return
    with dial(server.addresses[0], trust, role, "vmm") as channel, pytest.raises(PermissionDenied), translated("vmm"):
        vmm_pb2_grpc.VmmServiceStub(channel).StartMachine(vmm_pb2.StartMachineRequest(vm="a"))


@pytest.mark.parametrize(("role", "error"), [(Role.GUEST, PermissionDenied), (Role.OPERATOR, BadArgument)])
def test_what_is_no_message(server: BoundServer, trust: Path, role: Role, error: type[VtlabError]) -> None:
    """Who may not call learns that and nothing else; who may, that the request is none."""
    address = server.addresses[0]
    folder, authority = trust / role, "vmm.vtlab.internal"
    files = [(folder / name).read_bytes() for name in ("ca.pem", f"{role}.key", f"{role}.pem")]
    options = [("grpc.ssl_target_name_override", authority)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options) as channel:
        call: Any = channel.unary_unary("/vtlab.v1.VmmService/StartMachine", request_serializer=bytes)
        stream: Any = channel.stream_unary("/vtlab.v1.VmmService/UploadImage", request_serializer=bytes)
        with pytest.raises(error), translated("vmm"):
            call(b"\xff\xff", timeout=30)
        if role is Role.GUEST:
            with pytest.raises(error), translated("vmm"):
                stream(iter([b"\xff\xff"]), timeout=30)


def test_another_laboratory_is_refused(server: BoundServer, tmp_path: Path) -> None:
    stranger = ensure_trust(tmp_path)
    with pytest.raises(PeerUnavailable, match=r"vmm at unix:.*no answer in 0\.3 s"):
        dial(server.addresses[0], stranger, "operator", "vmm", timeout=0.3)


def test_no_certificate_no_entry(server: BoundServer, trust: Path) -> None:
    authority = (trust / "operator" / "ca.pem").read_bytes()
    options = [("grpc.ssl_target_name_override", "vmm.vtlab.internal")]
    anonymous = grpc.secure_channel(server.addresses[1], grpc.ssl_channel_credentials(authority), options)
    for channel in (anonymous, grpc.insecure_channel(server.addresses[1])):
        with channel, pytest.raises(PeerUnavailable), translated("vmm"):
            vmm_pb2_grpc.VmmServiceStub(channel).GetMachine(vmm_pb2.GetMachineRequest(), timeout=30)


def test_a_server_of_another_role_is_not_spoken_to(server: BoundServer, trust: Path) -> None:
    with pytest.raises(PeerUnavailable, match="its certificate is for another role"):
        dial(server.addresses[0], trust, "operator", "monitor", timeout=0.3)


@pytest.mark.parametrize(
    ("address", "cause"), [("unix:/nonexistent/socket", "no such socket"), ("127.0.0.1:1", "connection refused")]
)
def test_nobody_there(trust: Path, address: str, cause: str) -> None:
    with pytest.raises(PeerUnavailable) as absent:
        dial(address, trust, "operator", "vmm", timeout=0.3)
    assert str(absent.value) == f"vmm at {address}: no answer in 0.3 s: {cause}"


def test_dialling_waits_for_a_server_that_comes_later(trust: Path, config: ServerConfig, tmp_path: Path) -> None:
    late = dataclasses.replace(config, listen=(f"unix:{tmp_path}/s",))
    started: list[BoundServer] = []
    timer = threading.Timer(0.3, lambda: started.append(serve(late, register)))
    timer.start()
    with dial(late.listen[0], trust, "operator", "vmm", timeout=10):
        timer.join()
    started[0].stop(0)


@pytest.mark.parametrize(
    ("listen", "cause"),
    [
        ("0.0.0.0:0", "not on loopback"),
        ("example.org:1", "not on loopback"),
        ("unix:relative", "absolute path"),
        ("unix:/" + "x" * 108, "at most 107 bytes"),
        ("127.0.0.1:70000", "expected"),
        ("nonsense", "expected"),
    ],
)
def test_bad_addresses(config: ServerConfig, listen: str, cause: str) -> None:
    with pytest.raises(BadArgument, match=cause):
        serve(dataclasses.replace(config, listen=(listen,)), register)


def test_beyond_loopback_when_allowed(config: ServerConfig) -> None:
    server = serve(dataclasses.replace(config, listen=("0.0.0.0:0",), allow_any_address=True), register)
    assert server.addresses[0].startswith("0.0.0.0:")
    server.stop(0)


def test_a_taken_port(config: ServerConfig, server: BoundServer) -> None:
    with pytest.raises(BadArgument, match="cannot be bound"):
        serve(dataclasses.replace(config, listen=(server.addresses[1],)), register)


def test_messages_are_bounded_both_ways(address: str, trust: Path) -> None:
    with dial(address, trust, "operator", "vmm") as channel:
        stub = vmm_pb2_grpc.VmmServiceStub(channel)
        with pytest.raises(LimitExceeded), translated("vmm"):
            stub.GetMachine(vmm_pb2.GetMachineRequest(vm="x" * (5 << 20)))


def test_more_calls_than_workers_are_refused_at_once(config: ServerConfig, trust: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(config, listen=(f"unix:{tmp_path}/s",), workers=2)
    server = serve(small, register)
    with dial(server.addresses[0], trust, "operator", "vmm") as channel:
        stub = vmm_pb2_grpc.VmmServiceStub(channel)
        streams = [stub.WatchEvents(vmm_pb2.WatchEventsRequest(vm="forever")) for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(LimitExceeded), translated("vmm"):
            stub.GetMachine(vmm_pb2.GetMachineRequest(vm="a"))
        for stream in streams:
            stream.cancel()
    server.stop(1)


def test_streams_of_clients_leave_room_for_commands(
    config: ServerConfig, trust: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtlab.trust.interceptor.Gate.__init__.__defaults__", (2,))
    server = serve(dataclasses.replace(config, listen=(f"unix:{tmp_path}/s",)), register)
    with dial(server.addresses[0], trust, "observer", "vmm") as channel:
        stub = vmm_pb2_grpc.VmmServiceStub(channel)
        forever = vmm_pb2.WatchEventsRequest(vm="forever")
        streams = [stub.WatchEvents(forever) for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(LimitExceeded, match="clients hold 2 streams open already") as refused, translated("vmm"):
            next(stub.WatchEvents(forever))
        assert refused.value.limit == 2
        assert stub.GetMachine(vmm_pb2.GetMachineRequest(vm="a")).machine.vm == "a"
        streams[0].cancel()
        wait_until(lambda: _is_let_in(stub.WatchEvents(forever)))
    server.stop(0)


def _is_let_in(stream: Any) -> bool:
    try:
        return bool(next(stream).event.sequence)
    except grpc.RpcError:
        return False


def test_reflection_lists_the_services(server: BoundServer, trust: Path) -> None:
    with dial(server.addresses[0], trust, "observer", "vmm") as channel:
        ask = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(cast(Any, reflection_pb2_grpc).ServerReflectionStub(channel).ServerReflectionInfo(ask))
    names = {service.name for service in answer.list_services_response.service}
    assert names == {"vtlab.v1.VmmService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_the_bound_addresses_are_reported(config: ServerConfig, tmp_path: Path) -> None:
    class Pipe:
        sent: tuple[str, ...] = ()

        def send(self, obj: tuple[str, ...], /) -> None:
            self.sent = obj

    pipe = Pipe()
    server = serve(dataclasses.replace(config, listen=(f"unix:{tmp_path}/s",), ready=pipe), register)
    assert pipe.sent == server.addresses == (f"unix:{tmp_path}/s",)
    server.stop(0)


def test_stopping_ends_open_streams(config: ServerConfig, trust: Path, tmp_path: Path) -> None:
    server = serve(dataclasses.replace(config, listen=(f"unix:{tmp_path}/s",)), register)
    with dial(server.addresses[0], trust, "operator", "vmm") as channel:
        stream = vmm_pb2_grpc.VmmServiceStub(channel).WatchEvents(vmm_pb2.WatchEventsRequest(vm="forever"))
        next(stream)
        server.stop(0.1)
        with pytest.raises((PeerUnavailable, WrongState)), translated("vmm"):
            next(stream)


def test_health_of_oneself(
    config: ServerConfig, trust: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"unix:{tmp_path}/s"
    ask = [address, "guest", str(trust / "guest"), "--timeout", "0.3"]
    assert health_main(ask) == 1
    assert capsys.readouterr().err == f"guest at {address}: no answer in 0.3 s: no such socket\n"
    server = serve(dataclasses.replace(config, role="guest", listen=(address,)), register)
    assert health_main(ask) == 0
    server.stop(0)
