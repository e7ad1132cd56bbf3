"""VINA: when VTL1 is told that an interrupt waits for VTL0, and that it is told once."""

from __future__ import annotations

import pytest

from tests.unit.hyperv.pages import ASSIST, Bench
from tests.unit.vmm.fakes import FakeLevel
from vmm import vina
from vmm.board import Board
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1
from vtl0_guest.cpu.hyperv import msrs
from vtl0_guest.cpu.hyperv.updates import APPLY, CHECKS
from vtlab.errors import BadArgument
from vtlab.hyperv.layouts import ASSIST_VINA_OFFSET
from vtlab.hyperv.msrs import HvMsr
from vtlab.v1.vcpu_pb2 import InterruptNotice, Update

VECTOR = 0x91
TOLD = Update(interrupt_notice=InterruptNotice(vector=VECTOR))


@pytest.fixture
def processor(board: Board) -> Processor:
    """VTL1 runs there and wants to hear."""
    found = board.processors[0]
    found.vtl.vina = VECTOR | vina.ENABLE
    found.resumed = 3
    found.vtl.active = VTL1
    return found


def told(processor: Processor) -> list[Update]:
    """What the next enter of VTL1 carries."""
    return list(processor._waiting_for(VTL1))


def test_vtl1_hears_what_waits_while_it_runs(board: Board, processor: Processor) -> None:
    vina.notice(board, 0)
    vina.notice(board, 0)
    assert told(processor) == [TOLD]


def test_without_vina_it_does_not(board: Board, processor: Processor) -> None:
    processor.vtl.vina = VECTOR
    vina.notice(board, 0)
    assert told(processor) == []


@pytest.mark.parametrize(("after", "expected"), [(3, [TOLD]), (2, [])])
def test_what_came_before_vtl1_is_active_is_told_when_it_is(
    board: Board, processor: Processor, after: int, expected: list[Update]
) -> None:
    processor.vtl.active = VTL0
    vina.notice(board, 0, after)
    assert told(processor) == []
    processor.vtl.active = VTL1
    vina.entered(processor)
    assert told(processor) == expected, "VTL0 ran since: it has taken it, or leaves with it"


def test_auto_reset_is_for_the_next_entry(processor: Processor) -> None:
    vina.left(processor)
    assert told(processor) == []
    processor.vtl.vina |= vina.AUTO_RESET
    vina.left(processor)
    assert told(processor) == [Update(interrupt_notice=InterruptNotice(reset=True))]


def test_the_core_of_vtl0_is_listened_to(board: Board, processor: Processor, guest: FakeLevel) -> None:
    vina.listen(board)
    guest.interrupted(0, 3)
    assert told(processor) == [TOLD]


def status(bench: Bench) -> int:
    return bench.memory.data[ASSIST + ASSIST_VINA_OFFSET]


def apply(bench: Bench, **fields: int) -> None:
    update = Update(interrupt_notice=InterruptNotice(**fields))  # type: ignore[arg-type]
    CHECKS["interrupt_notice"](update)
    APPLY["interrupt_notice"](bench.vp, update)


def test_the_vector_is_raised_until_the_status_is_clear() -> None:
    bench = Bench()
    apply(bench, vector=VECTOR)
    assert bench.platform.pending_vector(0) is None, "no assist page: nowhere to say so"
    msrs.write(bench.vp, HvMsr.VP_ASSIST_PAGE, ASSIST | 1)
    apply(bench, vector=VECTOR)
    assert (status(bench), bench.platform.acknowledge(0)) == (1, VECTOR)
    msrs.write(bench.vp, HvMsr.EOI, 0)
    apply(bench, vector=VECTOR)
    assert bench.platform.pending_vector(0) is None
    apply(bench, reset=True)
    assert status(bench) == 0
    apply(bench, vector=VECTOR, auto_eoi=True)
    assert bench.platform.acknowledge(0) == VECTOR
    apply(bench, reset=True)
    apply(bench, vector=VECTOR, auto_eoi=True)
    assert bench.platform.acknowledge(0) == VECTOR, "over as soon as it was taken"


def test_a_vector_below_16_is_none() -> None:
    with pytest.raises(BadArgument):
        apply(Bench(), vector=15)
