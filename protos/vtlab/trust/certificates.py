"""Certificates of a laboratory: one authority, one certificate a role, made at first start.

Layout of a trust folder (0700, files 0600), so that each process or container can be given its own part alone:

    ca/ca.pem ca/ca.key             the authority; no server needs this folder
    ROLE/ca.pem ROLE/ROLE.pem ROLE/ROLE.key
    monitor/quote.pem monitor/quote.key     what the monitor signs quotes with (vtlab.attestation)
    ROLE/crl.pem                    what was taken back, once something was (vtlab.trust.revocation)

ca.pem may hold more than one authority: the first one issues, all are believed (vtlab.trust.rotation). What the files
contain is in vtlab.trust.issuing.
"""

from __future__ import annotations

import datetime
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vtlab.errors import PeerUnavailable
from vtlab.trust.roles import Role

URI_PREFIX = "vtlab://role/"
QUOTE_URI = "vtlab://quote/monitor"
RENEW_BEFORE_END = datetime.timedelta(days=30)


def server_name(role: Role | str) -> str:
    """Host name in the certificate of a role."""
    return f"{Role(role).value}.vtlab.internal"


def unreadable(*also: type[Exception]) -> tuple[type[Exception], ...]:
    """What the library raises for a certificate or a list that is none, not all of it ValueErrors; and `also`."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    return (
        *also,
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.InvalidVersion,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    )


@dataclass(frozen=True)
class Credentials:
    """What one process needs to speak: the authority's certificate, its own, and its own key; all PEM."""

    authority: bytes
    certificate: bytes
    key: bytes


def own_part(trust: Path, role: Role) -> Path:
    """The folder with that role's files, given it or the whole trust folder."""
    return trust if (trust / f"{role}.pem").exists() else trust / role


def load_credentials(trust: Path, role: Role | str) -> Credentials:
    """Reads what `role` needs from its own part of a trust folder, or from the whole folder.

    Raises:
        PeerUnavailable: a file is missing or unreadable; without it no channel can be made.
    """
    role = Role(role)
    own = own_part(trust, role)
    paths = own / "ca.pem", own / f"{role}.pem", own / f"{role}.key"
    try:
        authority, certificate, key = (path.read_bytes() for path in paths)
    except OSError as error:
        raise PeerUnavailable(f"trust folder {trust}", f"no credentials for role {role}: {error}") from None
    return Credentials(authority, certificate, key)


def ensure_trust(folder: Path) -> Path:
    """Makes what is missing or about to expire in a trust folder; returns it. Safe to call from several processes."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder):
        if not _is_fresh(folder / "ca" / "ca.pem") or not (folder / "ca" / "ca.key").exists():
            from vtlab.trust.issuing import authority_pair

            certificate, key = authority_pair()
            write(folder / "ca" / "ca.key", key)
            write(folder / "ca" / "ca.pem", certificate)
        authority = (folder / "ca" / "ca.pem").read_bytes()
        missing = [role for role in Role if not _is_current(folder / role, role, authority)]
        if missing:
            issue(folder, missing)
        if (folder / "ca" / "crl.pem").exists():
            from vtlab.trust import servers

            servers.keep(folder)
    return folder


def issue(folder: Path, roles: Iterable[Role]) -> None:
    """New keys and certificates for these roles; the folder is locked. ca.pem is written last, for all who watch."""
    from vtlab.trust.issuing import Issuer

    authority = (folder / "ca" / "ca.pem").read_bytes()
    issuer = Issuer(authority, (folder / "ca" / "ca.key").read_bytes())
    for role in roles:
        for name, (certificate, key) in issuer.pairs(role).items():
            write(folder / role / f"{name}.key", key)
            write(folder / role / f"{name}.pem", certificate)
        write(folder / role / "ca.pem", authority)


def hand_out(folder: Path, target: Path) -> None:
    """Copies each role's part to target/ROLE where that folder exists, readable by the folder's group (0640)."""
    for role in Role:
        if (target / role).is_dir():
            for name in _handed_out(folder, role):
                write(target / role / name, (folder / role / name).read_bytes(), 0o640)


def _handed_out(folder: Path, role: Role) -> list[str]:
    """In the order that servers rely on: ca.pem vouches for the keys beside it."""
    pairs = [role.value, "quote"] if role is Role.MONITOR else [role.value]
    names = [f"{pair}.{kind}" for pair in pairs for kind in ("key", "pem")] + ["ca.pem"]
    return [*names, "servers.pem", "crl.pem"] if (folder / role / "crl.pem").exists() else names


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else changes the trust folder meanwhile."""
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
    except unreadable(OSError):
        return False
    return certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC) > RENEW_BEFORE_END


def _is_current(own: Path, role: Role, authority: bytes) -> bool:
    """ca.pem is written last, so that it vouches for the two files beside it."""
    names = [role.value, "quote"] if role is Role.MONITOR else [role.value]
    if not all(path.exists() for path in (own / "ca.pem", *(own / f"{name}.key" for name in names))):
        return False
    return (own / "ca.pem").read_bytes() == authority and all(_is_fresh(own / f"{name}.pem") for name in names)


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Puts the file there whole or not at all."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
    temporary.replace(path)
