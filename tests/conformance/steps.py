"""What rows are made of: steps at a level of a vCPU, each a record of the table that the guest interprets. Pure.

A record is op u8, flags u8, vtl u8, vp u8, size u32 (all of it, a multiple of 8), then 64-bit words and bytes.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Final

from vtlab_conformance.layout import Answer, Flag, Op

NO_VECTOR: Final = 0xFFFF_FFFF
_HEADER = struct.Struct("<BBBBI")
_WORD = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """Attributes:
    vtl, vp: where it is done.
    together: False: nobody waits for it, on another vCPU.
    """

    vtl: int = 0
    vp: int = 0
    together: bool = True

    @property
    @abstractmethod
    def op(self) -> Op: ...

    def flags(self) -> Flag:
        return Flag(0)

    @abstractmethod
    def payload(self) -> bytes: ...

    def encode(self) -> bytes:
        flags = self.flags() | (Flag(0) if self.together else Flag.ASYNC)
        return record(self.op, self.payload(), flags, self.vtl, self.vp)


def record(op: Op, payload: bytes = b"", flags: int = 0, vtl: int = 0, vp: int = 0) -> bytes:
    padded = payload.ljust(-(-len(payload) // 8) * 8, b"\0")
    return _HEADER.pack(op, flags, vtl, vp, _HEADER.size + len(padded)) + padded


@dataclass(frozen=True, kw_only=True)
class Put(Step):
    """Writes bytes."""

    at: int
    data: bytes
    op = Op.PUT

    def payload(self) -> bytes:
        return struct.pack("<QQ", self.at, len(self.data)) + self.data


@dataclass(frozen=True, kw_only=True)
class See(Step):
    """Memory has that value under that mask. `wait`: until it has, for ten seconds, with interrupts open."""

    at: int
    value: bytes
    mask: bytes = b""
    wait: bool = False
    op = Op.SEE

    def flags(self) -> Flag:
        return Flag.WAIT if self.wait else Flag(0)

    def payload(self) -> bytes:
        mask = self.mask or b"\xff" * len(self.value)
        value = bytes(a & b for a, b in zip(self.value, mask, strict=True))
        return struct.pack("<QQ", self.at, len(value)) + mask + value


@dataclass(frozen=True, kw_only=True)
class Run(Step):
    """Calls code with registers; it ends by RET or by an exception.

    Attributes:
        address: of the code; `page`: counted from the level's hypercall page.
        user: at CPL3, where INT 0x80 ends it.
        value, mask: of RAX then.
        vector: exception that ends it.
        code, status: the hypercall that it makes and what that gives, for the report.
    """

    address: int = 0
    page: bool = False
    user: bool = False
    rcx: int = 0
    rdx: int = 0
    r8: int = 0
    rax: int = 0
    mask: int = 0
    value: int = 0
    vector: int = NO_VECTOR
    code: int | None = None
    status: int = 0
    op = Op.RUN

    def flags(self) -> Flag:
        return (Flag.PAGE if self.page else Flag(0)) | (Flag.USER if self.user else Flag(0))

    def payload(self) -> bytes:
        words = (self.address, self.rcx, self.rdx, self.r8, self.rax, self.mask, self.value & self.mask, self.vector)
        return struct.pack("<8Q", *(word & _WORD for word in words))


@dataclass(frozen=True, kw_only=True)
class Context(Step):
    """Writes the initial context (224 bytes) with which the guest's own code starts at a level of a vCPU."""

    at: int
    of_vp: int
    of_vtl: int
    op = Op.CONTEXT

    def payload(self) -> bytes:
        return struct.pack("<QQ", self.at, self.of_vp | self.of_vtl << 32)


@dataclass(frozen=True, kw_only=True)
class SetAnswer(Step):
    """What VTL1 of that vCPU does from now on after an interrupt."""

    answer: Answer
    value: int = 0
    vtl: int = 1
    op = Op.ANSWER

    def payload(self) -> bytes:
        return struct.pack("<QQ", self.answer, self.value & _WORD)


@dataclass(frozen=True, kw_only=True)
class Delay(Step):
    """Spins, in units of 100 ns of the reference time."""

    duration: int
    op = Op.DELAY

    def payload(self) -> bytes:
        return struct.pack("<Q", self.duration)


@dataclass(frozen=True, kw_only=True)
class Join(Step):
    """Waits until another vCPU has done its steps."""

    of_vp: int
    op = Op.JOIN

    def payload(self) -> bytes:
        return struct.pack("<Q", self.of_vp)


@dataclass(frozen=True)
class Row:
    """One rule.

    Attributes:
        name: unique, section first.
        section: of the facts, as docs/conformance.md groups them.
        rule: the sentence.
        source: who says so.
        steps: what shows it.
    """

    name: str
    section: str
    rule: str
    source: str
    steps: tuple[Step, ...] = field(repr=False)

    def pairs(self) -> set[tuple[int, int]]:
        """Hypercalls and the statuses that they must give here."""
        return {(step.code, step.status) for step in self.steps if isinstance(step, Run) and step.code is not None}

    def encode(self) -> bytes:
        return record(Op.ROW, self.name.encode() + b"\0") + b"".join(step.encode() for step in self.steps)


def broken(row: Row) -> Row:
    """The row with a wrong expectation: for the test that rows can fail."""
    for number, step in enumerate(row.steps):
        if isinstance(step, Run) and step.mask:
            wrong = replace(step, value=step.value ^ 1)
            return replace(row, steps=(*row.steps[:number], wrong, *row.steps[number + 1 :]))
    raise ValueError(f"{row.name} expects no result")
