"""Traces of VTL switches, with OpenTelemetry, across the three processes. Off unless a process is told where they go.

One trace is one switch to VTL1 and back. The VMM begins it when the exit arrives that leads there; its context travels
in Enter.trace to VTL1, and then with the enter that VTL0 goes on with, whose process adds how long its vCPU was
outside. No context is taken from VTL0's process, and without tracing no exit passes through any of this.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtlab.errors import BadArgument

CONTEXT_SIZE = 25
"""Bytes of Enter.trace: trace id (16), span id (8), flags (1), as in a W3C traceparent."""
Attributes = Mapping[str, str | int]


class Spans:
    """What a process writes of traces. Thread-safe."""

    def __init__(self, where: str, role: str) -> None:
        """Args:
            where: a file, which gets one JSON object a span, or the http(s) address of an OTLP collector.

        Raises:
            BadArgument: the packages are not installed, or the file cannot be written.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            missing = f"need packages that are missing: pip install 'vtlab[traces]' ({error})"
            raise BadArgument("traces", missing) from None
        self._trace = trace
        exporter = _exporter(where, role)
        self._provider = TracerProvider(resource=Resource.create({"service.name": f"vtlab-{role}"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vtlab")

    def begin(self, name: str, start_ns: int, attributes: Attributes) -> Any:
        """The first span of a new trace; to be ended by its end()."""
        nothing = self._trace.set_span_in_context(self._trace.INVALID_SPAN)
        return self._tracer.start_span(name, context=nothing, start_time=start_ns, attributes=attributes)

    def context(self, span: Any) -> bytes:
        """For Enter.trace."""
        context = span.get_span_context()
        ids: bytes = context.trace_id.to_bytes(16, "big") + context.span_id.to_bytes(8, "big")
        return ids + bytes([context.trace_flags])

    def add(self, context: bytes, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """A span below the one of a context that came with an enter. One that is no context is left out."""
        if len(context) != CONTEXT_SIZE:
            return
        parent = self._trace.SpanContext(
            trace_id=int.from_bytes(context[:16], "big"),
            span_id=int.from_bytes(context[16:24], "big"),
            is_remote=True,
            trace_flags=self._trace.TraceFlags(context[24]),
        )
        around = self._trace.set_span_in_context(self._trace.NonRecordingSpan(parent))
        self._tracer.start_span(name, context=around, start_time=start_ns, attributes=attributes).end(end_ns)

    def close(self) -> None:
        """Writes what is left."""
        self._provider.shutdown()


def open_spans(where: str, role: str) -> Spans | None:
    """None where nothing is traced."""
    return Spans(where, role) if where else None


def _exporter(where: str, role: str) -> Any:
    if where.startswith(("http://", "https://")):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=where)
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    path = Path(where)
    if path.is_dir():
        path /= f"{role}.jsonl"
    try:
        file = os.fdopen(_descriptor(path), "w", encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"traces {where!r}", str(error)) from None
    return ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")


def _descriptor(path: Path) -> int:
    """To append with. VTL0's process may make no file: its own must be there."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
