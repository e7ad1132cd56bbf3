"""Where things are in the guest: its layout.h in Python (a test compares them), and pages for rows."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

REPORT: Final = 0x300000
REPORT_SIZE: Final = 0x10000
BEFORE: Final = 0x000
AFTER: Final = 0x100
ENTERED: Final = 0x200
LEAVING: Final = 0x300
STATUS: Final = 0x400
MESSAGE_COUNT: Final = 0x440
MESSAGE: Final = 0x480
COUNTERS: Final = 0x800
ASSIST_PAGE: Final = 0x1000
MESSAGE_PAGE: Final = 0x2000
EVENT_PAGE: Final = 0x3000
HYPERCALL_PAGE: Final = 0x4000
USER_VIEW: Final = 0x8000000000
USER_RETURN: Final = 0x80
INTERCEPT_VECTOR: Final = 0x41
KERNEL_CODE: Final = 0x08
CPU_PAGE: Final = 56
CPU_CALL: Final = 64
CPU_RETURN: Final = 72

RAM: Final = 32 << 20
"""Bytes that the guest needs."""


class Op(IntEnum):
    """Records of the table."""

    ROW = 0
    PUT = 1
    SEE = 2
    RUN = 3
    CONTEXT = 4
    ANSWER = 5
    DELAY = 6
    JOIN = 7
    END = 255


class Flag(IntFlag):
    """Of a record."""

    USER = 1
    PAGE = 2
    WAIT = 4
    ASYNC = 8


class Answer(IntFlag):
    """What VTL1 does after it took an interrupt; ALWAYS: also where that brought no message."""

    NOTHING = 0
    SKIP = 1
    OPEN = 2
    EVENT = 3
    GO = 4
    UNWATCH = 5
    ALWAYS = 16


# Pages of rows. Each vCPU has its own for inputs, outputs and code.
WORK: Final = 0x400000
WORK_SIZE: Final = 0x10000
CODE_PAGE: Final = 0x2000
PAGES: Final = 0x800000
"""Memory for rows that protect some: 256 pages."""
NO_RAM: Final = 0x80_0000_0000 >> 12
"""Number of a page where no memory is."""


def input_page(vp: int) -> int:
    return WORK + vp * WORK_SIZE


def output_page(vp: int) -> int:
    return WORK + vp * WORK_SIZE + 0x1000


def code_page(vp: int) -> int:
    return WORK + vp * WORK_SIZE + CODE_PAGE


def page(number: int) -> int:
    """Address of a page for rows that protect some."""
    return PAGES + number * 0x1000


def report(vtl: int, vp: int = 0) -> int:
    """Address of a level's report."""
    return REPORT + (2 * vp + vtl) * REPORT_SIZE


def counter(vector: int, vtl: int, vp: int = 0) -> int:
    """Address of the u32 that counts a vector."""
    return report(vtl, vp) + COUNTERS + 4 * vector
