"""New keys without a stop, and taking keys back. Servers notice at their next handshake (vtlab.channels).

A new authority goes in three steps, so that nobody meets a certificate that it cannot check: `add_authority` makes
all believe the next one too, `renew` has it issue everybody's certificates, `retire_authorities` stops believing in
those before. Who holds channels from before a step keeps them; who is started after it knows it.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from vtlab.errors import BadArgument, WrongState
from vtlab.trust import servers
from vtlab.trust.certificates import issue, locked, unreadable, write
from vtlab.trust.issuing import Issuer, authority_pair
from vtlab.trust.roles import Role


def renew(folder: Path) -> None:
    """New keys and certificates for all roles."""
    with locked(folder):
        issue(folder, Role)
        servers.keep(folder)


def add_authority(folder: Path) -> None:
    """Makes the authority that issues from now on, believed beside those before; certificates stay as they are."""
    with locked(folder):
        certificate, key = authority_pair()
        believed = certificate + (folder / "ca" / "ca.pem").read_bytes()
        for part in (folder / role for role in Role):
            write(part / "ca.pem", believed)
        write(folder / "ca" / "ca.key", key)
        write(folder / "ca" / "ca.pem", believed)
        _sign_list(folder, _revoked(folder))


def retire_authorities(folder: Path) -> None:
    """Believes in the issuing authority alone. Raises WrongState where one before has issued a role's certificate."""
    with locked(folder):
        issuing = x509.load_pem_x509_certificate((folder / "ca" / "ca.pem").read_bytes())
        for role in Role:
            certificate = x509.load_pem_x509_certificate((folder / role / f"{role}.pem").read_bytes())
            if certificate.issuer != issuing.subject:
                raise WrongState(f"certificate of {role}", "was issued by an authority before: renew first")
        alone = issuing.public_bytes(Encoding.PEM)
        for part in ("ca", *Role):
            write(folder / part / "ca.pem", alone)


def revoke(folder: Path, what: str) -> int:
    """Takes a certificate back, named by its PEM file or its serial number in hexadecimal; returns the number.

    Every role's part gets the new list. Raises BadArgument if it is neither.
    """
    with locked(folder):
        serial = _serial(what)
        revoked = _revoked(folder)
        revoked.setdefault(serial, datetime.datetime.now(datetime.UTC))
        _sign_list(folder, revoked)
    return serial


def _serial(what: str) -> int:
    try:
        if Path(what).is_file():
            return x509.load_pem_x509_certificate(Path(what).read_bytes()).serial_number
        serial = int(what, 16)
    except unreadable():
        serial = 0
    if not 0 < serial < 1 << 160:
        raise BadArgument(what, "is neither a certificate in PEM nor a serial number in hexadecimal")
    return serial


def _issuer(folder: Path) -> Issuer:
    return Issuer((folder / "ca" / "ca.pem").read_bytes(), (folder / "ca" / "ca.key").read_bytes())


def _revoked(folder: Path) -> dict[int, datetime.datetime]:
    try:
        data = (folder / "ca" / "crl.pem").read_bytes()
    except FileNotFoundError:
        return {}
    return {one.serial_number: one.revocation_date_utc for one in x509.load_pem_x509_crl(data)}


def _sign_list(folder: Path, revoked: dict[int, datetime.datetime]) -> None:
    """Has the issuing authority sign the list, for all roles. Nothing where nothing was ever taken back."""
    if revoked:
        signed = _issuer(folder).revocation_list(revoked)
        write(folder / "ca" / "crl.pem", signed)
        servers.keep(folder)
        for part in Role:  # behind what callers need from then on
            write(folder / part / "crl.pem", signed)
