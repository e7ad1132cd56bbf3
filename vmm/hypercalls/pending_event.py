"""HvX64RegisterPendingEvent0: an exception that a higher level has a lower one take. Pure.

Layout of the 128 bits: pending [0], type [3:1] (0: exception), deliver error code [8], vector [31:16], error code
[63:32], parameter [127:64] (for #PF, the address).
"""

from __future__ import annotations

from vtlab.v1.vcpu_pb2 import Exception as GuestException
from vtlab.x86.registers import VECTORS_WITH_ERROR_CODE, Vector

_PENDING, _DELIVER_ERROR = 1, 1 << 8
_LAST_EXCEPTION = 31
_LOW = 0xFFFF_FFFF


class IllegalEvent(ValueError):
    """The value names no event that can be pending."""


def decode(value: int) -> GuestException | None:
    """The exception; None where nothing is pending. Raises IllegalEvent."""
    if not value & _PENDING:
        return None
    vector = value >> 16 & 0xFFFF
    has_error = bool(value & _DELIVER_ERROR)
    if value >> 1 & 7 or vector > _LAST_EXCEPTION or vector == Vector.NMI:
        raise IllegalEvent(value)
    if has_error and vector not in VECTORS_WITH_ERROR_CODE:
        raise IllegalEvent(value)
    exception = GuestException(vector=vector, address=value >> 64 if vector == Vector.PF else 0)
    if has_error:
        exception.error_code = value >> 32 & _LOW
    return exception
