"""The journal as a file: whole transactions, numbers that never come twice, and refusal of what it cannot read."""

from __future__ import annotations

import sqlite3
from itertools import islice
from pathlib import Path

import pytest

from vmm.journal import BLOCK, Journal
from vtlab.errors import InternalError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_what_was_written_is_there_for_the_next_one(path: Path) -> None:
    Journal(path).write("vm", {"machine": b"1", "pages/0": b"x"}, [(7, 4, b"serial")], {4: (3, 6)})
    again = Journal(path)  # the first was never closed, as after kill -9
    assert again.machines() == ["vm"]
    assert again.read("vm") == {"machine": b"1", "pages/0": b"x"}
    assert again.events("vm") == ([b"serial"], {4: (3, 6)})


def test_it_is_nobody_elses(path: Path) -> None:
    Journal(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_records_are_replaced_and_forgotten(path: Path) -> None:
    journal = Journal(path)
    journal.write("vm", {"machine": b"1", "pages/0": b"x", "pages/12": b"y"})
    journal.write("vm", {"machine": b"2", "pages/1": b"z"}, forget="pages/")
    assert journal.read("vm") == {"machine": b"2", "pages/1": b"z"}
    journal.write("other", {"machine": b"3"}, [(1, 1, b"")])
    journal.forget("vm")
    assert (journal.machines(), journal.read("vm")) == (["other"], {})
    assert journal.events("other")[0] == [b""]


def test_a_transaction_that_fails_leaves_nothing(path: Path) -> None:
    journal = Journal(path)
    journal.write("vm", {"machine": b"1"}, [(1, 1, b"a")])
    with pytest.raises(InternalError, match="cannot be read or written"):
        journal.write("vm", {"machine": b"2"}, [(1, 1, b"the same number")])
    assert journal.read("vm") == {"machine": b"1"}
    journal.write("vm", {"machine": b"3"}, [(2, 1, b"b")])
    assert journal.read("vm") == {"machine": b"3"}


def test_events_are_dropped_up_to_a_number(path: Path) -> None:
    journal = Journal(path)
    journal.write("vm", {}, [(number, number % 2, b"%d" % number) for number in range(1, 7)])
    journal.write("vm", {}, dropped={1: (2, 3)})
    assert journal.events("vm") == ([b"2", b"4", b"5", b"6"], {1: (2, 3)})


def test_numbers_never_come_again(path: Path) -> None:
    first = list(islice(Journal(path).numbers(), 3))
    second = list(islice(Journal(path).numbers(), BLOCK + 2))
    assert first == [1, 2, 3]
    assert second == list(range(BLOCK + 1, 2 * BLOCK + 3))
    assert Journal(path).next_event() > second[-1]


@pytest.mark.parametrize("damage", ["truncate", "garbage", "version"])
def test_what_cannot_be_read_is_refused(path: Path, damage: str) -> None:
    journal = Journal(path)
    journal.write("vm", {f"record {number}": bytes(2000) for number in range(50)})
    journal.close()
    if damage == "version":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"not a database at all" * 100)
    before = path.read_bytes()
    with pytest.raises(InternalError, match="journal"):
        Journal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", ["text", 7, None, 1.5])
def test_a_record_that_is_not_of_bytes_is_damage(path: Path, value: object) -> None:
    Journal(path).write("vm", {"machine": b"1"}, [(1, 1, b"event")])
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute("INSERT OR IGNORE INTO records VALUES ('vm', 'more', ?)", (value,))
        database.execute("UPDATE OR IGNORE events SET data = ?", (value,))
    journal = Journal(path)
    if value is None:  # the schema does not let it in
        assert journal.read("vm") == {"machine": b"1"}
        return
    with pytest.raises(InternalError, match="not of bytes"):
        journal.read("vm")
    with pytest.raises(InternalError, match="not of bytes"):
        journal.events("vm")


def test_damage_that_garbles_the_complaint_is_still_a_complaint(path: Path) -> None:
    journal = Journal(path)
    journal.write("vm", {"machine": b"1"})
    journal.close()
    data = path.read_bytes()
    at = data.index(b"CREATE TABLE meta") + 6
    path.write_bytes(data[:at] + b"\xff\xd9" + data[at + 2 :])
    with pytest.raises(InternalError, match="journal"):
        Journal(path).machines()
