"""Page moves: contents are never lost, rights are never wider than asked, secrets do not leave `private`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.memory import ALL_RIGHTS, EXECUTE, PRIVATE, READ, SEALED, WRITABLE, WRITE, Memory, access_of, objection
from vtlab.errors import BadArgument, Refused
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import PageAccess, ProtectionUpdate

PAGES = 96
NAMES = {
    WRITABLE: vcpu_pb2.PAGE_STORE_WRITABLE,
    SEALED: vcpu_pb2.PAGE_STORE_SEALED,
    PRIVATE: vcpu_pb2.PAGE_STORE_PRIVATE,
}
FILES = {WRITABLE: RamFile.WRITABLE, SEALED: RamFile.SEALED, PRIVATE: RamFile.PRIVATE}


@pytest.fixture
def code() -> list[int]:
    """Executable pages that were written from outside."""
    return []


@pytest.fixture
def memory(tmp_path: Path, code: list[int]) -> Iterator[Memory]:
    result = Memory(tmp_path, PAGES * PAGE_SIZE, code.extend)
    yield result
    result.close()


def update(store: int, rights: int, *runs: int) -> ProtectionUpdate:
    return ProtectionUpdate(runs=runs, access=access_of(rights), store=NAMES[store])


def in_file(tmp_path: Path, store: int, page: int) -> bytes:
    return (tmp_path / FILES[store].value).read_bytes()[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


def page_of(byte: int) -> bytes:
    return bytes([byte]) * PAGE_SIZE


def test_sealing_moves_contents_and_back(memory: Memory, tmp_path: Path) -> None:
    memory.write(0x3000, page_of(7))
    assert memory.apply(update(SEALED, READ, 3, 1)) == 1
    assert in_file(tmp_path, SEALED, 3) == page_of(7)
    assert memory.read(0x3000, PAGE_SIZE) == page_of(7)
    with pytest.raises(Refused) as caught:
        memory.write(0x3FFC, b"12345678")
    assert caught.value.subject == "page 0x3"
    assert caught.value.gpa == 0x3FFC
    assert memory.read(0x4000, 4) == bytes(4)  # the half that was allowed was not written either
    memory.write(0x3000, b"new", vtl=1)
    assert memory.apply(update(WRITABLE, READ | WRITE, 3, 1)) == 1
    assert memory.read(0x3000, 4) == b"new\x07"
    assert in_file(tmp_path, WRITABLE, 3)[:4] == b"new\x07"


def test_sealed_bytes_do_not_follow_the_writable_file(memory: Memory, tmp_path: Path) -> None:
    memory.write(0, page_of(1))
    memory.apply(update(SEALED, READ, 0, 1))
    with (tmp_path / "ram.rw").open("r+b") as file:  # as a hostile guest process can
        file.write(page_of(0xEE))
    assert memory.read(0, PAGE_SIZE) == page_of(1)


def test_private_pages_are_nowhere_else_and_leave_nothing_behind(memory: Memory, tmp_path: Path) -> None:
    memory.write(0x5000, page_of(9))
    memory.apply(update(SEALED, READ, 5, 1))
    memory.apply(update(PRIVATE, 0, 5, 1))
    assert in_file(tmp_path, PRIVATE, 5) == page_of(9)
    assert in_file(tmp_path, SEALED, 5) == in_file(tmp_path, WRITABLE, 5) == bytes(PAGE_SIZE)
    with pytest.raises(Refused, match="page 0x5"):
        memory.read(0x5000, 1)
    with pytest.raises(Refused, match="page 0x5"):
        memory.write(0x4FFF, b"12")
    memory.apply(update(WRITABLE, ALL_RIGHTS, 5, 1))
    assert memory.read(0x5000, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert in_file(tmp_path, PRIVATE, 5) == bytes(PAGE_SIZE)


def test_reveal_gives_private_contents_up(memory: Memory, tmp_path: Path) -> None:
    memory.write(0x5000, page_of(9))
    memory.apply(update(PRIVATE, 0, 5, 1))
    memory.apply(update(WRITABLE, ALL_RIGHTS, 5, 1), reveal=True)
    assert memory.read(0x5000, PAGE_SIZE) == page_of(9)
    assert in_file(tmp_path, PRIVATE, 5) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("keep", [False, True])
def test_reset_lifts_rights_and_gives_no_private_byte_up(memory: Memory, tmp_path: Path, keep: bool) -> None:
    for page in (3, 5, 7):
        memory.write(page * PAGE_SIZE, page_of(page))
    memory.apply(update(SEALED, READ, 3, 1))
    memory.apply(update(PRIVATE, 0, 5, 1))
    memory.reset(keep=keep)
    kept = [memory.read(page * PAGE_SIZE, PAGE_SIZE) for page in (3, 5, 7)]
    assert kept == ([page_of(3), bytes(PAGE_SIZE), page_of(7)] if keep else [bytes(PAGE_SIZE)] * 3)
    assert all(memory.store(page) == WRITABLE for page in range(PAGES))
    assert not any(in_file(tmp_path, store, page).strip(b"\0") for store in (SEALED, PRIVATE) for page in range(PAGES))


def test_long_runs_with_mixed_stores(memory: Memory) -> None:
    for page in range(PAGES):
        memory.write(page * PAGE_SIZE, bytes([page]))
    memory.apply(update(SEALED, READ, 10, 5, 20, 1))
    assert memory.apply(update(SEALED, READ, 0, PAGES)) == PAGES - 6
    assert [memory.read(page * PAGE_SIZE, 1)[0] for page in range(PAGES)] == list(range(PAGES))
    assert memory.apply(update(PRIVATE, 0, 0, PAGES)) == PAGES
    assert memory.read(17 * PAGE_SIZE, 1, vtl=1) == b"\x11"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ProtectionUpdate(runs=[1, 1], access=PageAccess(read=True)), "no store"),
        (update(SEALED, READ | WRITE, 1, 1), "cannot be writable"),
        (update(PRIVATE, READ, 1, 1), "no rights"),
        (update(WRITABLE, READ | WRITE | 16, 1, 1), "page table"),
        (update(WRITABLE, WRITE, 1, 1), "without read"),
        (update(SEALED, EXECUTE, 1, 1), "without read"),
        (update(SEALED, READ, 1), "pairs"),
        (update(SEALED, READ, 1, 0), "not RAM"),
        (update(SEALED, READ, 0, 1, PAGES - 1, 2), f"page {PAGES - 1:#x}"),
        (update(SEALED, READ, 0, 1, 2**64 - 1, 1), "not RAM"),
    ],
)
def test_refused_updates_change_nothing(memory: Memory, bad: ProtectionUpdate, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        memory.apply(bad)
    assert all(memory.store(page) == WRITABLE for page in range(PAGES))
    assert memory.access(0) == access_of(ALL_RIGHTS)


@pytest.mark.parametrize(("gpa", "size"), [(PAGES * PAGE_SIZE, 1), (PAGES * PAGE_SIZE - 1, 2), (2**63, 8)])
def test_beyond_ram(memory: Memory, gpa: int, size: int) -> None:
    with pytest.raises(BadArgument, match=f"{gpa:#x}"):
        memory.read(gpa, size)
    with pytest.raises(BadArgument):
        memory.write(gpa, bytes(size))
    assert memory.access(gpa) == PageAccess() or gpa < memory.size


def test_written_code_is_reported(memory: Memory, code: list[int]) -> None:
    memory.apply(update(WRITABLE, READ | WRITE, 2, 1))
    memory.write(0x1FFF, b"12")
    assert code == [1]


def test_reset_lifts_and_zeroes(memory: Memory, tmp_path: Path) -> None:
    memory.write(0, page_of(1))
    memory.apply(update(PRIVATE, 0, 0, 1))
    memory.write(0x1000, page_of(2))
    memory.apply(update(SEALED, READ, 1, 1))
    memory.reset()
    for file in FILES.values():
        assert not any((tmp_path / file.value).read_bytes())
    assert memory.access(0) == access_of(ALL_RIGHTS)
    memory.write(0, b"x")


Runs = list[tuple[int, int]]


class Write(NamedTuple):
    page: int
    byte: int


class Change(NamedTuple):
    store: int
    rights: int
    runs: Runs


_steps = st.one_of(
    st.builds(Write, st.integers(0, PAGES - 1), st.integers(1, 255)),
    st.builds(
        Change,
        st.sampled_from(sorted(NAMES)),
        st.integers(0, 31),
        st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 40)), min_size=1, max_size=4),
    ),
)
# page -> (store, rights, the byte that fills it)
Model = dict[int, tuple[int, int, int]]


def do_write(memory: Memory, model: Model, step: Write) -> None:
    store, rights, _ = model[step.page]
    if not rights & WRITE:
        with pytest.raises(Refused):
            memory.write(step.page * PAGE_SIZE, page_of(step.byte))
        return
    memory.write(step.page * PAGE_SIZE, page_of(step.byte))
    model[step.page] = (store, rights, step.byte)


def do_change(memory: Memory, model: Model, step: Change) -> None:
    asked = update(step.store, step.rights, *[value for run in step.runs for value in run])
    if objection(step.store, step.rights) or any(first + count > PAGES for first, count in step.runs):
        with pytest.raises(BadArgument):
            memory.apply(asked)
        return
    memory.apply(asked)
    for first, count in step.runs:
        for page in range(first, first + count):
            old_store, _, byte = model[page]
            leaves_private = old_store == PRIVATE and step.store != PRIVATE
            model[page] = (step.store, step.rights, 0 if leaves_private else byte)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_steps, max_size=20))
def test_against_a_model(memory: Memory, steps: list[Write | Change]) -> None:
    """A dict of pages is enough to predict everything."""
    memory.reset()
    model: Model = dict.fromkeys(range(PAGES), (WRITABLE, ALL_RIGHTS, 0))
    for step in steps:
        if isinstance(step, Write):
            do_write(memory, model, step)
        else:
            do_change(memory, model, step)
    for page, (store, rights, byte) in model.items():
        assert memory.store(page) == store
        assert memory.access(page * PAGE_SIZE) == access_of(rights)
        assert memory.read(page * PAGE_SIZE, PAGE_SIZE, vtl=1) == page_of(byte)
        if not rights & READ:
            with pytest.raises(Refused):
                memory.read(page * PAGE_SIZE, 1)
