"""Answers of the vulnerable driver, and how command lines go out and answers come back."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtlab.client import Machine
from vtlab.client.driver import BATCH_BYTES, Driver, GuestFault, GuestRefusal, parse

U64 = st.integers(0, 2**64 - 1)


@given(U64)
def test_a_value(value: int) -> None:
    assert parse(f"ok {value:#x}") == value


@given(st.integers(0, 31), U64, U64, U64)
def test_a_fault(vector: int, error: int, rip: int, cr2: int) -> None:
    with pytest.raises(GuestFault) as caught:
        parse(f"fault vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x}")
    fault = caught.value
    assert (fault.vector, fault.error_code, fault.rip, fault.cr2) == (vector, error, rip, cr2)


@given(st.integers(1, 4095))
def test_a_refusal(number: int) -> None:
    with pytest.raises(GuestRefusal) as caught:
        parse(f"error errno={number}")
    assert caught.value.number == number


@given(st.text())
def test_anything_else_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an answer|invalid literal"):
        parse(f"?{text}")


def test_a_fault_reads_like_the_manual() -> None:
    assert str(GuestFault(14, 3, 0x1000, 0x2000)) == "#PF(0x3) on 0x2000 at 0x1000"
    assert str(GuestFault(13, 0, 0x1000, 0)) == "#GP(0x0) at 0x1000"
    assert str(GuestRefusal(13)) == "-EACCES"


class FakeMachine:
    """Answers each command line with its own length."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.answers: list[str] = []

    def write_serial(self, port: int, data: str) -> None:
        assert port == 1
        self.sent.append(data)
        self.answers += [f"ok {len(line):#x}" for line in data.splitlines()]

    def serial_reader(self, port: int, from_now: bool) -> FakeMachine:
        assert from_now
        return self

    def read_line(self, timeout: float) -> str:
        return self.answers.pop(0)


@given(st.lists(st.text("abc ", min_size=1, max_size=300), max_size=40))
def test_commands_and_answers_stay_in_order(lines: list[str]) -> None:
    machine = FakeMachine()
    driver = Driver(cast(Machine, machine))
    assert driver.commands(lines) == [f"ok {len(line):#x}" for line in lines]
    assert all(len(sent) <= 2 * BATCH_BYTES for sent in machine.sent)


def test_bytes_are_written_in_pieces_of_eight() -> None:
    machine = FakeMachine()
    Driver(cast(Machine, machine)).write_bytes(0x1000, bytes(range(11)))
    assert machine.sent == ["write 0x1000 8 0x706050403020100\nwrite 0x1008 3 0xa0908\n"]
