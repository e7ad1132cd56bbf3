"""Seccomp filters as programs: what the assembled instructions answer, by an interpreter of their own."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtlab.confinement import bpf
from vtlab.confinement.bpf import Argument, Check, Filter, assemble
from vtlab.confinement.calls import allowed_calls
from vtlab.trust.roles import Role

ARCHITECTURE = 0xC000003E
ALLOW, KILL = "allow", "kill"
PROCESS = 4711


def answer(program: bytes, number: int, *arguments: int, architecture: int = ARCHITECTURE) -> str | int:
    """What the kernel does with that call: ALLOW, KILL, or the error that it gives."""
    words = [one & (1 << 64) - 1 for one in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *words)
    steps = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, constant = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x06:
            kind = constant & 0xFFFF0000
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(kind) or constant & 0xFFFF
        elif code == 0x05:
            at += constant
        elif code == 0x54:
            accumulator &= constant
        else:
            holds = {
                0x15: accumulator == constant,
                0x25: accumulator > constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[code]
            at += if_true if holds else if_false


def passes(test: Argument, arguments: tuple[int, ...]) -> bool:
    value = arguments[test.index] >> (32 if test.high else 0) & 0xFFFF_FFFF
    if test.check is Check.MASKED:
        return value & test.values[0] == test.values[1]
    if test.check is Check.NO_BIT_OF:
        return not value & test.values[0]
    return (value in test.values) is (test.check is Check.ONE_OF)


WORD = st.integers(0, (1 << 32) - 1)
SMALL = st.integers(0, 7)  # so that values are met
TESTS = st.one_of(
    st.builds(Argument, SMALL.map(lambda n: n % 6), st.sampled_from([Check.ONE_OF, Check.NONE_OF]),
              st.lists(SMALL, min_size=1, max_size=5, unique=True).map(tuple), st.booleans()),
    st.builds(Argument, SMALL.map(lambda n: n % 6), st.just(Check.NO_BIT_OF), st.tuples(SMALL), st.booleans()),
    st.builds(Argument, SMALL.map(lambda n: n % 6), st.just(Check.MASKED), st.tuples(SMALL, SMALL), st.booleans()),
)  # fmt: skip
NUMBERS = st.integers(0, 40)


@given(
    st.frozensets(NUMBERS),
    st.dictionaries(NUMBERS, st.lists(TESTS, max_size=4).map(tuple), max_size=5),
    st.frozensets(NUMBERS, max_size=3),
    NUMBERS,
    st.tuples(*[st.one_of(SMALL, st.integers(0, (1 << 64) - 1))] * 6),
)
def test_the_program_does_what_the_table_says(
    allowed: frozenset[int],
    tested: dict[int, tuple[Argument, ...]],
    absent: frozenset[int],
    number: int,
    arguments: tuple[int, ...],
) -> None:
    absent -= tested.keys()
    program = assemble(Filter(allowed, tested, absent))
    if number in tested:
        expected: str | int = ALLOW if all(passes(one, arguments) for one in tested[number]) else errno.EPERM
    elif number in absent:
        expected = errno.ENOSYS
    else:
        expected = ALLOW if number in allowed else errno.EPERM
    assert answer(program, number, *arguments) == expected


@pytest.mark.parametrize("role", [Role.GUEST, Role.MONITOR, Role.VMM])
def test_other_numbers_and_architectures(role: Role) -> None:
    program = assemble(allowed_calls(role, PROCESS, tcp=False))
    assert len(program) // 8 < 4096, "as many instructions as the kernel takes"
    assert answer(program, 0) == ALLOW
    assert answer(program, bpf.LAST_KNOWN) == errno.EPERM
    assert answer(program, bpf.LAST_KNOWN + 1) == errno.ENOSYS
    assert answer(program, 0, architecture=0x40000003) == KILL  # i386, where 0 is another call
    assert answer(program, 0x40000000) == KILL  # x32


EXECVE, PTRACE, FORK, CLONE3, OPENAT2 = 59, 101, 57, 435, 437
CONNECT, UNLINK, FTRUNCATE, SENDTO, SENDMSG = 42, 87, 77, 44, 46


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("role", [Role.GUEST, Role.MONITOR, Role.VMM])
def test_what_no_role_may(role: Role, tcp: bool) -> None:
    program = assemble(allowed_calls(role, PROCESS, tcp))
    for number in (EXECVE, PTRACE, FORK, 58, 310, 311, 321, 165, 250, 323, 438, 304, 246, 425, 105, 272):
        assert answer(program, number) == errno.EPERM
    for number in (CLONE3, OPENAT2):
        assert answer(program, number) == errno.ENOSYS
    assert answer(program, 56, 0x3D0F00) == ALLOW  # a thread
    assert answer(program, 56, 0x11) == errno.EPERM  # a process
    assert answer(program, 62, PROCESS, 15) == answer(program, 234, PROCESS, PROCESS, 6) == ALLOW
    for other in (PROCESS + 1, 0, -1, -PROCESS):
        assert answer(program, 62, other, 15) == errno.EPERM
    assert answer(program, 16, 1, 0x5401) == ALLOW
    assert answer(program, 16, 1, 0x5412) == errno.EPERM  # TIOCSTI
    assert answer(program, 302, 0, 4, 0, 1 << 40) == ALLOW
    assert answer(program, 302, 0, 4, 1 << 40, 0) == errno.EPERM  # a new limit, by a pointer of any value
    assert answer(program, 302, PROCESS + 1, 4, 0, 1) == errno.EPERM
    assert answer(program, 41, 16, 3, 0) == answer(program, 41, 1, 2, 0) == errno.EPERM  # netlink; datagrams
    assert answer(program, 41, 1, 1 | 0o2000000, 0) == ALLOW
    assert answer(program, 41, 2, 1, 0) == (ALLOW if tcp else errno.EPERM)


def test_what_the_guest_process_may_not() -> None:
    guest, monitor, vmm = (
        assemble(allowed_calls(role, PROCESS, False)) for role in (Role.GUEST, Role.MONITOR, Role.VMM)
    )
    for number in (UNLINK, FTRUNCATE, 76, 82, 83, 90, 91, 88, 86, 280, 285, 316):
        assert answer(guest, number) == errno.EPERM
    for flags in (0o100, 0o1000, 0o20200000):  # O_CREAT, O_TRUNC, O_TMPFILE
        assert answer(guest, 257, -100, 0, flags | 2) == answer(guest, 2, 0, flags | 2) == errno.EPERM
        assert answer(monitor, 257, -100, 0, flags | 2) == ALLOW
    assert answer(guest, 257, -100, 0, 0o2000002) == ALLOW
    assert answer(monitor, UNLINK) == answer(vmm, FTRUNCATE) == ALLOW
    assert answer(guest, CONNECT) == answer(monitor, CONNECT) == errno.EPERM
    assert answer(vmm, CONNECT) == ALLOW
    dials = assemble(allowed_calls(Role.MONITOR, PROCESS, tcp=True, dials=True))  # a collector of traces
    assert answer(dials, CONNECT) == ALLOW


def test_no_connection_is_opened_by_sending() -> None:
    """MSG_FASTOPEN. Where a role has no TCP socket, sending is not looked at: it is on the path of every exit."""
    with_tcp, without = (assemble(allowed_calls(Role.MONITOR, PROCESS, tcp)) for tcp in (True, False))
    assert answer(with_tcp, SENDTO, 3, 0, 9, 0x20000000) == answer(with_tcp, SENDMSG, 3, 0, 0x20004000) == errno.EPERM
    assert answer(with_tcp, SENDTO, 3, 0, 9, 0x4000) == answer(with_tcp, SENDMSG, 3, 0, 0x4000) == ALLOW
    assert {SENDTO, SENDMSG}.isdisjoint(allowed_calls(Role.GUEST, PROCESS, False).tested)
    assert answer(without, SENDMSG, 3, 0, 0) == ALLOW
