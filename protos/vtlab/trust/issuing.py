"""Certificates and keys as bytes: what they contain. Only those who make certificates import this.

An authority's name ends in a number of its own, so that two of them can stand in one ca.pem. A role's key is ECDSA
P-256; its certificate names the role as the URI vtlab://role/ROLE, and as the host name ROLE.vtlab.internal that a
caller insists on, so that no role can pose as the server of another. The key for quotes is Ed25519; its certificate
names vtlab://quote/monitor, which is no role and no host name: it opens no channel.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from vtlab.trust.certificates import QUOTE_URI, URI_PREFIX, server_name
from vtlab.trust.roles import Role

AUTHORITY_LIFE = datetime.timedelta(days=3650)
ROLE_LIFE = datetime.timedelta(days=365)
CLOCK_SKEW = datetime.timedelta(hours=1)

Pair = tuple[bytes, bytes]
"""Certificate and private key, both PEM."""
_Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def authority_pair() -> Pair:
    """A new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    serial = x509.random_serial_number()
    name = _name(f"vtlab authority {serial:x}"[:40])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # keyCertSign, cRLSign
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), serial)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _private_pem(key)


class Issuer:
    """The authority that issues: the first one of its file."""

    def __init__(self, authority: bytes, key: bytes) -> None:
        self._authority = x509.load_pem_x509_certificate(authority)
        loaded = serialization.load_pem_private_key(key, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded

    def pairs(self, role: Role) -> dict[str, Pair]:
        """What a role is given, by the name of its files."""
        own = {role.value: self.role_pair(role)}
        return own | {"quote": self._quote_pair()} if role is Role.MONITOR else own

    def role_pair(
        self,
        role: Role,
        uris: tuple[str, ...] | None = None,
        begin: datetime.datetime | None = None,
        life: datetime.timedelta = ROLE_LIFE,
    ) -> Pair:
        """A key and a certificate for mutual TLS.

        Args:
            uris: what it names; the role's URI by default.
            begin: of its validity; by default a little before now.
            life: how long it is valid from there.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        named = [x509.UniformResourceIdentifier(uri) for uri in uris or (URI_PREFIX + role.value,)]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = self._builder(role.value, key, [x509.DNSName(server_name(role)), *named], begin, life)
        return self._signed(builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False), key)

    def _quote_pair(self) -> Pair:
        key = ed25519.Ed25519PrivateKey.generate()
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digitalSignature
        builder = self._builder("quote", key, [x509.UniformResourceIdentifier(QUOTE_URI)], None, ROLE_LIFE)
        return self._signed(builder.add_extension(usage, critical=True), key)

    def revocation_list(self, serials: dict[int, datetime.datetime]) -> bytes:
        """A signed list (X.509 CRL, PEM) of certificates taken back, with the instant of each."""
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateRevocationListBuilder(self._authority.subject, now, now + AUTHORITY_LIFE)
        for serial, instant in serials.items():
            builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder(serial, instant).build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _builder(
        self,
        name: str,
        key: _Key,
        names: list[x509.GeneralName],
        begin: datetime.datetime | None,
        life: datetime.timedelta,
    ) -> x509.CertificateBuilder:
        begin = begin or datetime.datetime.now(datetime.UTC) - CLOCK_SKEW
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder(self._authority.subject, _name(name), key.public_key(), x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(issuer_key, critical=False)
        )

    def _signed(self, builder: x509.CertificateBuilder, key: _Key) -> Pair:
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM), _private_pem(key)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _private_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
