"""Detached CMS signatures (RFC 5652), as Linux's scripts/sign-file makes them for modules: verification.

SignedData without attributes, signers named by issuer and serial number or by subject key identifier; RSA PKCS#1 v1.5
(2048 bits or more), ECDSA or Ed25519, with SHA-256, SHA-384 or SHA-512. Anything else is refused. Validity dates are
not checked, as in Linux: at boot nobody knows the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from vtlab.trust.certificates import unreadable

MAX_SIGNATURE = 64 << 10
MAX_SIGNERS = 8
MIN_RSA_BITS = 2048

_SIGNED_DATA = "1.2.840.113549.1.7.2"
_DATA = "1.2.840.113549.1.7.1"
_DIGESTS: dict[str, type[hashes.HashAlgorithm]] = {
    "2.16.840.1.101.3.4.2.1": hashes.SHA256,
    "2.16.840.1.101.3.4.2.2": hashes.SHA384,
    "2.16.840.1.101.3.4.2.3": hashes.SHA512,
}
_RSA = {f"1.2.840.113549.1.1.{arc}" for arc in (1, 11, 12, 13)}  # rsaEncryption, sha256/384/512WithRSAEncryption
_ECDSA = {f"1.2.840.10045.4.3.{arc}" for arc in (2, 3, 4)}  # ecdsa-with-SHA256/384/512
_ED25519 = {"1.3.101.112"}


class BadSignature(Exception):
    """The signature is malformed, by nobody known, by somebody revoked, or wrong."""


@asn1.sequence
class _Algorithm:
    algorithm: x509.ObjectIdentifier
    parameters: asn1.Null | None


@asn1.sequence
class _IssuerAndSerialNumber:
    issuer: asn1.TLV
    serial_number: int


@asn1.sequence
class _SignerInfo:
    version: int
    sid: Annotated[bytes, asn1.Implicit(0)] | _IssuerAndSerialNumber
    digest_algorithm: _Algorithm
    signature_algorithm: _Algorithm
    signature: bytes


@asn1.sequence
class _Content:
    content_type: x509.ObjectIdentifier
    content: Annotated[bytes | None, asn1.Explicit(0)]


@asn1.sequence
class _SignedData:
    version: int
    digest_algorithms: asn1.SetOf[_Algorithm]
    content: _Content
    signers: asn1.SetOf[_SignerInfo]


@asn1.sequence
class _ContentInfo:
    content_type: x509.ObjectIdentifier
    content: Annotated[_SignedData, asn1.Explicit(0)]


def verify(signature: bytes, data: bytes, certificates: Iterable[x509.Certificate]) -> x509.Certificate:
    """Checks a detached signature of `data`; every signer must be known and right.

    Returns:
        The certificate of the first signer.

    Raises:
        BadSignature: says why.
    """
    known = list(certificates)
    signers = _parse(signature)
    found = []
    for signer in signers:
        certificate = next((one for one in known if _names(signer, one)), None)
        if certificate is None:
            raise BadSignature("signed by nobody known")
        _check(signer, certificate, data)
        found.append(certificate)
    return found[0]


def _parse(signature: bytes) -> list[_SignerInfo]:
    if len(signature) > MAX_SIGNATURE:
        raise BadSignature(f"signature of {len(signature)} bytes")
    try:
        info = asn1.decode_der(_ContentInfo, signature)
    except (ValueError, TypeError) as error:
        raise BadSignature(f"no detached CMS signature without attributes: {error}") from None
    content = info.content.content
    if info.content_type.dotted_string != _SIGNED_DATA or content.content_type.dotted_string != _DATA:
        raise BadSignature("CMS content is not SignedData over data")
    if content.content is not None:
        raise BadSignature("signature is not detached")
    signers = info.content.signers.as_list()
    if not 1 <= len(signers) <= MAX_SIGNERS:
        raise BadSignature(f"{len(signers)} signers")
    return signers


def _names(signer: _SignerInfo, certificate: x509.Certificate) -> bool:
    """A certificate that has what the library cannot read is nobody's."""
    try:
        if isinstance(signer.sid, bytes):
            extension = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
            return extension.value.digest == signer.sid
        same_issuer = _contents(certificate.issuer.public_bytes()) == signer.sid.issuer.data
        return same_issuer and certificate.serial_number == signer.sid.serial_number
    except unreadable(x509.ExtensionNotFound):
        return False


def _contents(der: bytes) -> bytes:
    """What follows tag and length of a DER value."""
    return der[2:] if der[1] < 0x80 else der[2 + (der[1] & 0x7F) :]


def _check(signer: _SignerInfo, certificate: x509.Certificate, data: bytes) -> None:
    digest = _DIGESTS.get(signer.digest_algorithm.algorithm.dotted_string)
    if digest is None:
        raise BadSignature(f"digest algorithm {signer.digest_algorithm.algorithm.dotted_string}")
    algorithm = signer.signature_algorithm.algorithm.dotted_string
    try:
        key = certificate.public_key()
        if isinstance(key, rsa.RSAPublicKey) and algorithm in _RSA and key.key_size >= MIN_RSA_BITS:
            key.verify(signer.signature, data, padding.PKCS1v15(), digest())
        elif isinstance(key, ec.EllipticCurvePublicKey) and algorithm in _ECDSA:
            key.verify(signer.signature, data, ec.ECDSA(digest()))
        elif isinstance(key, ed25519.Ed25519PublicKey) and algorithm in _ED25519:
            key.verify(signer.signature, data)
        else:
            raise BadSignature(f"algorithm {algorithm} with a {type(key).__name__}")
    except InvalidSignature:
        raise BadSignature("signature does not match") from None
    except unreadable() as error:
        raise BadSignature(f"key or signature cannot be used: {error}") from None


def load_certificates(data: bytes) -> list[x509.Certificate]:
    """Certificates in DER, one after the other, padded with zeros; or PEM. Raises ValueError."""
    try:
        loaded = _load(data)
        for one in loaded:
            one.issuer.public_bytes()  # which is read when it is asked for, and later may not fail
        return loaded
    except unreadable() as error:
        raise ValueError(str(error)) from None


def _load(data: bytes) -> list[x509.Certificate]:
    if data.lstrip().startswith(b"-----BEGIN"):
        return x509.load_pem_x509_certificates(data.rstrip(b"\0"))
    result = []
    rest = data
    while rest.strip(b"\0"):
        length = _der_length(rest)
        result.append(x509.load_der_x509_certificate(rest[:length]))
        rest = rest[length:]
    if not result:
        raise ValueError("no certificate")
    return result


def _der_length(data: bytes) -> int:
    """Bytes of the DER SEQUENCE at the start. Raises ValueError."""
    if len(data) < 4 or data[0] != 0x30:
        raise ValueError("no X.509 certificate in DER or PEM")
    if data[1] < 0x80:
        length = 2 + data[1]
    else:
        count = data[1] & 0x7F
        length = 2 + count + int.from_bytes(data[2 : 2 + count], "big")
    if length > len(data):
        raise ValueError("certificate is truncated")
    return length
