"""Messages as bytes where copying them costs too much: RunRequest, RunResponse, Exit, which are on every exit's path.

RunRequest and RunResponse hold one message, an Enter or an Exit, as their field 1. Putting a message into another one
copies it; writing the field's header before its bytes costs a fraction of that. For the same reason what makes an Exit
makes its bytes: it is only ever sent.
"""

from __future__ import annotations

from collections.abc import Iterable


def varint(value: int) -> bytes:
    """A number that is not negative, in protobuf's encoding: 7 bits a byte, the lowest first."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    if value < 0x20_0000:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    return bytes((value & 0x7F | 0x80,)) + varint(value >> 7)


_FIELD_1 = b"\x0a"  # of RunRequest and RunResponse: length-delimited
_SEQUENCE = b"\x18"  # field 3 of Exit: a varint


def framed(message: bytes) -> bytes:
    """The RunRequest of a serialized Enter, or the RunResponse of a serialized Exit."""
    return _FIELD_1 + varint(len(message)) + message


def repeated(number: int, messages: Iterable[bytes]) -> bytes:
    """A message whose only field, of that number, is or are these serialized messages."""
    tag = varint(number << 3 | 2)  # length-delimited
    return b"".join(part for message in messages for part in (tag, varint(len(message)), message))


def numbered(exit_: bytes, sequence: int) -> bytes:
    """A serialized Exit with its number added."""
    return exit_ + _SEQUENCE + varint(sequence)
