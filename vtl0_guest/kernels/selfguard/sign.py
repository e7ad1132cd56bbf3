"""Signs the module with a key that nobody keeps: `python sign.py` makes certificate.der and module.cms anew.

Both are committed, so that a build gives the same bytes; the private key exists only while this runs. The signature is
what Linux's scripts/sign-file makes: CMS, detached, no attributes, no certificates (docs/policy.md, "A module file").
"""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7Options, PKCS7SignatureBuilder
from cryptography.x509.oid import NameOID

from vtl0_guest.kernels.selfguard.build import SOURCE, build_module


def make_certificate(key: rsa.RSAPrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "selfguard module signer")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2124, 1, 1, tzinfo=datetime.UTC))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )


def sign(module: bytes, certificate: x509.Certificate, key: rsa.RSAPrivateKey) -> bytes:
    """The detached signature of a module file, DER."""
    options = [PKCS7Options.DetachedSignature, PKCS7Options.Binary, PKCS7Options.NoAttributes, PKCS7Options.NoCerts]
    builder = PKCS7SignatureBuilder().set_data(module).add_signer(certificate, key, hashes.SHA256())
    return builder.sign(serialization.Encoding.DER, options)


def main() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    certificate = make_certificate(key)
    with tempfile.TemporaryDirectory() as temporary:
        build_module(Path(temporary) / "module.elf", Path(temporary))
        module = (Path(temporary) / "module.elf").read_bytes()
    (SOURCE / "module/certificate.der").write_bytes(certificate.public_bytes(serialization.Encoding.DER))
    (SOURCE / "module/module.cms").write_bytes(sign(module, certificate, key))


if __name__ == "__main__":
    main()
