"""Byte layouts of hypercall inputs (TLFS, "Hypercall Reference"), little-endian, as pure codecs.

Each decoder takes exactly the bytes of its structure; the caller has bounded them. A decoder keeps reserved fields, so
that the rule which wants them zero can be one of the call's rules.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, Self

from vtlab.v1.registers_pb2 import RegisterName, RegisterValue, Segment, TableRegister


class EnablePartitionVtlInput(NamedTuple):
    """HvCallEnablePartitionVtl: partition u64@0, vtl u8@8, flags u8@9, reserved 6."""

    partition: int
    vtl: int
    flags: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*struct.unpack("<QBB6x", data))

    def encode(self) -> bytes:
        return struct.pack("<QBB6x", *self)


ENABLE_PARTITION_VTL_SIZE: Final = 16


class VpHeader(NamedTuple):
    """Start of the calls that name a VP and a level: partition u64@0, vp u32@8, vtl u8@12, reserved 3."""

    partition: int
    vp_index: int
    vtl: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*struct.unpack("<QIB3x", data))

    def encode(self) -> bytes:
        return struct.pack("<QIB3x", *self)


VP_HEADER_SIZE: Final = 16


class ModifyProtectionHeader(NamedTuple):
    """HvCallModifyVtlProtectionMask: partition u64@0, map_flags u32@8, HV_INPUT_VTL u8@12; u64 pages @16."""

    partition: int
    map_flags: int
    input_vtl: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*struct.unpack("<QIB3x", data))

    def encode(self) -> bytes:
        return struct.pack("<QIB3x", *self)


class TranslateInput(NamedTuple):
    """HvCallTranslateVirtualAddress(Ex): partition u64@0, vp u32@8, reserved u32@12, flags u64@16, gva page u64@24."""

    partition: int
    vp_index: int
    flags: int
    page: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*struct.unpack("<QI4xQQ", data))

    def encode(self) -> bytes:
        return struct.pack("<QI4xQQ", *self)


TRANSLATE_INPUT_SIZE: Final = 32


class ClusterIpi(NamedTuple):
    """HvCallSendSyntheticClusterIpi(Ex): vector u32@0, HV_INPUT_VTL u8@4, flags u8@5, reserved u16@6; VP set @8."""

    vector: int
    input_vtl: int
    flags: int
    reserved: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*struct.unpack("<IBBH", data))

    def encode(self) -> bytes:
        return struct.pack("<IBBH", *self)


CLUSTER_IPI_SIZE: Final = 8


class InstallInterceptInput(NamedTuple):
    """HvCallInstallIntercept: partition u64@0, access mask u32@8, type u32@12, parameters u64@16."""

    partition: int
    access: int
    kind: int
    parameter: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*struct.unpack("<QIIQ", data))

    def encode(self) -> bytes:
        return struct.pack("<QIIQ", *self)


INSTALL_INTERCEPT_SIZE: Final = 24

SPARSE_VP_SET: Final = 0
ALL_VPS_SET: Final = 1


def decode_vp_set(data: bytes, banks: bytes) -> set[int] | None:
    """HV_VP_SET: format u64@0, valid banks u64@8, then one u64 a bank; None if it makes no sense or means all VPs."""
    form, valid = struct.unpack("<QQ", data)
    if form != SPARSE_VP_SET or len(banks) != 8 * valid.bit_count():
        return None
    words = struct.unpack(f"<{len(banks) // 8}Q", banks)
    numbers = [number for number in range(64) if valid >> number & 1]
    return {64 * bank + bit for bank, word in zip(numbers, words, strict=True) for bit in range(64) if word >> bit & 1}


class RegisterAssociation(NamedTuple):
    """Element of HvCallSetVpRegisters: name u32@0, reserved 12, value 16 bytes @16."""

    name: int
    value: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        name, value = struct.unpack("<I12x16s", data)
        return cls(name, int.from_bytes(value, "little"))

    def encode(self) -> bytes:
        return struct.pack("<I12x16s", self.name, self.value.to_bytes(16, "little"))


REGISTER_ASSOCIATION_SIZE: Final = 32
REGISTER_VALUE_SIZE: Final = 16

_N = RegisterName
_SEGMENT = struct.Struct("<QIHH")
_TABLE = struct.Struct("<6xHQ")
_WORD = struct.Struct("<Q")

# (register, offset) in the initial VP context; the PAT MSR follows at PAT_OFFSET.
_WORDS = (
    (_N.REGISTER_NAME_RIP, 0),
    (_N.REGISTER_NAME_RSP, 8),
    (_N.REGISTER_NAME_RFLAGS, 16),
    (_N.REGISTER_NAME_EFER, 184),
    (_N.REGISTER_NAME_CR0, 192),
    (_N.REGISTER_NAME_CR3, 200),
    (_N.REGISTER_NAME_CR4, 208),
)
_SEGMENTS = (
    (_N.REGISTER_NAME_CS, 24),
    (_N.REGISTER_NAME_DS, 40),
    (_N.REGISTER_NAME_ES, 56),
    (_N.REGISTER_NAME_FS, 72),
    (_N.REGISTER_NAME_GS, 88),
    (_N.REGISTER_NAME_SS, 104),
    (_N.REGISTER_NAME_TR, 120),
    (_N.REGISTER_NAME_LDTR, 136),
)
_TABLES = ((_N.REGISTER_NAME_IDTR, 152), (_N.REGISTER_NAME_GDTR, 168))
PAT_OFFSET: Final = 216
INITIAL_VP_CONTEXT_SIZE: Final = 224


def decode_segment(data: bytes) -> Segment:
    """HV_X64_SEGMENT_REGISTER: base u64@0, limit u32@8, selector u16@12, attributes u16@14."""
    base, limit, selector, attributes = _SEGMENT.unpack(data)
    return Segment(base=base, limit=limit, selector=selector, attributes=attributes)


def encode_segment(segment: Segment) -> bytes:
    return _SEGMENT.pack(segment.base, segment.limit, segment.selector, segment.attributes)


def decode_table(data: bytes) -> TableRegister:
    """HV_X64_TABLE_REGISTER: padding 6, limit u16@6, base u64@8."""
    limit, base = _TABLE.unpack(data)
    return TableRegister(limit=limit, base=base)


def encode_table(table: TableRegister) -> bytes:
    return _TABLE.pack(table.limit, table.base)


def decode_initial_vp_context(data: bytes) -> tuple[list[RegisterValue], int]:
    """The 224-byte initial context of a VTL: its registers, ready to be an enter's updates, and the PAT MSR."""
    if len(data) != INITIAL_VP_CONTEXT_SIZE:
        raise ValueError(f"initial VP context: {len(data)} bytes, not {INITIAL_VP_CONTEXT_SIZE}")
    values = [RegisterValue(name=name, value=_WORD.unpack_from(data, offset)[0]) for name, offset in _WORDS]
    for name, offset in _SEGMENTS:
        values.append(RegisterValue(name=name, segment=decode_segment(data[offset : offset + _SEGMENT.size])))
    for name, offset in _TABLES:
        values.append(RegisterValue(name=name, table=decode_table(data[offset : offset + _TABLE.size])))
    return values, _WORD.unpack_from(data, PAT_OFFSET)[0]


def encode_initial_vp_context(values: list[RegisterValue], pat: int) -> bytes:
    """The inverse; registers that are not in `values` are zero, others than those of the context raise KeyError."""
    words, segments, tables = dict(_WORDS), dict(_SEGMENTS), dict(_TABLES)
    context = bytearray(INITIAL_VP_CONTEXT_SIZE)
    _WORD.pack_into(context, PAT_OFFSET, pat)
    for item in values:
        if item.name in words:
            _WORD.pack_into(context, words[item.name], item.value)
        elif item.name in segments:
            offset = segments[item.name]
            context[offset : offset + _SEGMENT.size] = encode_segment(item.segment)
        else:
            offset = tables[item.name]
            context[offset : offset + _TABLE.size] = encode_table(item.table)
    return bytes(context)


# Fields of the VP assist page that a VTL switch uses.
ASSIST_ENTRY_REASON_OFFSET: Final = 8
ASSIST_VINA_OFFSET: Final = 12
ASSIST_RETURN_RAX_OFFSET: Final = 16
ASSIST_RETURN_RCX_OFFSET: Final = 24
ENTRY_REASON_VTL_CALL: Final = 1
ENTRY_REASON_INTERRUPT: Final = 2
