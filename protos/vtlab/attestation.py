"""Checks a quote of the monitor offline: whose it is, that it is fresh and no older one, and what it says.

A quote is trusted as far as its key: an Ed25519 key whose certificate names vtlab://quote/monitor and was issued by an
authority of the laboratory. Everything else is compared with what the verifier wants; what it does not ask for is not
checked. Each refusal names the field at fault.
"""

from __future__ import annotations

import datetime
import hashlib
import io
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from vtlab.errors import BadArgument, BadImage, Refused
from vtlab.trust.certificates import QUOTE_URI, unreadable
from vtlab.v1.monitor_pb2 import Quote, SignedQuote

NONCE_SIZES = range(8, 65)
"""Bytes."""
_CONTEXT = b"vtlab quote v1\0"


def signed_bytes(quote: bytes) -> bytes:
    """What the signature is of."""
    return _CONTEXT + quote


@dataclass(frozen=True)
class Wanted:
    """What a quote has to say; None is not checked.

    Attributes:
        nonce: the one that was asked with.
        policy: the text that has to be in force, in VTL1 and locked.
        counter: the highest one seen before.
        image: the ELF file that what was measured has to come from.
    """

    nonce: bytes | None = None
    policy: bytes | None = None
    counter: int | None = None
    image: bytes | None = None


def verify(data: bytes, authority: bytes, wanted: Wanted) -> Quote:
    """Checks a serialized SignedQuote.

    Args:
        authority: certificates of the laboratory's authority, PEM.

    Raises:
        BadArgument: it is no quote, or the authority is no certificate.
        Refused: it is not what was wanted.
    """
    try:
        signed = SignedQuote.FromString(data)
        quote = Quote.FromString(signed.quote)
    except DecodeError as error:
        raise BadArgument("quote", f"is no such message: {error}") from None
    _check_signature(signed, authority)
    if quote.broken:
        raise Refused("quote", f"VTL1 guards nothing any more: {quote.broken}")
    if wanted.nonce is not None and quote.nonce != wanted.nonce:
        raise Refused(
            "nonce", f"the quote answers {quote.nonce.hex()}, not {wanted.nonce.hex()}: it is another's, or replayed"
        )
    if wanted.counter is not None and quote.counter < wanted.counter:
        raise Refused("counter", f"{quote.counter} is below {wanted.counter}: the monitor's store was put back")
    if wanted.policy is not None:
        _check_policy(quote, wanted.policy)
    if wanted.image is not None:
        _check_measurements(quote, wanted.image)
    return quote


def _check_signature(signed: SignedQuote, authority: bytes) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        authorities = x509.load_pem_x509_certificates(authority)
    except unreadable():
        raise BadArgument("authority", "is no certificate in PEM") from None
    try:
        certificate = x509.load_pem_x509_certificate(signed.certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        key = certificate.public_key()
    except unreadable(x509.ExtensionNotFound):
        raise Refused("certificate", "is none for quotes") from None
    if not any(_issued(certificate, one) for one in authorities):
        raise Refused("certificate", "was not issued by this authority")
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise Refused("certificate", f"is not valid now, but until {certificate.not_valid_after_utc:%Y-%m-%d}")
    if uris != [QUOTE_URI] or not isinstance(key, Ed25519PublicKey):
        raise Refused("certificate", "is not of a monitor's key for quotes")
    try:
        key.verify(signed.signature, signed_bytes(signed.quote))
    except InvalidSignature:
        raise Refused("signature", "is not of this quote by this key") from None


def _issued(certificate: object, authority: object) -> bool:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    assert isinstance(certificate, x509.Certificate)
    assert isinstance(authority, x509.Certificate)
    try:
        certificate.verify_directly_issued_by(authority)
    except unreadable(InvalidSignature):
        return False
    return True


def _check_policy(quote: Quote, policy: bytes) -> None:
    digest = hashlib.sha256(policy).digest()
    if quote.policy_sha256 != digest:
        held = quote.policy_sha256.hex() or "none"
        raise Refused("policy", f"VTL1 holds {held}, not {digest.hex()}")
    if not quote.locked:
        raise Refused("policy", "is not locked: it can still be replaced")


def _check_measurements(quote: Quote, image: bytes) -> None:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        segments = [
            (segment.header.p_paddr, bytes(segment.data())[: segment.header.p_memsz])
            for segment in ELFFile(io.BytesIO(image)).iter_segments("PT_LOAD")
        ]
    except (ELFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        raise BadImage("image", f"is no readable ELF file: {error}") from None
    if not quote.measurements:
        raise Refused("measurements", "there are none")
    for measured in quote.measurements:
        expected = bytearray(measured.size)
        for gpa, data in segments:
            first, last = max(measured.gpa, gpa), min(measured.gpa + measured.size, gpa + len(data))
            if first < last:
                expected[first - measured.gpa : last - measured.gpa] = data[first - gpa : last - gpa]
        if hashlib.sha256(expected).digest() != measured.sha256:
            raise Refused(f"measurement {measured.name}", f"at {measured.gpa:#x} is not what the image has there")
