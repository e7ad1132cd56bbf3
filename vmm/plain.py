"""State that is plain data, as JSON and back: dataclasses of numbers, and lists, sets and dictionaries of numbers.

What a state has more or less than the text keeps its default: a field may be added without a new version.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any


def dump(state: Any) -> bytes:
    """The fields of a dataclass."""
    return json.dumps({field.name: _encode(getattr(state, field.name)) for field in fields(state)}).encode()


def stamp(state: Any) -> tuple[object, ...]:
    """Equal for as long as dump() is, and far cheaper."""
    return tuple([_frozen(getattr(state, name)) for name in state.__dataclass_fields__])


def _frozen(value: Any) -> object:
    if isinstance(value, int):
        return value
    return tuple(value.items() if isinstance(value, dict) else value)


def load(state: Any, text: bytes) -> None:
    """Sets the fields of a dataclass, each with the type that it has now. Raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    for field in fields(state):
        if field.name in found:
            try:
                setattr(state, field.name, _decode(getattr(state, field.name), found[field.name]))
            except TypeError as error:
                raise ValueError(f"{field.name}: {error}") from None


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.items())
    return sorted(value) if isinstance(value, set) else value


def _decode(present: Any, value: Any) -> Any:
    kind = type(present)
    if kind is set:
        return {_hashable(item) for item in value}
    if kind is dict:
        return {_hashable(key): _hashable(item) for key, item in value}
    return kind(value)


def _hashable(item: Any) -> Any:
    """JSON has no tuples: a list within a set or a dictionary was one."""
    return tuple(item) if isinstance(item, list) else item
