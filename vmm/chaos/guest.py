"""The guest of the chaos runs (vtl0_guest/kernels/chaos): its image, where it keeps what it saw, its policy."""

from __future__ import annotations

import struct
from importlib.resources import files
from typing import NamedTuple

LOAD = 0x10_0000
PROCESSORS_OFFSET = 8  # of the image: a u32, the number of vCPUs
STATUS, STATUS_SIZE = 0x20_0000, 0x1000
GO = 0x21_0008
SEALED, PRIVATE = 0x30_0000, 0x30_1000
PAGE = 0x1000
SEALED_PATTERN = bytes([0x11]) * PAGE
READY = "chaos: ready"
MAX_PROCESSORS = 16
MULTIPLIER = 0x5851_F42D_4C95_7F2D
_WORD = (1 << 64) - 1

KINDS = (
    "a sealed page was written",
    "VTL1's memory was read",
    "data was executed",
    "CR4.SMEP was cleared",
    "CR0.WP was cleared",
    "LSTAR was changed",
    "IDTR was changed",
    "a page table was written",
    "VTL0 gave itself rights",
)
"""What the bits of Status.kinds say."""

POLICY = f"""\
version: 1
name: chaos
registers:
  cr0: {{must_be_1: [PE, PG, WP]}}
  cr4: {{must_be_1: [PAE, SMEP], watched: [TSD]}}
  cr3: page_tables
  gdtr: frozen
  idtr: frozen
msrs: {{LSTAR: frozen}}
memory:
  - {{name: text, gpa: {LOAD:#x}, size: {PAGE:#x}, access: r-x}}
  - {{name: sealed, gpa: {SEALED:#x}, size: {PAGE:#x}, access: r--}}
  - {{name: vtl1, gpa: {PRIVATE:#x}, size: {PAGE:#x}, access: ---, private: true}}
  - {{name: everything else, default: true, access: rw-, execute: none}}
page_tables: {{guard: true}}
violation: {{default: gp}}
"""

_STATUS = struct.Struct("<8Q")


class Status(NamedTuple):
    """Status page of one vCPU.

    Attributes:
        rounds: done.
        hash: chained over all counts; see following().
        faults: exceptions taken.
        windows: forbidden operations that succeeded.
        kinds: set of their kinds, see KINDS.
        doubled: exits that did not take effect exactly once.
        logged: lines written.
        attempts: rounds of all forbidden operations.
    """

    rounds: int
    hash: int
    faults: int
    windows: int
    kinds: int
    doubled: int
    logged: int
    attempts: int

    @classmethod
    def decode(cls, page: bytes) -> Status:
        return cls(*_STATUS.unpack_from(page))


def image(processors: int) -> bytes:
    """For so many vCPUs; flat, at LOAD, started there in long mode."""
    data = bytearray(files("vtl0_guest.kernels").joinpath("chaos", "chaos.bin").read_bytes())
    data[PROCESSORS_OFFSET : PROCESSORS_OFFSET + 4] = processors.to_bytes(4, "little")
    return bytes(data)


def following(hash_: int, count: int) -> int:
    """The hash after round number `count`, from that before it; both begin at 0."""
    return (hash_ * MULTIPLIER + count) & _WORD


def log_line(number: int) -> str:
    return f"N{number & 0xFFFF_FFFF:08x}\n"
