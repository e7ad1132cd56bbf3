"""Names of protobuf enum values for people, also of values that no .proto file of ours has."""

from __future__ import annotations

from typing import Any


def name_of(kind: Any, value: int) -> str:
    """The name of a value of an enum, or its number: proto3 keeps what it does not know, and a peer may be hostile."""
    try:
        return str(kind.Name(value))
    except ValueError:
        return str(value)
