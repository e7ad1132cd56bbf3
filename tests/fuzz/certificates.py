"""What is read of certificates: a caller's, lists of revoked ones, and those that vouch for quotes."""

from __future__ import annotations

import base64
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from tests.fuzz.target import Defect, Target, mutated
from tests.unit.monitor import keys
from vtlab.attestation import Wanted, signed_bytes, verify
from vtlab.errors import BadArgument, PermissionDenied, VtlabError
from vtlab.trust import rotation
from vtlab.trust.__main__ import main as trust_main
from vtlab.trust.certificates import URI_PREFIX, ensure_trust
from vtlab.trust.interceptor import role_of_peer
from vtlab.trust.revocation import Revocations
from vtlab.trust.roles import Role
from vtlab.v1.monitor_pb2 import Quote, SignedQuote

_CERTIFICATE, _LIST = "CERTIFICATE", "X509 CRL"


def _der(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(line for line in pem.splitlines() if not line.startswith(b"-----")))


def _pem(der: bytes, kind: str) -> bytes:
    return f"-----BEGIN {kind}-----\n".encode() + base64.encodebytes(der) + f"-----END {kind}-----\n".encode()


class CertificateTarget(Target):
    """Nothing but our own errors comes out, and nothing that was changed passes for what it was."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtlab-fuzz-")
        trust = ensure_trust(Path(self._folder.name) / "trust")
        trust_main([str(trust), "--revoke", str(trust / "observer" / "observer.pem")])
        self._own = trust / "vmm"
        self._revoked, self._good = ((trust / role / f"{role}.pem").read_bytes() for role in ("observer", "operator"))
        self._authority = (trust / "ca" / "ca.pem").read_bytes()
        self._list = _der((self._own / "crl.pem").read_bytes())
        self._quote_certificate = (trust / "monitor" / "quote.pem").read_bytes()
        self._certificates = [
            *map(_der, (self._quote_certificate, self._good, self._authority)),
            keys.der("fuzz"),
        ]
        self._quote = self._signed((trust / "monitor" / "quote.key").read_bytes())
        self._scratch = Path(self._folder.name) / "scratch"
        self._forms: tuple[Callable[[random.Random], str], ...] = (
            self._revocation_list,
            self._caller,
            self._vouching,
            self._names,
            self._serial,
        )

    def _signed(self, key: bytes) -> SignedQuote:
        loaded = load_pem_private_key(key, None)
        assert isinstance(loaded, Ed25519PrivateKey)
        quote = Quote(vm="fuzz", nonce=bytes(16)).SerializeToString()
        return SignedQuote(quote=quote, signature=loaded.sign(signed_bytes(quote)), certificate=self._quote_certificate)

    def step(self, rng: random.Random) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's opinion of what it still reads
            return rng.choice(self._forms)(rng)

    def close(self) -> None:
        self._folder.cleanup()

    def _revocation_list(self, rng: random.Random) -> str:
        changed = mutated(rng, [self._list])
        (self._own / "crl.pem").write_bytes(_text(rng, changed, _LIST))
        try:
            Revocations(self._own).check(self._revoked)
        except PermissionDenied as error:
            return "revoked" if "was revoked" in error.detail else "nobody is let in"
        raise Defect("who was revoked is let in by a list that was changed")

    def _caller(self, rng: random.Random) -> str:
        (self._own / "crl.pem").write_bytes(_pem(self._list, _LIST))
        changed = _text(rng, mutated(rng, self._certificates), _CERTIFICATE)
        try:
            Revocations(self._own).check(changed)
        except PermissionDenied:
            return "caller refused"
        return "caller let in"

    def _vouching(self, rng: random.Random) -> str:
        changed = SignedQuote()
        changed.CopyFrom(self._quote)
        field = rng.choice(("certificate", "certificate", "signature", "quote"))
        if field == "certificate":
            changed.certificate = _text(rng, mutated(rng, self._certificates), _CERTIFICATE)
        else:
            setattr(changed, field, mutated(rng, [getattr(changed, field)]))
        try:
            verify(changed.SerializeToString(), self._authority, Wanted())
        except VtlabError:
            return "quote refused"
        if changed.signature != self._quote.signature or changed.quote != self._quote.quote:
            raise Defect("a quote that was changed is believed")
        if load_pem_x509_certificate(changed.certificate) != load_pem_x509_certificate(self._quote.certificate):
            raise Defect("a certificate that was changed vouches for a quote")
        return "quote as it was signed"

    def _names(self, rng: random.Random) -> str:
        good = [f"{URI_PREFIX}{role}".encode() for role in Role]
        names = [mutated(rng, good, 256) for _ in range(rng.choice((0, 1, 1, 2, 9)))]
        role = role_of_peer({"peer_uri": names})
        if role is not None and {name for name in names if name.startswith(URI_PREFIX.encode())} != {
            f"{URI_PREFIX}{role}".encode()
        }:
            raise Defect(f"{names} are taken for role {role}")
        return "a role" if role else "no role"

    def _serial(self, rng: random.Random) -> str:
        self._scratch.write_bytes(_text(rng, mutated(rng, self._certificates), _CERTIFICATE))
        try:
            rotation._serial(str(self._scratch))
        except BadArgument:
            return "serial number refused"
        return "serial number"


def _text(rng: random.Random, der: bytes, kind: str) -> bytes:
    """As PEM, and now and then as PEM that was changed itself."""
    pem = _pem(der, kind)
    return mutated(rng, [pem]) if rng.random() < 0.2 else pem
