"""Spans that go to an OTLP collector over HTTP, from processes that are confined."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.waiting import wait_until
from vmm.launcher import launch
from vtlab.services import Service
from vtlab_attacks.guest import boot

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@contextmanager
def collector(names: set[tuple[str, str]]) -> Iterator[str]:
    """Its address; adds (service, span) of what arrives to `names`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            request = trace_service.ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                (service,) = (
                    one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
                )
                names.update((service, span.name) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_collector_hears_of_vtl_switches() -> None:
    """VTL0's process has no way to it, and sends nothing."""
    names: set[tuple[str, str]] = set()
    with collector(names) as address, launch(traces=address) as lab, boot(lab, protected=True) as guest:
        guest.driver.vtl(Service.PING)
        wait_until(lambda: {service for service, _ in names} >= {"vtlab-vmm", "vtlab-monitor"}, 60, f"spans, {names}")
    assert {service for service, _ in names} == {"vtlab-vmm", "vtlab-monitor"}
