"""The table of RPC and role, cell by cell and both ways, over mutual TLS against the three real servers."""

from __future__ import annotations

import grpc
import pytest

from tests.integration.trust.calls import SERVERS, addresses, connect, connect_as, contract, outcome, served, trust
from vtlab.channels import dial
from vtlab.client import Lab
from vtlab.errors import BadArgument, PeerUnavailable, PermissionDenied, TimedOut, Unsupported
from vtlab.trust.certificates import Credentials, server_name
from vtlab.trust.issuing import Issuer
from vtlab.trust.roles import RPC_ROLES, Role, may_call

NOT_A_MESSAGE = b"\xff\xff"
# Streams that say nothing as long as nothing happens: that the gate let them pass is seen from NOT_A_MESSAGE.
SILENT = {"vtlab.v1.VcpuService/Events", "vtlab.v1.VcpuService/Run"}
SILENCE = 0.3  # seconds


def test_every_rpc_of_the_contract_has_a_row(lab: Lab) -> None:
    """What a server serves and what the .proto files say: a row each, and none besides."""
    found = set(contract()).union(*(served(lab, server) for server in SERVERS))
    assert found == set(RPC_ROLES)


def test_every_rpc_of_the_contract_is_served_by_somebody(lab: Lab) -> None:
    assert set(contract()) <= set().union(*(served(lab, server) for server in SERVERS))


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("server", SERVERS)
def test_each_cell(lab: Lab, server: Role, role: Role) -> None:
    """Allowed: the request is parsed and the handler answers. Denied: by name, whatever was sent."""
    wrong = []
    with connect_as(lab, server, role) as channel:
        for rpc, method in served(lab, server).items():
            junk = outcome(channel, rpc, method, NOT_A_MESSAGE)
            empty = outcome(channel, rpc, method, b"", SILENCE if rpc in SILENT else 30)
            if may_call(rpc, role, server):
                parsed = isinstance(junk, BadArgument) and f"request of {rpc}" in str(junk)
                if not parsed or isinstance(empty, PermissionDenied | PeerUnavailable):
                    wrong.append((rpc, "allowed", junk, empty))
                if isinstance(empty, TimedOut) and rpc not in SILENT:
                    wrong.append((rpc, "silent", junk, empty))
            else:
                wrong += [
                    (rpc, "denied", junk, empty) for error in (junk, empty) if not _denied(error, rpc, role, server)
                ]
    assert wrong == []


def _denied(error: Exception | None, rpc: str, role: Role, server: Role) -> bool:
    return isinstance(error, PermissionDenied) and str(error) == _denial(rpc, role, server)


def _denial(rpc: str, role: str, server: Role) -> str:
    return f"role {role}: may not call {rpc} of the {server}"


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    "uris",
    [
        ("vtlab://role/root",),
        ("vtlab://role/operator", "vtlab://role/vmm"),
        ("https://example.org/operator",),
        ("vtlab://quote/monitor",),
    ],
    ids=["unknown", "two", "none", "quote"],
)
def test_who_names_no_single_role_may_call_nothing(lab: Lab, server: Role, uris: tuple[str, ...]) -> None:
    files = [trust(lab) / "ca" / name for name in ("ca.pem", "ca.key")]
    authority, key = (path.read_bytes() for path in files)
    certificate, own_key = Issuer(authority, key).role_pair(Role.OPERATOR, uris)
    with connect(lab, server, Credentials(authority, certificate, own_key)) as channel:
        for rpc, method in served(lab, server).items():
            error = outcome(channel, rpc, method, b"")
            assert isinstance(error, PermissionDenied), (rpc, error)
            assert str(error) == _denial(rpc, "unknown", server)


@pytest.mark.parametrize("server", SERVERS)
def test_what_a_server_does_not_serve(lab: Lab, server: Role) -> None:
    """The role that may call it elsewhere gets nothing here."""
    here = served(lab, server)
    for rpc, method in contract().items():
        if rpc not in here:
            role = next(iter(RPC_ROLES[rpc]))
            with connect_as(lab, server, role) as channel:
                assert isinstance(outcome(channel, rpc, method, b""), Unsupported), rpc


@pytest.mark.parametrize("server", SERVERS)
def test_nobody_without_a_certificate(lab: Lab, server: Role) -> None:
    authority = (trust(lab) / "ca" / "ca.pem").read_bytes()
    options = [("grpc.ssl_target_name_override", server_name(server))]
    rpc, method = next(iter(served(lab, server).items()))
    for channel in (
        grpc.secure_channel(addresses(lab)[server], grpc.ssl_channel_credentials(authority), options),
        grpc.insecure_channel(addresses(lab)[server]),
    ):
        with channel:
            assert isinstance(outcome(channel, rpc, method, b""), PeerUnavailable)


def test_a_server_is_not_spoken_to_with_another_roles_certificate(lab: Lab) -> None:
    """The guest's certificate cannot pose as the monitor or the VMM."""
    for server in SERVERS:
        for posed in SERVERS:
            if posed is not server:
                with pytest.raises(PeerUnavailable, match="no answer"):
                    dial(addresses(lab)[server], trust(lab), Role.VMM, posed, timeout=0.3)
