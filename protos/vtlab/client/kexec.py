"""Kernel images for kexec and kdump and newer policies, as VTL1 takes them (vtlab.services), and who signs them.

The key lives as long as the object: whoever builds a kernel puts the certificate into it and signs what may follow it.
"""

from __future__ import annotations

import datetime
import io

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7Options, PKCS7SignatureBuilder
from cryptography.x509.oid import NameOID
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from vtlab.errors import BadImage
from vtlab.services import (
    KEXEC_HEADER,
    KEXEC_MAGIC,
    MODULE_SIGNATURE,
    MODULE_SIGNATURE_MAGIC,
    PKEY_ID_PKCS7,
    UPGRADE_HEADER,
    UPGRADE_MAGIC,
    KexecEntry,
)

_OPTIONS = [PKCS7Options.DetachedSignature, PKCS7Options.Binary, PKCS7Options.NoAttributes, PKCS7Options.NoCerts]


def kernel_image(kernel: bytes, version: int, command_line: str) -> bytes:
    """An image without a signature.

    Args:
        kernel: multiboot 1 kernel, an ELF file.
        version: grows with each kernel whose predecessors should not come back.
    """
    line = command_line.encode() + b"\0"
    header = KEXEC_HEADER.pack(KEXEC_MAGIC, version, KexecEntry.MULTIBOOT, len(line))
    return header + line.ljust(-(-len(line) // 8) * 8, b"\0") + kernel


def policy_upgrade(text: str, version: int) -> bytes:
    """A policy for UPGRADE, without a signature."""
    return UPGRADE_HEADER.pack(UPGRADE_MAGIC, version) + text.encode()


class KernelSigner:
    """A new key and its certificate. Attributes: `certificate` in DER."""

    def __init__(self, name: str = "kernel signer") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC))
            .not_valid_after(datetime.datetime(2124, 1, 1, tzinfo=datetime.UTC))
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = self._certificate.public_bytes(serialization.Encoding.DER)

    def sign(self, image: bytes) -> bytes:
        """With the signature behind it, as Linux's sign-file does for modules."""
        builder = PKCS7SignatureBuilder().set_data(image).add_signer(self._certificate, self._key, hashes.SHA256())
        signature = builder.sign(serialization.Encoding.DER, _OPTIONS)
        return (
            image
            + signature
            + MODULE_SIGNATURE.pack(0, 0, PKEY_ID_PKCS7, 0, 0, len(signature))
            + MODULE_SIGNATURE_MAGIC
        )

    def trusted_by(self, kernel: bytes, section: str = ".vtlab.certificate") -> bytes:
        """The kernel with this certificate behind those that it has. Raises BadImage if there is no room."""
        try:
            found = ELFFile(io.BytesIO(kernel)).get_section_by_name(section)
        except ELFError as error:
            raise BadImage("kernel", str(error)) from None
        if found is None:
            raise BadImage("kernel", f"has no section {section}")
        data = found.data().rstrip(b"\0") + self.certificate
        if len(data) > found["sh_size"]:
            raise BadImage("kernel", f"section {section} has no room for {len(self.certificate)} bytes")
        start = found["sh_offset"]
        return kernel[:start] + data.ljust(found["sh_size"], b"\0") + kernel[start + found["sh_size"] :]
