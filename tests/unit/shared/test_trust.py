"""Trust: the table of roles covers every RPC, certificates are made once, and names are read from them strictly."""

from __future__ import annotations

import base64
import datetime
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from vtlab.errors import PeerUnavailable, PermissionDenied
from vtlab.trust.__main__ import main as trust_main
from vtlab.trust.certificates import ensure_trust, load_credentials
from vtlab.trust.interceptor import role_of_peer
from vtlab.trust.revocation import Revocations
from vtlab.trust.roles import OPEN_TO_ITSELF, RPC_ROLES, Role, may_call
from vtlab.trust.rotation import revoke
from vtlab.v1 import monitor_pb2, vcpu_pb2, vmm_pb2

SERVED = (monitor_pb2, vcpu_pb2, vmm_pb2, health_pb2, reflection_pb2)
RPCS = {
    f"{service.full_name}/{method.name}"
    for module in SERVED
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def test_every_rpc_has_a_row_and_every_row_an_rpc() -> None:
    assert set(RPC_ROLES) == RPCS
    assert OPEN_TO_ITSELF <= RPCS


@pytest.mark.parametrize("server", [Role.VMM, Role.MONITOR])
def test_the_guest_may_call_nothing(server: Role) -> None:
    assert not [rpc for rpc in RPCS if may_call(rpc, Role.GUEST, server)]


def test_only_the_vmm_enters_processors() -> None:
    vcpu = {rpc for rpc in RPCS if rpc.startswith("vtlab.v1.VcpuService/")}
    assert {role for rpc in vcpu for role in Role if may_call(rpc, role, Role.GUEST)} == {Role.VMM}


def test_the_observer_changes_nothing() -> None:
    looks = ("Get", "List", "Read", "Watch", "Check", "Translate", "ServerReflectionInfo")
    allowed = [rpc for rpc in RPCS if may_call(rpc, Role.OBSERVER, Role.VMM)]
    assert allowed
    assert [rpc for rpc in allowed if not rpc.partition("/")[2].startswith(looks)] == []


@pytest.mark.parametrize("rpc", ["vtlab.v1.VmmService/Invented", "", "x"])
@pytest.mark.parametrize("caller", [*Role, None])
def test_what_is_not_in_the_table_is_denied(rpc: str, caller: Role | None) -> None:
    assert not may_call(rpc, caller, Role.VMM)


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ([b"vtlab://role/operator"], Role.OPERATOR),
        ([b"vtlab://role/operator", b"https://example.org/"], Role.OPERATOR),
        ([b"vtlab://role/operator", b"vtlab://role/guest"], None),
        ([b"vtlab://role/root"], None),
        ([b"vtlab://role/"], None),
        ([b"operator"], None),
        ([b"\xff\xfe"], None),
        ([], None),
    ],
)
def test_role_of_peer(names: list[bytes], role: Role | None) -> None:
    assert role_of_peer({"peer_uri": names}) is role


def test_only_uris_count() -> None:
    assert role_of_peer({"x509_subject_alternative_name": [b"vtlab://role/operator"]}) is None


def test_certificates_are_made_once_and_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "trust"
    ensure_trust(folder)
    first = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert {path.name for path in first} >= {f"{role}.{kind}" for role in Role for kind in ("pem", "key")}
    ensure_trust(folder)
    assert {path: path.read_bytes() for path in first} == first
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_what_is_missing_is_made_again(tmp_path: Path) -> None:
    ensure_trust(tmp_path)
    authority = (tmp_path / "ca" / "ca.pem").read_bytes()
    (tmp_path / "guest" / "guest.pem").unlink()
    vmm = load_credentials(tmp_path, "vmm")
    ensure_trust(tmp_path)
    assert load_credentials(tmp_path, "guest").authority == authority
    assert load_credentials(tmp_path, "vmm") == vmm


def test_a_lost_authority_means_new_certificates_for_all(tmp_path: Path) -> None:
    ensure_trust(tmp_path)
    before = load_credentials(tmp_path, "vmm")
    (tmp_path / "ca" / "ca.key").unlink()
    ensure_trust(tmp_path)
    after = [load_credentials(tmp_path, role) for role in Role]
    assert {one.authority for one in after} == {(tmp_path / "ca" / "ca.pem").read_bytes()}
    assert before.certificate not in {one.certificate for one in after}


def test_two_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ensure_trust, [tmp_path] * 4))
    authority = x509.load_pem_x509_certificate((tmp_path / "ca" / "ca.pem").read_bytes())
    for role in Role:
        credentials = load_credentials(tmp_path, role)
        certificate = x509.load_pem_x509_certificate(credentials.certificate)
        certificate.verify_directly_issued_by(authority)
        assert credentials.authority == (tmp_path / "ca" / "ca.pem").read_bytes()
        assert certificate.not_valid_after_utc > datetime.datetime.now(datetime.UTC)


def test_one_part_of_the_folder_is_enough(tmp_path: Path) -> None:
    ensure_trust(tmp_path)
    assert load_credentials(tmp_path / "guest", "guest") == load_credentials(tmp_path, "guest")
    with pytest.raises(PeerUnavailable, match="no credentials for role vmm"):
        load_credentials(tmp_path / "guest", "vmm")


def test_parts_are_handed_out_to_the_folders_that_wait_for_them(tmp_path: Path) -> None:
    for role in ("guest", "vmm"):
        (tmp_path / "out" / role).mkdir(parents=True)
    for _ in range(2):
        assert trust_main([str(tmp_path / "all"), "--hand-out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"guest", "vmm"}
    assert {path.name for path in (tmp_path / "out" / "guest").iterdir()} == {"ca.pem", "guest.pem", "guest.key"}
    assert stat.S_IMODE((tmp_path / "out" / "guest" / "guest.key").stat().st_mode) == 0o640
    assert load_credentials(tmp_path / "out" / "guest", "guest") == load_credentials(tmp_path / "all", "guest")


def test_an_authority_whose_key_is_damaged_lets_nobody_in(tmp_path: Path) -> None:
    trust = ensure_trust(tmp_path / "trust")
    revoke(trust, str(trust / "observer" / "observer.pem"))
    operator = (trust / "operator" / "operator.pem").read_bytes()
    Revocations(trust / "vmm").check(operator)
    authority = x509.load_pem_x509_certificate((trust / "vmm" / "ca.pem").read_bytes())
    point = authority.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    damaged = authority.public_bytes(Encoding.DER).replace(point, point[:1] + bytes(64))
    text = base64.encodebytes(damaged)
    (trust / "vmm" / "ca.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n")
    with pytest.raises(PermissionDenied, match="nobody is let in"):
        Revocations(trust / "vmm").check(operator)
