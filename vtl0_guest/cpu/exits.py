"""Building exit values. Registers are packed as protobuf bytes at once, which costs less than thirty assignments."""

from __future__ import annotations

import struct
from functools import lru_cache

from vtl0_guest.cpu import layout
from vtl0_guest.cpu.environment import Environment, Seg, SegmentState, decode_segment
from vtlab.run_messages import varint
from vtlab.v1 import registers_pb2, vcpu_pb2

_CR, _EFER = layout.CR // 8, layout.EFER // 8
_GENERAL = struct.Struct("<18Q")  # the general registers, RIP and RFLAGS, as they lie in the structure


def _tag(number: int, wire_type: int) -> bytes:
    value = number << 3 | wire_type
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])


# Registers.rax … Registers.efer, fields 1 to 24 in order, each a tag and a fixed64.
_FIXED64 = [int.from_bytes(_tag(number, 1), "little") for number in range(1, 25)]
_PACKED = struct.Struct("<" + "BQ" * 15 + "HQ" * 9)
_EMPTY = [word for tag in _FIXED64 for word in (tag, 0)]
# CS, SS and DS lie side by side in the structure.
_SEGMENTS_FIRST = layout.SEGMENTS + Seg.CS * layout.SEGMENT_SIZE
_SEGMENTS_LAST = layout.SEGMENTS + (Seg.DS + 1) * layout.SEGMENT_SIZE
_SEGMENT_TAGS = (_tag(25, 2), _tag(26, 2), _tag(27, 2))
_CPL, _SHADOW = _tag(28, 0), _tag(29, 0)
# By the low hidden flags: CPL in bits 1:0, the interrupt shadow in bit 3.
_TAILS = [_CPL + bytes([low & 3]) + _SHADOW + bytes([low >> 3 & 1]) for low in range(16)]

# Of Exit: fields 4, 5 and 6.
_REGISTERS, _INSTRUCTION, _INSTRUCTION_LENGTH = _tag(4, 2), _tag(5, 2), _tag(6, 0)


def segment_message(segment: SegmentState) -> registers_pb2.Segment:
    return registers_pb2.Segment(
        selector=segment.selector, attributes=segment.attributes, limit=segment.limit, base=segment.base
    )


@lru_cache(maxsize=256)
def _segments_bytes(raw: bytes) -> bytes:
    """Fields cs, ss and ds, from the three registers as they lie in the structure."""
    out = b""
    for number, tag in enumerate(_SEGMENT_TAGS):
        part = raw[number * layout.SEGMENT_SIZE : (number + 1) * layout.SEGMENT_SIZE]
        data = segment_message(decode_segment(part)).SerializeToString()
        out += tag + bytes([len(data)]) + data
    return out


def registers_bytes(environment: Environment, cr8: int) -> bytes:
    """A serialized Registers message of the present state."""
    words, state = environment.words, environment.state
    flat = _EMPTY.copy()
    flat[1:37:2] = _GENERAL.unpack_from(state)
    flat[35] |= 2
    flat[37::2] = (words[_CR], words[_CR + 2], words[_CR + 3], words[_CR + 4], cr8, words[_EFER])
    return (
        _PACKED.pack(*flat)
        + _segments_bytes(bytes(state[_SEGMENTS_FIRST:_SEGMENTS_LAST]))
        + _TAILS[state[layout.HIDDEN_FLAGS] & 0xF]
    )


def common_bytes(origin: bytes, environment: Environment, cr8: int, code: bytes, length: int) -> bytes:
    """What every exit carries, as fields of a serialized Exit; `origin` is from origin_bytes()."""
    registers = registers_bytes(environment, cr8)
    parts = origin + _REGISTERS + varint(len(registers)) + registers
    if code:
        parts += _instruction_bytes(code, length)
    return parts


@lru_cache(maxsize=256)
def _instruction_bytes(code: bytes, length: int) -> bytes:
    code = code[:length] if length else code
    return _INSTRUCTION + bytes((len(code),)) + code + _INSTRUCTION_LENGTH + bytes((length,))


def origin_bytes(vp_index: int, vtl: int) -> bytes:
    """What is the same in all exits of one processor, serialized."""
    return vcpu_pb2.Exit(vp_index=vp_index, vtl=vtl, origin=vcpu_pb2.ORIGIN_VCPU).SerializeToString()
