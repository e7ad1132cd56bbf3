"""The run loop of one vCPU: enter, exit, serve, enter again. One thread a vCPU.

It fails closed: whatever goes wrong (a level is gone or silent, an exit makes no sense, a defect of ours), the vCPU is
not entered again and the machine ends with the reason. It never runs without its answer.
"""

from __future__ import annotations

import logging
from functools import partial

from vmm.board import Answer, Board, Ending, failed, reset_wanted
from vmm.exits import serve
from vmm.level import LevelLost
from vmm.processor import Processor
from vtlab.errors import Cancelled, VtlabError
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit

_log = logging.getLogger(__name__)


def _serve(board: Board, processor: Processor, exit_: Exit) -> Answer:
    return serve(board, processor, exit_)


def run(board: Board, processor: Processor) -> Ending:
    """Runs a vCPU until the machine ends, is reset, or is told to stop. Never raises."""
    try:
        first = processor.first()
        serving = _serve if board.tracer is None else board.tracer.serve
        served = partial(serving, board, processor)
        if not board.guest_code:
            return processor.drive(first, served)
        answer: Answer = first
        while isinstance(answer, Enter):
            exit_ = processor.run(answer)
            answer = served(exit_)
        return answer
    except Cancelled as error:
        return Ending(vmm_pb2.MACHINE_STATE_UNSPECIFIED, str(error))
    except LevelLost as error:
        return reset_wanted(board.spec, str(error))
    except VtlabError as error:
        return failed(str(error))
    except Exception as error:  # noqa: BLE001 - a defect must end the machine, not leave it half alive
        where = {"vm": board.vm, "vp": processor.index, "vtl": processor.vtl.active, "sequence": processor.resumed}
        _log.exception("vCPU %d of %s", processor.index, board.vm, extra=where)
        return failed(f"vCPU {processor.index}: {type(error).__name__}: {error}")
    finally:
        board.gate.gone(processor.index)
