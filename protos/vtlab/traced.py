"""What the processes of the levels add to a trace: around what serves an enter, where they are told to trace."""

from __future__ import annotations

import time
from collections.abc import Callable

from vtlab.enums import name_of
from vtlab.session import Execute
from vtlab.traces import Spans
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit
from vtlab.vcpu import Processor


def answering(execute: Execute, spans: Spans) -> Execute:
    """VTL1's part: from an enter to the exit that answers it."""

    def traced(enter: Enter) -> bytes:
        start = time.time_ns()
        data = execute(enter)
        if enter.trace:
            exit_ = Exit.FromString(data)
            name = name_of(vcpu_pb2.EnterReason, enter.reason)
            attributes: dict[str, str | int] = {"vtlab.vp": enter.vp_index, "vtlab.sequence": enter.sequence}
            attributes["vtlab.exit"] = exit_.WhichOneof("reason") or ""
            if exit_.vtl_return.HasField("resolution"):
                resolution = exit_.vtl_return.resolution
                attributes["vtlab.action"] = name_of(vcpu_pb2.Action, resolution.action)
                attributes["vtlab.reason"] = resolution.reason
            spans.add(enter.trace, f"VTL1: {name}", start, time.time_ns(), attributes)
        return data

    return traced


class OutsideProcessor:
    """VTL0's part: how long a vCPU was outside, from its exit to the enter that it goes on with."""

    def __init__(self, inner: Processor, spans: Spans) -> None:
        self._inner, self._spans = inner, spans
        self._left = 0
        self.kick: Callable[[], None] = inner.kick

    def run(self, enter: Enter) -> bytes:
        if enter.trace and self._left:
            attributes = {"vtlab.vp": enter.vp_index, "vtlab.sequence": enter.sequence}
            self._spans.add(enter.trace, "VTL0: outside", self._left, time.time_ns(), attributes)
        data = self._inner.run(enter)
        self._left = time.time_ns()
        return data

    def state(self) -> registers_pb2.ProcessorState:
        return self._inner.state()
