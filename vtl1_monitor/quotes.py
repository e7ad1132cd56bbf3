"""Quotes: what VTL1 holds of a machine, signed with a key that only the monitor has (vtlab.attestation checks them)."""

from __future__ import annotations

from pathlib import Path

from vtlab.attestation import signed_bytes
from vtlab.trust.certificates import own_part
from vtlab.trust.roles import Role
from vtlab.v1.monitor_pb2 import Quote, SignedQuote


class Quoter:
    """Signs with the key of the monitor's part of the trust folder, as it is then: a renewal needs no restart."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def signed(self, quote: Quote) -> SignedQuote:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key = load_pem_private_key((self._folder / "quote.key").read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        data = quote.SerializeToString()
        certificate = (self._folder / "quote.pem").read_bytes()
        return SignedQuote(quote=data, signature=key.sign(signed_bytes(data)), certificate=certificate)


def load_quoter(trust: Path) -> Quoter | None:
    """None where the trust folder has no key for quotes."""
    folder = own_part(trust, Role.MONITOR)
    return Quoter(folder) if (folder / "quote.key").exists() else None
