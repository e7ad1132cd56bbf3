"""CHALLENGE and AUTHENTICATE: after lock VTL0 proves its right to one named action, once. The policy stays closed."""

from __future__ import annotations

import errno

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from vtl1_monitor.services.call import EKEYREJECTED, Call, Refused
from vtlab.services import AUTHENTICATE_CONTEXT, AUTHENTICATE_REQUEST

MAX_GRANTS = 64


def challenge(call: Call) -> int:
    """(pa of 32 bytes): writes a fresh nonce where VTL0 itself could write."""
    call.machine.memory.write(call.first, call.machine.secrets.fresh_nonce())
    return 0


def authenticate(call: Call) -> int:
    """(pa, size): checks the proof. The nonce is void afterwards, whether it holds or not."""
    machine = call.machine
    if call.second != AUTHENTICATE_REQUEST.size:
        raise Refused(errno.EINVAL, f"request of {call.second} bytes")
    padded, proof = AUTHENTICATE_REQUEST.unpack(machine.memory.read(call.first, call.second))
    nonce = machine.secrets.take_nonce()
    if nonce is None:
        raise Refused(errno.EPERM, "no challenge is open")
    name = padded.rstrip(b"\0").decode("ascii", "replace")
    action = machine.rules.actions.get(name)
    if action is None:
        raise Refused(errno.ENOENT, f"no action {name!r}")
    if len(machine.grants) >= MAX_GRANTS:
        raise Refused(errno.ERANGE, f"{MAX_GRANTS} grants are unused")
    try:
        Ed25519PublicKey.from_public_bytes(action.public_key).verify(proof, AUTHENTICATE_CONTEXT + nonce + padded)
    except (InvalidSignature, ValueError):
        raise Refused(EKEYREJECTED, f"action {name}: the proof does not hold") from None
    machine.grants.append(action)
    return 0
