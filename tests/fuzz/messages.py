"""Every RPC of the three services, from raw bytes: the request parser, then the handler, in this process.

What may come out: no message, an answer, or a VtlabError. Requests are built by the descriptors, so that a new RPC or
field is fuzzed without a change here.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tests.fuzz.target import Target, mutated
from tests.unit.vmm.fakes import FakeLevel
from vmm.journal import Journal
from vmm.machines import Machines
from vmm.service import VmmService
from vtl0_guest.service import VcpuService as GuestVcpuService
from vtl0_guest.session import Guest
from vtl1_monitor.monitor import Monitor
from vtl1_monitor.service import MonitorService
from vtl1_monitor.service import VcpuService as MonitorVcpuService
from vtlab import vcpu_rpc
from vtlab.errors import VtlabError
from vtlab.ram import create_ram_files
from vtlab.v1 import monitor_pb2_grpc, registers_pb2, vcpu_pb2, vmm_pb2, vmm_pb2_grpc

RAM = 2 << 20
RENEW_AFTER = 1_000
_ENDS = ("Detach", "DestroyMachine", "Attach")  # rare, since little is left to reach afterwards
_TEXTS = ["", "vm", "vm", "vm", "other", "native", "kvm", "openvmm", "policy", "../x", "a" * 300, "\u2603"]
_NUMBERS = [
    0,
    0,
    1,
    1,
    2,
    3,
    4,
    63,
    64,
    4096,
    RAM,
    RAM - 8,
    1 << 20,
    0x7FFF_FFFF,
    (1 << 32) - 1,
    1 << 40,
    (1 << 64) - 1,
]
# Names of fields that would make a handler wait for what never comes, with the value that does not.
_AT_ONCE = {"until_now": True}
_MOST_ANSWERS = 16


class Context:
    """A call whose caller is gone already: streams end at once."""

    def add_callback(self, _callback: Callable[[], None]) -> bool:
        return False

    def is_active(self) -> bool:
        return False


class _Processor:
    def run(self, enter: vcpu_pb2.Enter) -> bytes:
        return vcpu_pb2.Exit(vp_index=enter.vp_index, output=vcpu_pb2.Output()).SerializeToString()

    def kick(self) -> None:
        return

    def state(self) -> registers_pb2.ProcessorState:
        return registers_pb2.ProcessorState()


class _Level:
    """VTL0 without a core, which the core's own tests have."""

    def __init__(self, request: vcpu_pb2.AttachRequest) -> None:
        self.processors = [_Processor() for _ in range(request.vp_count)]

    def watch(self, woken: Callable[[int], None]) -> None:
        return

    def pending_vector(self, vp_index: int) -> int | None:
        return None

    def close(self) -> None:
        return


class _Handlers:
    """Stands in for a server while services are added."""

    def __init__(self) -> None:
        self.by_rpc: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        return

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.by_rpc |= {f"{service}/{name}": handler for name, handler in handlers.items()}


class MessageTarget(Target):
    """A VMM with a machine, a guest process and a monitor that serve one."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtlab-fuzz-")
        self._rounds = 0
        self._steps = 0
        self._machines: Machines | None = None
        self._guest: Guest | None = None
        self._monitor: Monitor | None = None
        self._handlers: list[tuple[str, Any, type[Message]]] = []
        self._seeds: dict[str, list[bytes]] = {}

    def close(self) -> None:
        for part in (self._machines, self._guest, self._monitor):
            if part is not None:
                part.close()
        self._folder.cleanup()

    def _renew(self) -> None:
        for part in (self._machines, self._guest, self._monitor):
            if part is not None:
                part.close()
        self._rounds += 1
        folder = Path(self._folder.name) / str(self._rounds)
        folder.mkdir()
        create_ram_files(folder, RAM)
        (folder / "image").write_bytes(b"\xf4")
        self._machines = Machines(folder / "vmm", FakeLevel, Journal(folder / "journal"))
        sha256, _ = self._machines.images.add([b"\xf4"])
        image = vcpu_pb2.BootImage(sha256=sha256)
        self._machines.create("vm", vmm_pb2.MachineSpec(ram_size=RAM, vp_count=2, vtl1=True, image=image))
        self._guest, self._monitor = Guest(_Level), Monitor()
        attach = vcpu_pb2.AttachRequest(
            vm="vm",
            generation=1,
            vp_count=2,
            ram_size=RAM,
            memory_directory=str(folder),
            image=vcpu_pb2.BootImage(path="image"),
        )
        self._guest.attach(attach)
        attach.vtl = 1
        self._monitor.attach(attach)
        self._handlers = self._table(self._machines, self._guest, self._monitor)

    @staticmethod
    def _table(machines: Machines, guest: Guest, monitor: Monitor) -> list[tuple[str, Any, type[Message]]]:
        found = []
        for name, add in (
            ("vmm", lambda server: vmm_pb2_grpc.add_VmmServiceServicer_to_server(VmmService(machines), server)),
            ("guest", lambda server: vcpu_rpc.add_to_server(GuestVcpuService(guest), server)),
            ("monitor", lambda server: vcpu_rpc.add_to_server(MonitorVcpuService(monitor), server)),
            ("monitor", lambda s: monitor_pb2_grpc.add_MonitorServiceServicer_to_server(MonitorService(monitor), s)),
        ):
            handlers = _Handlers()
            cast(Any, add)(handlers)
            for rpc, handler in handlers.by_rpc.items():
                found.append((f"{name} {rpc.rpartition('/')[2]}", handler, _request_type(rpc)))
        return found

    def step(self, rng: random.Random) -> str:
        if self._steps % RENEW_AFTER == 0:
            self._renew()
        self._steps += 1
        name, handler, kind = rng.choice(self._handlers)
        while name.endswith(_ENDS) and rng.random() < 0.95:
            name, handler, kind = rng.choice(self._handlers)
        requests = [self._request(rng, name, kind) for _ in range(rng.choice((1, 1, 2, 5)))]
        parsed = (handler.request_deserializer(request) for request in requests)
        context = cast(grpc.ServicerContext, Context())
        try:
            if handler.request_streaming:
                given: Any = parsed
            else:
                given = _at_once(next(parsed))
            if handler.response_streaming:
                behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
                for _, answer in zip(range(_MOST_ANSWERS), behaviour(given, context), strict=False):
                    handler.response_serializer(answer)
            else:
                behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
                handler.response_serializer(behaviour(given, context))
        except DecodeError:
            return f"{name}: no message"
        except VtlabError:
            return f"{name}: refused"
        return f"{name}: answered"

    def _request(self, rng: random.Random, name: str, kind: type[Message]) -> bytes:
        seeds = self._seeds.setdefault(name, [])
        if len(seeds) < 20 or rng.random() < 0.5:
            data = _message(rng, kind, 3).SerializeToString()
            if len(seeds) < 200:
                seeds.append(data)
            if rng.random() < 0.7:
                return data
        return mutated(rng, seeds, 1 << 14)


def _request_type(rpc: str) -> type[Message]:
    from google.protobuf import descriptor_pool, message_factory

    service, _, method = rpc.partition("/")
    descriptor = cast(Any, descriptor_pool.Default()).FindServiceByName(service).FindMethodByName(method)
    return message_factory.GetMessageClass(descriptor.input_type)


def _at_once(request: Any) -> Any:
    for name, value in _AT_ONCE.items():
        if name in request.DESCRIPTOR.fields_by_name:
            setattr(request, name, value)
    return request


def _message(rng: random.Random, kind: type[Message], depth: int) -> Message:
    """A message of that type with about half of its fields set."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.5:
            continue
        for _ in range(rng.choice((1, 2, 5)) if field.is_repeated else 1):
            with suppress(ValueError, TypeError, AttributeError):
                _set(rng, message, field, depth)
    return message


def _set(rng: random.Random, message: Any, field: Any, depth: int) -> None:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if depth and not field.message_type.GetOptions().map_entry:
            inner = _message(rng, field.message_type._concrete_class, depth - 1)
            place = getattr(message, field.name)
            place.add().CopyFrom(inner) if field.is_repeated else place.CopyFrom(inner)
        return
    if field.type == FieldDescriptor.TYPE_STRING:
        value: Any = rng.choice(_TEXTS)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        value = rng.randbytes(rng.choice((0, 1, 8, 32, 96, 300)))
    elif field.type == FieldDescriptor.TYPE_BOOL:
        value = rng.random() < 0.5
    else:
        value = rng.choice(_NUMBERS) if rng.random() < 0.8 else rng.getrandbits(64)
        value &= (1 << rng.choice((4, 16, 31, 63, 64))) - 1
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)
