"""Keys and certificates made for one test run."""

from __future__ import annotations

import datetime
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7Options, PKCS7SignatureBuilder
from cryptography.x509.oid import NameOID

from vtlab.services import MODULE_SIGNATURE, MODULE_SIGNATURE_MAGIC

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
DETACHED = (PKCS7Options.DetachedSignature, PKCS7Options.Binary, PKCS7Options.NoAttributes, PKCS7Options.NoCerts)


@cache
def signer(name: str, bits: int = 2048) -> tuple[Key, x509.Certificate]:
    """A key and its self-signed certificate; the same for the same arguments. 0 bits: an elliptic curve."""
    key: Key = rsa.generate_private_key(65537, bits) if bits else ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC))
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def der(name: str, bits: int = 2048) -> bytes:
    """The certificate."""
    return signer(name, bits)[1].public_bytes(serialization.Encoding.DER)


def cms(data: bytes, name: str, bits: int = 2048, options: tuple[PKCS7Options, ...] = DETACHED) -> bytes:
    """A signature as sign-file makes it."""
    key, certificate = signer(name, bits)
    builder = PKCS7SignatureBuilder().set_data(data).add_signer(certificate, key, hashes.SHA256())
    return builder.sign(serialization.Encoding.DER, options)


def appended(module: bytes, signature: bytes) -> bytes:
    """A signed module file."""
    return module + signature + MODULE_SIGNATURE.pack(0, 0, 2, 0, 0, len(signature)) + MODULE_SIGNATURE_MAGIC
