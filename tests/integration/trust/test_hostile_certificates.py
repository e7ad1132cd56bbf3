"""Certificates that an authority would not issue, and callers that never finish: nobody gets in, nobody else waits."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.integration.trust.calls import addresses, connect, connect_as, outcome, served, trust
from vtlab.client import Lab
from vtlab.errors import PeerUnavailable, PermissionDenied
from vtlab.trust.certificates import Credentials, load_credentials
from vtlab.trust.issuing import ROLE_LIFE, Issuer
from vtlab.trust.roles import Role

Pair = tuple[bytes, bytes]
RPC = "vtlab.v1.VcpuService/Detach"


def issuer(lab: Lab) -> Issuer:
    return Issuer(*((trust(lab) / "ca" / name).read_bytes() for name in ("ca.pem", "ca.key")))


def naming(*uris: str) -> Callable[[Lab], Pair]:
    return lambda lab: issuer(lab).role_pair(Role.VMM, uris)


def made_by_a_role(lab: Lab) -> Pair:
    """The operator signs one for the VMM's role with its own key."""
    own = load_credentials(trust(lab), Role.OPERATOR)
    return Issuer(own.certificate, own.key).role_pair(Role.VMM)


def made_by_a_namesake(lab: Lab) -> Pair:
    """An authority of the same name with another key."""
    real = x509.load_pem_x509_certificate((trust(lab) / "ca" / "ca.pem").read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    fake = (
        x509.CertificateBuilder(real.subject, real.subject, key.public_key(), real.serial_number)
        .not_valid_before(real.not_valid_before_utc)
        .not_valid_after(real.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Issuer(fake.public_bytes(serialization.Encoding.PEM), pem).role_pair(Role.VMM)


def for_servers_alone(lab: Lab) -> Pair:
    """Its purpose is no client's."""
    made = issuer(lab)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier("vtlab://role/vmm")]
    builder = made._builder("vmm", key, names, None, ROLE_LIFE)
    return made._signed(builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), True), key)


def attempt(lab: Lab, pair: Pair) -> Exception | None:
    authority = (trust(lab) / "ca" / "ca.pem").read_bytes()
    method = served(lab, Role.MONITOR)[RPC]
    with connect(lab, Role.MONITOR, Credentials(authority, *pair)) as channel:
        return outcome(channel, RPC, method, b"")


def serves_others(lab: Lab) -> None:
    method = served(lab, Role.MONITOR)[RPC]
    with connect_as(lab, Role.MONITOR, Role.VMM) as channel:
        assert not isinstance(outcome(channel, RPC, method, b"\xff\xff"), PermissionDenied | PeerUnavailable)


@pytest.mark.parametrize(
    ("make", "refusal"),
    [
        (naming("vtlab://role/vmm\0"), PermissionDenied),
        (naming("vtlab://role/vmm/"), PermissionDenied),
        (naming("VTLAB://ROLE/VMM"), PermissionDenied),
        (naming("vtlab://role/"), PermissionDenied),
        (naming(*(f"vtlab://role/{number}" for number in range(200))), PermissionDenied),
        (naming("vtlab://role/vmm", *(f"vtlab://role/{role}" for role in Role)), PermissionDenied),
        (naming("vtlab://role/" + "vmm" * 2000), PermissionDenied),
        (naming(*(f"https://example.org/{number:0100}" for number in range(5000))), PeerUnavailable | PermissionDenied),
        (made_by_a_role, PeerUnavailable),
        (made_by_a_namesake, PeerUnavailable),
        (for_servers_alone, PeerUnavailable),
    ],
    ids=["NUL", "slash", "capitals", "empty", "200 roles", "all roles", "long", "half a MiB", "by a role", "namesake",
         "for servers"],
)  # fmt: skip
def test_a_certificate_that_opens_nothing(lab: Lab, make: Callable[[Lab], Pair], refusal: type[Exception]) -> None:
    error = attempt(lab, make(lab))
    assert isinstance(error, refusal), error
    serves_others(lab)


def test_what_the_guest_s_certificate_opens(lab: Lab) -> None:
    """Nothing of anybody, and what it never finishes holds nobody up. Inside its process it cannot even connect."""
    path = addresses(lab)[Role.MONITOR].removeprefix("unix:")
    opened = [socket.socket(socket.AF_UNIX) for _ in range(200)]
    try:
        for number, one in enumerate(opened):
            one.connect(path)
            one.send((b"\x16", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n", b"\xff" * 9)[number % 4])
        with connect_as(lab, Role.MONITOR, Role.GUEST) as channel:
            for rpc, method in served(lab, Role.MONITOR).items():
                assert isinstance(outcome(channel, rpc, method, bytes(3 << 20)), PermissionDenied), rpc
        serves_others(lab)
    finally:
        for one in opened:
            one.close()


def test_a_stream_that_says_nothing(lab: Lab) -> None:
    """As many as one caller likes: each is refused before it says anything, so none takes a worker."""
    with connect_as(lab, Role.MONITOR, Role.GUEST) as channel:
        for _ in range(200):
            call: Any = channel.stream_stream("/vtlab.v1.VcpuService/Run")(iter(()), timeout=30)
            with pytest.raises(grpc.RpcError) as refused:
                next(call)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    serves_others(lab)
