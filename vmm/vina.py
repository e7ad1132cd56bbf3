"""VINA, virtual interrupt notification assist: VTL1 hears that an interrupt waits for VTL0 (TLFS, "VSM").

VsmVina: vector [7:0], enable 8, auto-reset 9, auto-EOI 10. VinaStatus in the assist page of VTL1 says that the vector
was raised and no other will be until it is clear: VTL1 clears it, or with auto-reset leaving VTL1 does.
"""

from __future__ import annotations

from vmm.board import Board
from vmm.processor import Processor
from vmm.vtl import VTL1
from vtlab.v1.vcpu_pb2 import InterruptNotice, Update

VECTOR, ENABLE, AUTO_RESET, AUTO_EOI = 0xFF, 1 << 8, 1 << 9, 1 << 10


def notice(board: Board, vp_index: int, after: int = 0) -> None:
    """An interrupt waits for VTL0 of a vCPU; if VTL1 is only about to run there, entered() tells it. Thread-safe.

    Args:
        after: number of the enter of VTL0 after whose exit it waits; 0 is the last one.
    """
    processor = board.processors[vp_index]
    # Before the look at who is active: entered() does it the other way round.
    processor.vtl.lower_waits = after or processor.resumed
    if processor.vtl.active == VTL1 and _tell(processor):
        board.gate.kick(vp_index)


def entered(processor: Processor) -> None:
    """VTL1 is about to run."""
    _tell(processor)


def _tell(processor: Processor) -> bool:
    """Whether VTL1 is told: it wants to hear, and VTL0 has not run since."""
    value = processor.vtl.vina
    if not value & ENABLE or processor.vtl.lower_waits != processor.resumed:
        return False
    told = InterruptNotice(vector=value & VECTOR, auto_eoi=bool(value & AUTO_EOI))
    processor.post_once(Update(interrupt_notice=told), vtl=VTL1)
    return True


def left(processor: Processor) -> None:
    """VTL1 returns: with auto-reset its next entry finds VinaStatus clear."""
    if processor.vtl.vina & AUTO_RESET:
        processor.post_once(Update(interrupt_notice=InterruptNotice(reset=True)), vtl=VTL1)


def listen(board: Board) -> None:
    """From now on VTL0's core says what waits there while it does not run, whoever raised it."""
    board.guest.listen(lambda vp_index, after: notice(board, vp_index, after))
