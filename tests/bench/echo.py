"""A bare gRPC stream echo on the laboratory's own stack: what a round trip costs before we do anything.

Same channel and server options, mutual TLS, gate and Unix sockets as VcpuService.Run has, served by another process; no
protobuf, no engine: the server answers every message with the same constant bytes.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from vtlab.channels import ServerConfig, dial, serve
from vtlab.trust.roles import Role

SERVICE, METHOD = "vtlab.v1.VcpuService", "Run"


class EchoServer:
    """A process that answers on `address` as `role`, until the context ends."""

    def __init__(self, folder: Path, trust: Path, role: Role, answer_size: int) -> None:
        self.address = f"unix:{folder}/echo-{role}"
        self.role = role
        command = [sys.executable, "-m", "tests.bench.echo", self.address, str(trust), role.value, str(answer_size)]
        self._process = subprocess.Popen(command)

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()


class EchoClient:
    """One open stream to an EchoServer."""

    def __init__(self, server: EchoServer, trust: Path, message_size: int) -> None:
        self._channel = dial(server.address, trust, Role.VMM, server.role)
        self._message = bytes(message_size)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self._incoming = call(iter(self._outgoing.get, None))

    def round_trip(self) -> None:
        """Sends one message and waits for its answer."""
        self._outgoing.put(self._message)
        next(self._incoming)

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


def microseconds(clients: list[EchoClient], rounds: int) -> float:
    """Mean time of one round trip to each of the clients' servers in turn, in microseconds."""
    start = time.perf_counter_ns()
    for _ in range(rounds):
        for client in clients:
            client.round_trip()
    return (time.perf_counter_ns() - start) / rounds / 1000


def _serve(address: str, trust: Path, role: Role, answer_size: int) -> None:
    answer = bytes(answer_size)

    def run(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            yield answer

    def register(server: Any) -> None:
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(run)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))

    serve(ServerConfig((address,), trust, role, state=trust), register).wait()


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]), Role(sys.argv[3]), int(sys.argv[4]))
