"""Servers and channels: mutual TLS everywhere, one gate, bounded waits.

An address is `unix:/path` or `HOST:PORT`, where HOST is a loopback address unless the configuration allows others and
port 0 asks for any free one.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import grpc
import tenacity
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vtlab.errors import BadArgument, PeerUnavailable, PermissionDenied
from vtlab.logs import LogFormat
from vtlab.process import spare_collections, termination
from vtlab.status import from_rpc_error
from vtlab.trust import servers
from vtlab.trust.certificates import load_credentials, own_part, server_name
from vtlab.trust.interceptor import Gate
from vtlab.trust.revocation import Revocations
from vtlab.trust.roles import Role

if TYPE_CHECKING:
    from grpc_health.v1 import health

_log = logging.getLogger(__name__)

REVOCATION_PERIOD = 0.5  # seconds until a stream notices that its caller's certificate was taken back
MAX_MESSAGE = 4 << 20  # bytes; the largest legal message is 1 MiB of memory or image with its envelope

# `grpc.minimal_stack` would save a tenth of a round trip, but takes the limits on message sizes away, and each of our
# processes has a peer that it does not trust.
_LIMITS = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
_SERVER_OPTIONS = [*_LIMITS, ("grpc.so_reuseport", 0), ("grpc.max_metadata_size", 16 << 10)]
_CHANNEL_OPTIONS = [
    *_LIMITS,
    ("grpc.enable_retries", 0),  # an RPC that changes state is repeated by who knows what it means, or not at all
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 200),  # a process that was restarted is back within half a second
    ("grpc.use_local_subchannel_pool", 1),
]


class Ready(Protocol):
    """Where a server reports its bound addresses: the sending end of a multiprocess pipe, for example."""

    def send(self, obj: Any, /) -> None: ...


@dataclass(frozen=True)
class ServerConfig:
    """All that a server process is told.

    Attributes:
        listen: addresses to serve on.
        trust: folder with ca.pem, ROLE.pem and ROLE.key, or a whole trust folder.
        role: who this server is.
        state: folder for what it keeps while it runs; for the VMM also the memory files.
        memory: for the levels, the VMM's state folder.
        ready: gets the tuple of bound addresses once the server answers.
        guest, monitor: for the VMM, where the two levels are served.
        rules: for the monitor, rules in Python that the launcher shipped.
        allow_any_address: permits listening beyond loopback, for a network of containers only.
        log_format: of what it logs, see vtlab.logs.
        metrics: HOST:PORT for Prometheus, "" for none; see vtlab.metrics.
        traces: where spans of VTL switches go, "" for nowhere; see vtlab.traces.
        restart_budget: for the VMM, seconds that a level may be away.
        workers: calls served at once, streams included; more are refused with RESOURCE_EXHAUSTED.
    """

    listen: tuple[str, ...]
    trust: Path
    role: str
    state: Path
    ready: Ready | None = None
    guest: str = ""
    monitor: str = ""
    rules: Any = None
    restart_budget: float = 45.0  # less than a client waits for a VMM that waits
    allow_any_address: bool = False
    log_format: str = LogFormat.TEXT.value
    metrics: str = ""
    traces: str = ""
    workers: int = 128
    memory: Path = Path("/nonexistent")


class BoundServer:
    """A server that answers.

    Attributes:
        addresses: where, in the order of the configuration, with the ports that were chosen.
    """

    def __init__(
        self,
        role: Role,
        server: grpc.Server,
        gate: Gate,
        health_servicer: health.HealthServicer,
        addresses: tuple[str, ...],
    ) -> None:
        self._role = role
        self._server = server
        self._gate = gate
        self._health = health_servicer
        self._stopped = threading.Event()
        self.addresses = addresses
        threading.Thread(target=self._watch_revocations, name="revocations", daemon=True).start()

    def _watch_revocations(self) -> None:
        while not self._stopped.wait(REVOCATION_PERIOD):
            self._gate.end_revoked()

    def wait(self, grace: float = 1.0) -> None:
        """Serves until SIGTERM or SIGINT, then drains. To be called in the main thread."""
        termination().wait()
        self.stop(grace)

    def stop(self, grace: float = 1.0) -> None:
        """Says that it is not serving, takes no new calls, gives those in progress `grace` seconds, and ends."""
        _log.info("%s drains", self._role)
        self._stopped.set()
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()


class _Recorder:
    """Stands in for the server while services are added, and notes their names for health and reflection."""

    def __init__(self, server: grpc.Server) -> None:
        self._server = server
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        self._server.add_generic_rpc_handlers(handlers)
        self.services += [h.service_name() for h in handlers if isinstance(h, grpc.ServiceRpcHandler)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


def check_address(address: str, allow_any: bool = False) -> None:
    """Raises BadArgument unless a server may listen there."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path.startswith("/"):
            raise BadArgument(f"address {address!r}", "a Unix socket needs an absolute path, unix:/path")
        if len(path.encode()) > 107:
            raise BadArgument(f"address {address!r}", "the path of a Unix socket has at most 107 bytes")
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 0xFFFF:
        raise BadArgument(f"address {address!r}", "expected unix:/path or HOST:PORT")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not allow_any:
        raise BadArgument(
            f"address {address!r}", "is not on loopback; allow it explicitly inside a private network only"
        )


def serve(config: ServerConfig, register: Callable[[grpc.Server], Any]) -> BoundServer:
    """Starts a server with mutual TLS, the gate, health and reflection.

    Args:
        config: its `ready` gets the bound addresses when all is up.
        register: adds the services, as the generated add_…_to_server do.

    Raises:
        BadArgument: an address is malformed, taken, or not on loopback.
        PeerUnavailable: no credentials in the trust folder.
    """
    for address in config.listen:
        check_address(address, config.allow_any_address)
    role = Role(config.role)
    gate = Gate(role, Revocations(own_part(config.trust, role)))
    server = grpc.server(
        ThreadPoolExecutor(config.workers, thread_name_prefix=role),
        interceptors=[gate],
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=config.workers,
    )
    recorder = _Recorder(server)
    register(cast(grpc.Server, recorder))
    from grpc_health.v1 import health  # clients need none of it
    from grpc_reflection.v1alpha import reflection

    health_servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*recorder.services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    addresses = tuple(
        _bind(server, address, _Certificates(config.trust, role).credentials()) for address in config.listen
    )
    server.start()
    for service in ("", *recorder.services):
        health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    spare_collections()
    if config.ready is not None:
        config.ready.send(addresses)
    return BoundServer(role, server, gate, health_servicer, addresses)


class _Certificates:
    """What a server shows and believes at each handshake of one address: its files as they are then."""

    def __init__(self, trust: Path, role: Role) -> None:
        self._trust, self._role = trust, role
        self._last = own_part(trust, role) / "ca.pem"  # written after the two others
        self._seen = (0, 0)

    def credentials(self) -> grpc.ServerCredentials:
        """Raises PeerUnavailable."""
        news = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._news)  # None is allowed, but not typed
        return grpc.dynamic_ssl_server_credentials(self._configuration(), news, True)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        seen = self._identity()
        own = load_credentials(self._trust, self._role)
        self._seen = seen
        return grpc.ssl_server_certificate_configuration([(own.key, own.certificate)], own.authority)

    def _news(self) -> grpc.ServerCertificateConfiguration | None:
        """None as long as nothing changed, or where what is there cannot be read: what was shown is shown again."""
        try:
            return self._configuration() if self._identity() != self._seen else None
        except (OSError, PeerUnavailable) as error:
            _log.warning("certificates of the %s stay as they were: %s", self._role, error)
            return None

    def _identity(self) -> tuple[int, int]:
        try:
            status = self._last.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns


def _bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials) -> str:
    # A socket's mode is 0660, for the folder's group: who gets near it is decided by the folder, who gets in by TLS. It
    # is made so, since the guest process may change no mode (vtlab.confinement).
    mask = os.umask(0o117)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        raise BadArgument(f"address {address!r}", "cannot be bound: taken, or not of this machine") from None
    finally:
        os.umask(mask)
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def channel_to(address: str, trust: Path, role: Role | str, peer: Role | str) -> grpc.Channel:
    """A channel to a server that may not be there yet: calls fail with PeerUnavailable until it is.

    Args:
        address: where it listens.
        trust: see ServerConfig.
        role: who we are.
        peer: who must be there; a server with another role's certificate is not spoken to.

    Raises:
        PeerUnavailable: no credentials in the trust folder, or no list of servers that are still good.
    """
    own = load_credentials(trust, role)
    credentials = grpc.ssl_channel_credentials(servers.roots(trust, role), own.key, own.certificate)
    options = [*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name(peer))]
    return grpc.secure_channel(address, credentials, options=options)


def dial(address: str, trust: Path, role: Role | str, peer: Role | str, timeout: float = 10.0) -> grpc.Channel:
    """channel_to() a server that has answered a health check.

    Args:
        address, trust, role, peer: see channel_to().
        timeout: seconds to wait for it to come up; attempts are spread with jitter.

    Raises:
        PeerUnavailable: nobody answered, or somebody else did.
    """
    channel = channel_to(address, trust, role, peer)
    name = f"{peer} at {address}"
    try:
        _await_health(channel, name, timeout)
    except BaseException:
        channel.close()
        raise
    return channel


def _await_health(channel: grpc.Channel, name: str, timeout: float) -> None:
    check = cast(Any, health_pb2_grpc.HealthStub(channel)).Check
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_delay(timeout),
        wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.25),
        retry=tenacity.retry_if_exception_type(PeerUnavailable),
        reraise=True,
    )
    try:
        attempts(_check_once, check, name, min(timeout, 2.0))
    except PeerUnavailable as error:
        raise PeerUnavailable(name, f"no answer in {timeout:g} s: {error.detail}") from None


def _check_once(check: Callable[..., health_pb2.HealthCheckResponse], name: str, timeout: float) -> None:
    try:
        answer = check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.RpcError as error:
        failure = from_rpc_error(error, name)
        if isinstance(failure, PermissionDenied):
            raise failure from None
        raise PeerUnavailable(name, failure.detail) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise PeerUnavailable(name, "is shutting down")
