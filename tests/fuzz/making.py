"""Messages for any entry point, made and changed by their descriptors, so that a new field is fuzzed without a change.

Half of the speed of a run is here: what a type's fields are is worked out once, and a message is changed as a value and
not as bytes, so that it still parses and reaches what is behind the parser. Bytes are damaged too, by mutated().
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.fuzz.target import mutated

RAM = 2 << 20
_TEXTS = ["", "vm", "other", "native", "kvm", "openvmm", "policy", "../x", "a" * 300, "\u2603"]
_NUMBERS = [
    0,
    0,
    1,
    1,
    2,
    3,
    4,
    63,
    64,
    4096,
    RAM,
    RAM - 8,
    1 << 20,
    0x7FFF_FFFF,
    (1 << 32) - 1,
    1 << 40,
    (1 << 64) - 1,
]
_MASKS = [(1 << bits) - 1 for bits in (4, 16, 31, 63, 64)]
_SIZES = (0, 1, 8, 32, 96, 300)
_DEPTH = 4
_MOST_SEEDS = 200

_SIGNED = {FieldDescriptor.CPPTYPE_INT32: 31, FieldDescriptor.CPPTYPE_INT64: 63}
_UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32: 32, FieldDescriptor.CPPTYPE_UINT64: 64}

Known = Mapping[str, Sequence[Any]]


class _Field(NamedTuple):
    name: str
    repeated: bool
    inner: type[Message] | None
    value: Callable[[random.Random], Any]
    oneof: str


def _number(bits: int) -> Callable[[random.Random], int]:
    most = (1 << bits) - 1

    def value(rng: random.Random) -> int:
        number = rng.choice(_NUMBERS) if rng.random() < 0.8 else rng.getrandbits(64)
        return number & rng.choice(_MASKS) & most

    return value


def _enum(field: Any) -> Callable[[random.Random], int]:
    numbers = [one.number for one in field.enum_type.values]
    odd = [99, -1, 1 << 30]
    return lambda rng: rng.choice(numbers) if rng.random() < 0.9 else rng.choice(odd)


def _maker(field: Any) -> Callable[[random.Random], Any]:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return _enum(field)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return lambda rng: rng.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return lambda rng: rng.randbytes(rng.choice(_SIZES))
        return lambda rng: rng.choice(_TEXTS)
    return _number(_SIGNED.get(kind) or _UNSIGNED[kind])


_known_fields: dict[Any, tuple[list[_Field], list[list[_Field]]]] = {}


def _fields(kind: type[Message]) -> tuple[list[_Field], list[list[_Field]]]:
    """The fields of a type that stand alone, and the groups of which one is set."""
    known = _known_fields.get(kind)
    if known is None:
        found = _find_fields(kind)
        groups: dict[str, list[_Field]] = {}
        for field in found:
            if field.oneof:
                groups.setdefault(field.oneof, []).append(field)
        known = _known_fields[kind] = ([field for field in found if not field.oneof], [*groups.values()])
    return known


def _find_fields(kind: type[Message]) -> list[_Field]:
    found = []
    for field in kind.DESCRIPTOR.fields:
        inner: Any = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            continue
        made = inner._concrete_class if inner is not None else None
        value = _maker(field) if inner is None else lambda _rng: None
        oneof = field.containing_oneof.name if field.containing_oneof is not None else ""
        found.append(_Field(field.name, field.is_repeated, made, value, oneof))
    return found


class Maker:
    """Messages of one type, and what bytes came out of them so far as seeds of others.

    `known` gives for names of fields the values that lead somewhere; they are taken seven times in ten.
    """

    def __init__(self, kind: type[Message], known: Known | None = None) -> None:
        self._kind = kind
        self._known = known or {}
        self._seeds: list[bytes] = []

    def data(self, rng: random.Random, damaged: float = 0.2) -> bytes:
        """Bytes of a message, or bytes that were one until they were damaged."""
        if rng.random() < damaged and self._seeds:
            return mutated(rng, self._seeds, 1 << 14)
        return bytes(self.message(rng).SerializeToString())

    def message(self, rng: random.Random) -> Any:
        """A new message, or one of before with a few fields changed."""
        seeds = self._seeds
        if len(seeds) < 20 or rng.random() < 0.25:
            message = self._kind()
            self._fill(rng, message, _DEPTH)
            data = message.SerializeToString()
            if len(seeds) < _MOST_SEEDS:
                seeds.append(data)
            else:
                seeds[rng.randrange(_MOST_SEEDS)] = data
            return message
        message = self._kind.FromString(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 4))):
            self._change(rng, message, _DEPTH)
        return message

    def _fill(self, rng: random.Random, message: Message, depth: int) -> None:
        alone, groups = _fields(type(message))
        for field in alone:
            if rng.random() < 0.45:
                for _ in range(rng.choice((1, 2, 5)) if field.repeated else 1):
                    self._set(rng, message, field, depth)
        for group in groups:
            if rng.random() < 0.9:
                self._set(rng, message, rng.choice(group), depth)

    def _change(self, rng: random.Random, message: Message, depth: int) -> None:
        """One field, here or further down."""
        alone, groups = _fields(type(message))
        at = rng.randrange(len(alone) + len(groups)) if alone or groups else -1
        if at < 0:
            return
        field = alone[at] if at < len(alone) else self._present(rng, message, groups[at - len(alone)])
        if field.inner is not None and depth and rng.random() < 0.7:
            place = getattr(message, field.name)
            if field.repeated and place:
                self._change(rng, rng.choice(place), depth - 1)
                return
            if not field.repeated and message.HasField(field.name):
                self._change(rng, place, depth - 1)
                return
        if rng.random() < 0.15:
            message.ClearField(field.name)
        else:
            self._set(rng, message, field, depth)

    @staticmethod
    def _present(rng: random.Random, message: Message, group: list[_Field]) -> _Field:
        """The field of a group that is set, mostly; else any of it."""
        name = message.WhichOneof(group[0].oneof)
        found = [field for field in group if field.name == name]
        return found[0] if found and rng.random() < 0.8 else rng.choice(group)

    def _set(self, rng: random.Random, message: Message, field: _Field, depth: int) -> None:
        place = getattr(message, field.name)
        if field.inner is not None:
            if depth:
                inner = place.add() if field.repeated else place
                inner.SetInParent()
                self._fill(rng, inner, depth - 1)
            return
        known = self._known.get(field.name)
        value = rng.choice(known) if known and rng.random() < 0.7 else field.value(rng)
        if field.repeated:
            place.append(value)
        else:
            setattr(message, field.name, value)
