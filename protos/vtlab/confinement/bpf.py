"""Seccomp filters: a small assembler of classic BPF for them (Linux Documentation/userspace-api/seccomp_filter.rst).

A filter is a table of system calls by number: allowed, or allowed where an argument passes a test. Calls that are in no
table get an error: EPERM for those that this code knows of, ENOSYS for newer ones, so that libraries fall back to what
they did before. Another architecture's calls end the process.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from vtlab.confinement.kernel import system_call

MACHINE = "x86_64"
_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
# The last call in the tables of this package's sources; later ones are not known to be needed or harmful.
LAST_KNOWN = 461

_SECCOMP = 317
_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
# All threads; and no switch of speculation controls, which would slow the core down on kernels before 5.16.
_TSYNC, _SPEC_ALLOW = 1, 4
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

_LOAD, _RETURN = 0x20, 0x06
_JUMP, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _AND = 0x05, 0x15, 0x25, 0x35, 0x45, 0x54
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_INSTRUCTION = struct.Struct("<HBBI")
_Step = tuple[int, int, int, int]  # code, jump if true, jump if false, constant
_REFUSE: _Step = (_RETURN, 0, 0, _ERRNO | errno.EPERM)


class Check(Enum):
    """How 32 bits of an argument are looked at."""

    ONE_OF = auto()
    NONE_OF = auto()
    NO_BIT_OF = auto()
    MASKED = auto()
    """(mask, value): what the mask leaves is the value."""


@dataclass(frozen=True)
class Argument:
    """A test of one argument, counted from 0; of its upper half if `high`."""

    index: int
    check: Check
    values: tuple[int, ...]
    high: bool = False


@dataclass(frozen=True)
class Filter:
    """What a process may call.

    Attributes:
        allowed: numbers.
        tested: number -> tests that must all pass.
        absent: numbers that fail with ENOSYS, as on a kernel without them.
    """

    allowed: frozenset[int]
    tested: Mapping[int, tuple[Argument, ...]]
    absent: frozenset[int] = frozenset()


def available() -> bool:
    """Whether this kernel takes filters, and this code knows the machine's numbers."""
    if platform.machine() != MACHINE:
        return False
    try:
        system_call(_SECCOMP, _GET_ACTION_AVAIL, 0, ctypes.byref(ctypes.c_uint32(_KILL_PROCESS)))
    except OSError:
        return False
    return True


def assemble(what: Filter) -> bytes:
    """The program, instructions of 8 bytes."""
    program: list[_Step] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    for number, tests in sorted(what.tested.items()):
        program += _tested(number, tests)
    for number in sorted(what.absent):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for first, last in _runs(what.allowed - what.tested.keys() - what.absent):
        program += [(_GREATER, 2, 0, last), (_AT_LEAST, 0, 1, first), (_RETURN, 0, 0, _ALLOW)]
    program += [
        (_GREATER, 0, 1, LAST_KNOWN),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    return b"".join(_INSTRUCTION.pack(*one) for one in program)


def install(program: bytes) -> None:
    """For every thread of this process and all that it makes. It needs PR_SET_NO_NEW_PRIVS. Raises OSError."""
    count = len(program) // _INSTRUCTION.size
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("<HxxxxxxQ", count, ctypes.addressof(code))
    thread = system_call(_SECCOMP, _SET_MODE_FILTER, _TSYNC | _SPEC_ALLOW, header)
    if thread:
        raise OSError(errno.EBUSY, f"thread {thread} has another filter")


def _tested(number: int, tests: Iterable[Argument]) -> list[_Step]:
    body: list[_Step] = []
    for one in tests:
        body.append((_LOAD, 0, 0, _ARGUMENTS + 8 * one.index + 4 * one.high))
        body += _FORMS[one.check](one.values)
    body.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(body), number), *body]


def _one_of(values: tuple[int, ...]) -> list[_Step]:
    return [(_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)] + [_REFUSE]


def _none_of(values: tuple[int, ...]) -> list[_Step]:
    return [(_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)] + [(_JUMP, 0, 0, 1), _REFUSE]


def _no_bit_of(values: tuple[int, ...]) -> list[_Step]:
    return [(_ANY_BIT, 0, 1, values[0]), _REFUSE]


def _masked(values: tuple[int, ...]) -> list[_Step]:
    mask, wanted = values
    return [(_AND, 0, 0, mask), (_EQUAL, 1, 0, wanted), _REFUSE]


# Each falls through to what follows where the argument passes.
_FORMS: dict[Check, Callable[[tuple[int, ...]], list[_Step]]] = {
    Check.ONE_OF: _one_of,
    Check.NONE_OF: _none_of,
    Check.NO_BIT_OF: _no_bit_of,
    Check.MASKED: _masked,
}


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Stretches of adjacent numbers, first and last."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found
