"""Certificates that are expired, revoked, or replaced while servers run."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.waiting import wait_until
from vmm.chaos.observer import Observer
from vmm.launcher import launch
from vmm.supervisor import Budget
from vtl0_guest.kernels import selfguard_image
from vtlab.channels import BoundServer, ServerConfig, dial, serve
from vtlab.client import connect
from vtlab.errors import Cancelled, PeerUnavailable, PermissionDenied
from vtlab.status import translated
from vtlab.trust.__main__ import main as trust_main
from vtlab.trust.certificates import ensure_trust, load_credentials, write
from vtlab.trust.issuing import Issuer
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2, vmm_pb2_grpc


class Toy(vmm_pb2_grpc.VmmServiceServicer):
    def GetMachine(
        self, request: vmm_pb2.GetMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.GetMachineResponse:
        return vmm_pb2.GetMachineResponse(machine=vmm_pb2.Machine(vm=request.vm))

    def WatchEvents(
        self, request: vmm_pb2.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[vmm_pb2.WatchEventsResponse]:
        yield vmm_pb2.WatchEventsResponse()
        closed = threading.Event()
        context.add_callback(closed.set)
        closed.wait()


@pytest.fixture
def trust(tmp_path: Path) -> Path:
    return ensure_trust(tmp_path / "trust")


@pytest.fixture
def server(trust: Path, tmp_path: Path) -> Iterator[BoundServer]:
    config = ServerConfig((f"unix:{tmp_path}/s",), trust / "vmm", "vmm", tmp_path)
    running = serve(config, lambda target: vmm_pb2_grpc.add_VmmServiceServicer_to_server(Toy(), target))  # type: ignore[abstract]
    yield running
    running.stop(0)


def ask(channel: grpc.Channel) -> str:
    with translated("vmm"):
        answer = vmm_pb2_grpc.VmmServiceStub(channel).GetMachine(vmm_pb2.GetMachineRequest(vm="a"), timeout=30)
    return answer.machine.vm


def issue(trust: Path, role: Role, begin: datetime.datetime) -> None:
    """Puts a certificate of one day there."""
    authority, key = ((trust / "ca" / name).read_bytes() for name in ("ca.pem", "ca.key"))
    pair = Issuer(authority, key).role_pair(role, begin=begin, life=datetime.timedelta(days=1))
    for kind, data in zip(("pem", "key"), pair, strict=True):
        write(trust / role / f"{role}.{kind}", data)
    write(trust / role / "ca.pem", authority)


@pytest.mark.parametrize("days", [-2, 1], ids=["expired", "not yet valid"])
def test_a_caller_outside_its_time_is_refused(server: BoundServer, trust: Path, days: int) -> None:
    issue(trust, Role.OPERATOR, datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days))
    with pytest.raises(PeerUnavailable, match="no answer"):
        dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM, timeout=0.5)


def test_a_server_outside_its_time_is_not_spoken_to(server: BoundServer, trust: Path) -> None:
    dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM).close()
    issue(trust, Role.VMM, datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2))
    with pytest.raises(PeerUnavailable, match="its certificate is not of this laboratory"):
        dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM, timeout=0.5)


def test_what_expired_is_made_again_at_start(trust: Path) -> None:
    issue(trust, Role.OPERATOR, datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2))
    old = load_credentials(trust, Role.OPERATOR)
    ensure_trust(trust)
    assert load_credentials(trust, Role.OPERATOR) != old


def test_a_revoked_certificate_is_refused_at_once_and_on_open_channels(server: BoundServer, trust: Path) -> None:
    with dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM) as channel:
        assert ask(channel) == "a"
        stream = vmm_pb2_grpc.VmmServiceStub(channel).WatchEvents(vmm_pb2.WatchEventsRequest())
        next(stream)
        assert trust_main([str(trust), "--revoke", str(trust / "operator" / "operator.pem")]) == 0
        with pytest.raises(PermissionDenied, match=r"certificate [0-9a-f]+: was revoked"):
            ask(channel)
        with pytest.raises((Cancelled, PermissionDenied)), translated("vmm"):
            next(stream)
    with pytest.raises(PermissionDenied, match="was revoked"):
        dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM)
    dial(server.addresses[0], trust, Role.OBSERVER, Role.VMM).close()


def test_a_stream_alone_notices_too(server: BoundServer, trust: Path) -> None:
    with dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM) as channel:
        stream = vmm_pb2_grpc.VmmServiceStub(channel).WatchEvents(vmm_pb2.WatchEventsRequest())
        next(stream)
        assert trust_main([str(trust), "--revoke", str(trust / "operator" / "operator.pem")]) == 0
        with pytest.raises((Cancelled, PermissionDenied)), translated("vmm"):
            next(stream)


def test_a_server_whose_certificate_was_revoked_is_not_spoken_to(server: BoundServer, trust: Path) -> None:
    """Who has its key shows it in vain, until the server has another."""
    dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM).close()
    assert trust_main([str(trust), "--revoke", str(trust / "vmm" / "vmm.pem")]) == 0
    with pytest.raises(PeerUnavailable, match="no answer"):
        dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM, timeout=0.5)
    trust_main([str(trust), "--renew"])  # the server shows the new one at its next handshake
    with dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM) as channel:
        assert ask(channel) == "a"


def test_a_stolen_key_opens_nothing_after_renewal(trust: Path, tmp_path: Path) -> None:
    """Somebody serves with the key and certificate of before, which the authority signed."""
    stolen = tmp_path / "stolen" / "vmm"
    shutil.copytree(trust / "vmm", stolen)
    config = ServerConfig((f"unix:{tmp_path}/impostor",), stolen, "vmm", tmp_path)
    impostor = serve(config, lambda target: vmm_pb2_grpc.add_VmmServiceServicer_to_server(Toy(), target))  # type: ignore[abstract]
    try:
        dial(impostor.addresses[0], trust, Role.OPERATOR, Role.VMM).close()
        trust_main([str(trust), "--revoke", str(trust / "vmm" / "vmm.pem")])
        trust_main([str(trust), "--renew"])
        with pytest.raises(PeerUnavailable, match="no answer"):
            dial(impostor.addresses[0], trust, Role.OPERATOR, Role.VMM, timeout=0.5)
    finally:
        impostor.stop(0)


def test_the_other_servers_are_spoken_to_as_before(server: BoundServer, trust: Path) -> None:
    trust_main([str(trust), "--revoke", str(trust / "monitor" / "monitor.pem")])
    dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM).close()
    (trust / "operator" / "servers.pem").write_bytes(b"")
    with pytest.raises(PeerUnavailable, match="which are good is not known: it is empty"):
        dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM)
    (trust / "operator" / "servers.pem").unlink()
    with pytest.raises(PeerUnavailable, match="which are good is not known"):
        dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM)


def test_after_renewal_the_revoked_role_is_back(server: BoundServer, trust: Path) -> None:
    trust_main([str(trust), "--revoke", str(trust / "operator" / "operator.pem")])
    trust_main([str(trust), "--renew"])
    with dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM) as channel:
        assert ask(channel) == "a"


@pytest.mark.parametrize("damage", ["junk", "another laboratory's", "gone"])
def test_a_list_that_cannot_be_trusted_closes_the_server(
    server: BoundServer, trust: Path, tmp_path: Path, damage: str
) -> None:
    trust_main([str(trust), "--revoke", "1234"])
    part = trust / "vmm" / "crl.pem"
    with dial(server.addresses[0], trust, Role.OPERATOR, Role.VMM) as channel:
        assert ask(channel) == "a"
        if damage == "junk":
            part.write_bytes(part.read_bytes()[:-40])
        elif damage == "gone":
            part.unlink()
        else:
            other = ensure_trust(tmp_path / "other")
            trust_main([str(other), "--revoke", "5678"])
            part.write_bytes((other / "vmm" / "crl.pem").read_bytes())
        with pytest.raises(PermissionDenied, match=r"crl\.pem: .*nobody is let in"):
            ask(channel)


@pytest.mark.parametrize("what", ["", "0", "no number", "f" * 41])
def test_what_cannot_be_revoked(trust: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trust_main([str(trust), "--revoke", what]) == 1
    assert "neither a certificate" in capsys.readouterr().err


def shown(address: str, trust: Path) -> bytes:
    """The certificate that a server shows now, as its caller sees it."""
    import socket
    import ssl

    context = ssl.create_default_context(cafile=str(trust / "operator" / "ca.pem"))
    context.load_cert_chain(trust / "operator" / "operator.pem", trust / "operator" / "operator.key")
    context.set_alpn_protocols(["h2"])
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(30)
        plain.connect(address.removeprefix("unix:"))
        with context.wrap_socket(plain, server_hostname="vmm.vtlab.internal") as secured:
            found = secured.getpeercert(binary_form=True)
    assert found is not None
    return ssl.DER_cert_to_PEM_cert(found).encode()


def test_new_keys_while_channels_stay_open(server: BoundServer, trust: Path) -> None:
    address = server.addresses[0]
    with dial(address, trust, Role.OPERATOR, Role.VMM) as old:
        before = shown(address, trust)
        assert before == (trust / "vmm" / "vmm.pem").read_bytes()
        trust_main([str(trust), "--renew"])
        assert ask(old) == "a"
        with dial(address, trust, Role.OPERATOR, Role.VMM) as new:
            assert ask(new) == "a"
        assert shown(address, trust) == (trust / "vmm" / "vmm.pem").read_bytes() != before
        assert ask(old) == "a"


def test_a_new_authority_without_a_stop(server: BoundServer, trust: Path, tmp_path: Path) -> None:
    """An open channel outlives each step, new ones are accepted; in the end certificates of before are not."""
    address = server.addresses[0]
    first = tmp_path / "first"
    with dial(address, trust, Role.OPERATOR, Role.VMM) as old:
        for number, step in enumerate(("--add-authority", "--renew", "--retire-authorities")):
            if not number:
                first.mkdir()
                for name in ("ca.pem", "operator.pem", "operator.key"):
                    (first / name).write_bytes((trust / "operator" / name).read_bytes())
            assert trust_main([str(trust), step]) == 0
            assert ask(old) == "a"
            with dial(address, trust, Role.OPERATOR, Role.VMM) as new:
                assert ask(new) == "a"
    with pytest.raises(PeerUnavailable, match="no answer"):
        dial(address, first, Role.OPERATOR, Role.VMM, timeout=0.5)


def test_an_authority_in_use_is_not_retired(trust: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trust_main([str(trust), "--add-authority"])
    assert trust_main([str(trust), "--retire-authorities"]) == 1
    assert "renew first" in capsys.readouterr().err
    ensure_trust(trust)
    assert (trust / "vmm" / "ca.pem").read_bytes().count(b"BEGIN CERTIFICATE") == 2


def test_what_cannot_be_read_leaves_what_was(server: BoundServer, trust: Path) -> None:
    address = server.addresses[0]
    (trust / "vmm" / "vmm.key").unlink()
    authority = (trust / "vmm" / "ca.pem").read_bytes()
    write(trust / "vmm" / "ca.pem", authority)
    with dial(address, trust, Role.OPERATOR, Role.VMM) as channel:
        assert ask(channel) == "a"


def test_the_list_is_handed_out(trust: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "monitor").mkdir(parents=True)
    assert trust_main([str(trust), "--revoke", "12ab", "--hand-out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out" / "monitor").iterdir()}
    assert names == {"ca.pem", "monitor.pem", "monitor.key", "quote.pem", "quote.key", "servers.pem", "crl.pem"}


@pytest.mark.timeout(180)
def test_three_real_servers_take_new_keys_and_a_machine_runs_on() -> None:
    """The VMM's channels to both levels outlive every step; the next machine gets new ones."""
    with launch() as lab:
        addresses = lab.addresses
        with lab.create(selfguard_image(), command_line="heki=1") as machine:
            machine.start()
            wait_until(lambda: lab.policy.get(machine).locked, 60, "the policy is locked")
            for step in ("--add-authority", "--renew", "--retire-authorities"):
                assert trust_main([str(addresses.trust.parent), step]) == 0
                with connect(addresses.vmm, addresses.monitor, addresses.trust) as again:
                    assert again.policy.get(machine).locked
                assert machine.registers().registers.rip
                assert machine.state == vmm_pb2.MACHINE_STATE_RUNNING
        with lab.create(selfguard_image(), command_line="heki=1") as machine:
            machine.start()
            wait_until(lambda: lab.policy.get(machine).locked, 60, "the next policy is locked")


@pytest.mark.timeout(300)
def test_after_a_revocation_a_machine_outlives_renewal_and_the_death_of_its_levels() -> None:
    """The VMM's list of good servers is that of now at each connection: with that of before it would know nobody."""
    with launch(budget=Budget(deaths=10)) as lab:
        trust = str(lab.directory / "trust")
        assert trust_main([trust, "--revoke", "12ab"]) == 0
        observer = Observer(lab, 1)
        try:
            observer.wait_progress(2)
            assert trust_main([trust, "--renew"]) == 0
            restarts = lab.supervisor.restarts(Role.MONITOR)
            os.kill(lab.pids["monitor"], signal.SIGKILL)
            assert lab.supervisor.wait_restarted(Role.MONITOR, restarts + 1, 120)
            observer.wait_progress(2)
            observer.check()
            assert observer.findings.problems == []
            assert observer.findings.resets == []
        finally:
            observer.close()
