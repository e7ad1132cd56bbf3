"""Certificates that were taken back, as the file says now: crl.pem beside a server's own certificate.

The list is an X.509 CRL signed by an authority of ca.pem beside it. No file: nothing was ever taken back. A list that
cannot be read, or that is gone after it was there, closes the server to everybody: who is still trusted is unknown.
"""

from __future__ import annotations

import functools
from pathlib import Path

from vtlab.errors import PermissionDenied
from vtlab.trust.certificates import unreadable

_Identity = tuple[int, int, int]


class Revocations:
    """The list of one server. Thread-safe: what it holds is replaced whole."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: the server's own part of the trust folder."""
        self._path = folder / "crl.pem"
        self._authorities = folder / "ca.pem"
        self._known: tuple[_Identity | None, frozenset[int], str] = (None, frozenset(), "")

    def check(self, certificate: bytes) -> None:
        """Raises PermissionDenied if the certificate (PEM) was taken back, or if the list is no list."""
        revoked, problem = self._current()
        if problem:
            raise PermissionDenied(str(self._path), f"{problem}: nobody is let in")
        if revoked:
            try:
                serial = _serial(certificate)
            except unreadable() as error:
                raise PermissionDenied("certificate", f"has no serial number that can be read: {error}") from None
            if serial in revoked:
                raise PermissionDenied(f"certificate {serial:x}", "was revoked")

    def identity(self) -> _Identity | None:
        """Changes with the file; None where there is none."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError:
            return 0, 0, 0
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _current(self) -> tuple[frozenset[int], str]:
        identity = self.identity()
        known, revoked, problem = self._known
        if identity == known:
            return revoked, problem
        if identity is None:
            return frozenset(), "is gone"
        revoked, problem = self._read()
        self._known = identity, revoked, problem
        return revoked, problem

    def _read(self) -> tuple[frozenset[int], str]:
        from cryptography import x509  # only where something was taken back
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            found = x509.load_pem_x509_crl(self._path.read_bytes())
            authorities = x509.load_pem_x509_certificates(self._authorities.read_bytes())
            keys = [one.public_key() for one in authorities if one.subject == found.issuer]
            if not any(isinstance(key, ec.EllipticCurvePublicKey) and found.is_signature_valid(key) for key in keys):
                return frozenset(), "is not signed by an authority of this laboratory"
            return frozenset(one.serial_number for one in found), ""
        except unreadable(OSError) as error:
            return frozenset(), f"is no list of revoked certificates ({error})"


@functools.lru_cache(256)
def _serial(certificate: bytes) -> int:
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate).serial_number
