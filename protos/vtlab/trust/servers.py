"""Which certificates callers believe, once one was taken back: servers.pem beside a role's own.

gRPC's Python asks nobody about a server's certificate but the list of roots. So from the first revocation on, callers
have no authority as their root, but the certificates themselves that are in use: one that was taken back is not there,
and its key opens nothing, whoever holds it. No crl.pem: the authority is believed, as ever.
"""

from __future__ import annotations

from pathlib import Path

from vtlab.errors import PeerUnavailable
from vtlab.trust.certificates import load_credentials, own_part, write
from vtlab.trust.roles import Role

NAME = "servers.pem"


def roots(trust: Path, role: Role | str) -> bytes:
    """What a caller of that role believes of servers, PEM.

    Raises:
        PeerUnavailable: something was taken back, and what is good is not known.
    """
    role = Role(role)
    own = own_part(trust, role)
    if not (own / "crl.pem").exists():
        return load_credentials(trust, role).authority
    try:
        known = (own / NAME).read_bytes()
    except OSError as error:
        known, why = b"", str(error)
    else:
        why = "it is empty"
    if not known:
        raise PeerUnavailable(str(own / NAME), f"certificates were taken back, and which are good is not known: {why}")
    return known


def keep(folder: Path) -> None:
    """Brings servers.pem of all parts up to date, where something was taken back; the folder is locked."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        revoked = {one.serial_number for one in x509.load_pem_x509_crl((folder / "ca" / "crl.pem").read_bytes())}
    except FileNotFoundError:
        return
    sources = [folder / "ca" / NAME, *(folder / role / f"{role}.pem" for role in Role)]
    found = [one for path in sources if path.exists() for one in x509.load_pem_x509_certificates(path.read_bytes())]
    good = {one.serial_number: one.public_bytes(Encoding.PEM) for one in found if one.serial_number not in revoked}
    for part in ("ca", *Role):
        write(folder / part / NAME, b"".join(good.values()))
