"""Certificates of a laboratory: one authority, one certificate a role, made at first start.

Layout of a trust folder (0700, files 0600), so that each process or container can be given its own part alone:

    ca/ca.pem ca/ca.key             the authority; no server needs this folder
    ROLE/ca.pem ROLE/ROLE.pem ROLE/ROLE.key

Keys are ECDSA P-256. A certificate names its role as the URI vtlab://role/ROLE, and as the host name
ROLE.vtlab.internal that a caller insists on, so that no role can pose as the server of another.
"""

from __future__ import annotations

import datetime
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vtlab.errors import PeerUnavailable
from vtlab.trust.roles import Role

URI_PREFIX = "vtlab://role/"
AUTHORITY_LIFE = datetime.timedelta(days=3650)
ROLE_LIFE = datetime.timedelta(days=365)
RENEW_BEFORE_END = datetime.timedelta(days=30)
CLOCK_SKEW = datetime.timedelta(hours=1)


def server_name(role: Role | str) -> str:
    """Host name in the certificate of a role."""
    return f"{Role(role).value}.vtlab.internal"


@dataclass(frozen=True)
class Credentials:
    """What one process needs to speak: the authority's certificate, its own, and its own key; all PEM."""

    authority: bytes
    certificate: bytes
    key: bytes


def load_credentials(trust: Path, role: Role | str) -> Credentials:
    """Reads what `role` needs from its own part of a trust folder, or from the whole folder.

    Raises:
        PeerUnavailable: a file is missing or unreadable; without it no channel can be made.
    """
    role = Role(role)
    own = trust if (trust / f"{role}.pem").exists() else trust / role
    paths = own / "ca.pem", own / f"{role}.pem", own / f"{role}.key"
    try:
        authority, certificate, key = (path.read_bytes() for path in paths)
    except OSError as error:
        raise PeerUnavailable(f"trust folder {trust}", f"no credentials for role {role}: {error}") from None
    return Credentials(authority, certificate, key)


def ensure_trust(folder: Path) -> Path:
    """Makes what is missing or about to expire in a trust folder; returns it. Safe to call from several processes."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder):
        if not _is_fresh(folder / "ca" / "ca.pem") or not (folder / "ca" / "ca.key").exists():
            _make_authority(folder)
        authority = (folder / "ca" / "ca.pem").read_bytes()
        missing = [role for role in Role if not _is_current(folder / role, role, authority)]
        if missing:
            _issue(folder, missing)
    return folder


def hand_out(folder: Path, target: Path) -> None:
    """Copies each role's part to target/ROLE where that folder exists, readable by the folder's group (0640)."""
    for role in Role:
        if (target / role).is_dir():
            for name in (f"{role}.key", f"{role}.pem", "ca.pem"):
                _write(target / role / name, (folder / role / name).read_bytes(), 0o640)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_fresh(path: Path) -> bool:
    from cryptography import x509  # only those who make certificates pay for this import

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return False
    return certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC) > RENEW_BEFORE_END


def _is_current(own: Path, role: Role, authority: bytes) -> bool:
    """ca.pem is written last, so that it vouches for the two files beside it."""
    paths = own / "ca.pem", own / f"{role}.key"
    return all(p.exists() for p in paths) and paths[0].read_bytes() == authority and _is_fresh(own / f"{role}.pem")


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Puts the file there whole or not at all."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
    temporary.replace(path)


def _make_authority(folder: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vtlab authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # keyCertSign, cRLSign
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca" / "ca.key", _private_pem(key))
    _write(folder / "ca" / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))


def _issue(folder: Path, roles: list[Role]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority_pem = (folder / "ca" / "ca.pem").read_bytes()
    authority = x509.load_pem_x509_certificate(authority_pem)
    authority_key = serialization.load_pem_private_key((folder / "ca" / "ca.key").read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    now = datetime.datetime.now(datetime.UTC)
    for role in roles:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, role.value)])
        names = x509.SubjectAlternativeName(
            [x509.DNSName(server_name(role)), x509.UniformResourceIdentifier(URI_PREFIX + role.value)]
        )
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            x509.CertificateBuilder(authority.subject, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + ROLE_LIFE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        _write(folder / role / f"{role}.key", _private_pem(key))
        _write(folder / role / f"{role}.pem", certificate.public_bytes(serialization.Encoding.PEM))
        _write(folder / role / "ca.pem", authority_pem)


def _private_pem(key: object) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
