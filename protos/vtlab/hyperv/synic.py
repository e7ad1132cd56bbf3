"""The synthetic interrupt controller: layouts of its pages, its MSRs and its messages (TLFS, "Virtual Interrupts",
"Timers", "Inter-Partition Communication"). Little-endian; offsets in bytes.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, Self

SINT_COUNT: Final = 16
TIMER_COUNT: Final = 4
# Vectors below this belong to the processor.
FIRST_VECTOR: Final = 16

# SIMP has 16 slots of 256 bytes: type u32@0 (0: free), payload size u8@4, flags u8@5, reserved u16@6, u64@8 which names
# the sender or port, payload @16.
SLOT_SIZE: Final = 256
MAX_PAYLOAD: Final = 240
SLOT_FLAGS_OFFSET: Final = 5
MESSAGE_PENDING: Final = 1
_HEADER = struct.Struct("<IBBHQ")

# SIEFP: 16 areas of 2048 flags, one bit each.
EVENT_FLAGS_COUNT: Final = 2048


class MessageType(IntEnum):
    """HV_MESSAGE_TYPE. Those with bit 31 set are the hypervisor's own."""

    NONE = 0
    UNMAPPED_GPA = 0x8000_0000
    GPA_INTERCEPT = 0x8000_0001
    TIMER_EXPIRED = 0x8000_0010


FROM_HYPERVISOR: Final = 0x8000_0000


class SintFlags(IntFlag):
    """SINT MSR above the vector [7:0]."""

    MASKED = 1 << 16
    AUTO_EOI = 1 << 17
    # Messages and flags are written, no interrupt is raised.
    POLLING = 1 << 18


SINT_AFTER_RESET: Final = int(SintFlags.MASKED)


class TimerConfig(IntFlag):
    """STIMER CONFIG MSR. Vector for direct mode [11:4], SINT [19:16]."""

    ENABLE = 1 << 0
    PERIODIC = 1 << 1
    # A late expiry may be skipped instead of caught up.
    LAZY = 1 << 2
    # A count that is not zero enables.
    AUTO_ENABLE = 1 << 3
    # Raises the vector itself; no message.
    DIRECT = 1 << 12


def timer_vector(config: int) -> int:
    return config >> 4 & 0xFF


def timer_sint(config: int) -> int:
    return config >> 16 & 0xF


class SlotHeader(NamedTuple):
    """First 16 bytes of a message slot."""

    type: int
    size: int
    flags: int
    reserved: int
    origin: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_HEADER.unpack(data[: _HEADER.size]))


def encode_message(type_: int, origin: int, payload: bytes, *, more: bool = False) -> bytes:
    """A whole slot; `more` sets MessagePending. Raises ValueError for a payload of more than 240 bytes."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a message of {len(payload)} bytes, more than {MAX_PAYLOAD}")
    header = _HEADER.pack(type_, len(payload), MESSAGE_PENDING if more else 0, 0, origin)
    return (header + payload).ljust(SLOT_SIZE, b"\0")


class TimerPayload(NamedTuple):
    """HV_TIMER_MESSAGE_PAYLOAD: index u32@0, reserved u32, expiration u64@8, delivery u64@16; units of 100 ns."""

    timer: int
    expiration: int
    delivery: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*struct.unpack("<I4xQQ", data))

    def encode(self) -> bytes:
        return struct.pack("<I4xQQ", *self)
