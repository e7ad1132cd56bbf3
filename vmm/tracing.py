"""Traces of VTL switches, the VMM's part: in place of vmm.exits.serve where a machine is traced (vtlab.traces)."""

from __future__ import annotations

import time
from typing import Any

from vmm.board import Answer, Board
from vmm.exits import serve
from vmm.processor import Processor
from vtlab.traces import Spans
from vtlab.v1.vcpu_pb2 import Enter, Exit


class SwitchTracer:
    """Of one VMM. An exit that leads to no other level leaves nothing."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        # (machine, vCPU) -> the exit that is being served, when it came, and its span once VTL1 is entered.
        self._open: dict[tuple[str, int], tuple[Exit, int, Any]] = {}

    def serve(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        """As vmm.exits.serve."""
        key, before = (board.vm, processor.index), processor.vtl.active
        self._open[key] = exit_, time.time_ns(), None
        span = None
        try:
            answer = serve(board, processor, exit_)
            if processor.vtl.active != before:
                self.context(board, processor)
            span = self._open[key][2]
            if span is not None and isinstance(answer, Enter):
                answer.trace = self._spans.context(span)
            return answer
        finally:
            _, _, span = self._open.pop(key)
            if span is not None:
                span.end()

    def context(self, board: Board, processor: Processor) -> bytes:
        """For the enter of VTL1 that an exit leads to; b"" where a client is the reason."""
        key = board.vm, processor.index
        if key not in self._open:
            return b""
        exit_, start, span = self._open[key]
        if span is None:
            attributes: dict[str, str | int] = {
                "vtlab.vm": board.vm,
                "vtlab.vp": processor.index,
                "vtlab.vtl": processor.vtl.active,
                "vtlab.sequence": exit_.sequence,
            }
            span = self._spans.begin(f"VTL switch: {exit_.WhichOneof('reason')}", start, attributes)
            self._open[key] = exit_, start, span
        return self._spans.context(span)
