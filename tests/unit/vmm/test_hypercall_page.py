"""Where VTL0's hypercall page lies when a page is sealed."""

from __future__ import annotations

import pytest

from vmm.board import Board
from vmm.hyperv_msrs import GeneralProtectionError, SyntheticMsrs
from vmm.vtl import VpVtl
from vtlab.errors import Refused
from vtlab.hyperv.msrs import HvMsr
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import PageAccess, ProtectionUpdate

PAGE = 0x20
READ = PageAccess(read=True)
TEXT = PageAccess(read=True, kernel_execute=True)
TABLE = PageAccess(read=True, page_table=True)
NONE = PageAccess()


def sealed(access: PageAccess, first: int = PAGE - 2, count: int = 4) -> list[ProtectionUpdate]:
    return [ProtectionUpdate(runs=[1, 1, first, count], access=access, store=vcpu_pb2.PAGE_STORE_SEALED)]


@pytest.fixture
def covered(board: Board) -> Board:
    """The page is covered, and holds something else."""
    board.memory.write(PAGE * PAGE_SIZE, b"\xcc" * (PAGE_SIZE - 1) + b"\xc3")
    board.msrs.write(HvMsr.GUEST_OS_ID, 1, VpVtl())
    board.msrs.write(HvMsr.HYPERCALL, PAGE << 12 | 1, VpVtl())
    return board


@pytest.mark.parametrize("access", [READ, TEXT, TABLE])
def test_what_it_hides_is_not_sealed_unnoticed(covered: Board, access: PageAccess) -> None:
    with pytest.raises(Refused, match="VTL0's hypercall page hides what was sealed there") as refused:
        covered.protect(sealed(access))
    assert refused.value.gpa == PAGE * PAGE_SIZE


def test_one_that_was_closed_first_is_looked_at_when_it_is_opened(covered: Board) -> None:
    covered.protect(sealed(NONE))
    with pytest.raises(Refused):
        covered.protect(sealed(TEXT))


@pytest.mark.parametrize("first", [PAGE + 1, PAGE - 4])
def test_pages_beside_it_are(covered: Board, first: int) -> None:
    covered.protect(sealed(TEXT, first))


def test_what_vtl0_may_write_is_not_vouched_for(covered: Board) -> None:
    access = PageAccess(read=True, write=True)
    covered.protect([ProtectionUpdate(runs=[PAGE, 1], access=access, store=vcpu_pb2.PAGE_STORE_WRITABLE)])


def test_a_page_of_nothing_may_be_covered(covered: Board) -> None:
    covered.memory.write(PAGE * PAGE_SIZE, b"\xcc" * PAGE_SIZE)
    covered.protect(sealed(TEXT))


def test_taken_away_it_hides_nothing(covered: Board) -> None:
    covered.msrs.write(HvMsr.HYPERCALL, PAGE << 12, VpVtl())
    covered.protect(sealed(TEXT))


def test_guest_code_at_vtl1_looks_itself(covered: Board) -> None:
    covered.upper_msrs = SyntheticMsrs(covered.memory, vtl=1)
    covered.protect(sealed(TEXT))


def test_it_is_not_laid_over_what_is_sealed(board: Board) -> None:
    board.protect(sealed(TEXT))
    board.msrs.write(HvMsr.GUEST_OS_ID, 1, VpVtl())
    with pytest.raises(GeneralProtectionError):
        board.msrs.write(HvMsr.HYPERCALL, PAGE << 12 | 1, VpVtl())
    assert not board.msrs.hypercall
