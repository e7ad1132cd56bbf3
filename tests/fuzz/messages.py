"""Every RPC of the three services, from raw bytes: the request parser, then the handler, in this process.

What may come out: no message, an answer, or a VtlabError. Requests are built by the descriptors, so that a new RPC or
field is fuzzed without a change here.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from tests.fuzz.making import RAM, Maker
from tests.fuzz.target import Target
from tests.unit.vmm.fakes import FakeLevel
from vmm import service as vmm_service
from vmm.journal import Journal
from vmm.machines import Machines
from vtl0_guest.service import VcpuService as GuestVcpuService
from vtl0_guest.session import Guest
from vtl1_monitor.monitor import Monitor
from vtl1_monitor.service import MonitorService
from vtl1_monitor.service import VcpuService as MonitorVcpuService
from vtlab import vcpu_rpc
from vtlab.errors import VtlabError
from vtlab.ram import create_ram_files
from vtlab.v1 import monitor_pb2_grpc, registers_pb2, vcpu_pb2, vmm_pb2

RENEW_AFTER = 1_000
_ENDS = ("Detach", "DestroyMachine", "Attach")  # rare, since little is left to reach afterwards
# Less often: they wait for threads or write files, and a thousand others fit into that time.
_LONG = ("ResetMachine", "StopMachine", "Hijack", "UploadImage", "CreateMachine")
# What leads somewhere, by name of a field.
_KNOWN: dict[str, list[Any]] = {
    "vm": ["vm"],
    "vp_index": [0, 1],
    "generation": [1],
    "vp_count": [1, 2],
    "ram_size": [RAM],
    "gpa": [0, 4096, RAM - 4096, RAM - 8],
    "size": [1, 8, 64, 4096],
    "port": [0, 1, 0x3F8, 0x510, 0xF4],
    "vsm_profile": ["", "native", "kvm", "openvmm"],
    "design": ["", "vtl", "none", "heki-v2", "heki-v3", "cr-filter", "mmio-device"],
}
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
        self._makers: dict[str, Maker] = {}

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
        self._machines = Machines(folder / "vmm", lambda vtl, present=True: FakeLevel(vtl), Journal(folder / "journal"))
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
            image=vcpu_pb2.BootImage(path="image", sha256=sha256),
        )
        self._guest.attach(attach)
        attach.vtl = 1
        self._monitor.attach(attach)
        self._handlers = self._table(self._machines, self._guest, self._monitor)

    @staticmethod
    def _table(machines: Machines, guest: Guest, monitor: Monitor) -> list[tuple[str, Any, type[Message]]]:
        found = []
        for name, add in (
            ("vmm", partial(vmm_service.add_to_server, vmm_service.VmmService(machines))),
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
        while rng.random() < (0.97 if name.endswith(_ENDS) else 0.8 if name.endswith(_LONG) else 0):
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
                    _sent(handler, answer)
            else:
                behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
                _sent(handler, behaviour(given, context))
        except DecodeError:
            return f"{name}: no message"
        except VtlabError:
            return f"{name}: refused"
        return f"{name}: answered"

    def _request(self, rng: random.Random, name: str, kind: type[Message]) -> bytes:
        maker = self._makers.get(name)
        if maker is None:
            maker = self._makers[name] = Maker(kind, _KNOWN)
        if not name.endswith(" Run") or rng.random() < 0.2:
            return maker.data(rng)
        request = maker.message(rng)
        self._number(rng, request.enter, name)
        return cast(bytes, request.SerializeToString())

    def _number(self, rng: random.Random, enter: vcpu_pb2.Enter, name: str) -> None:
        """The next enter of a vCPU, or its last one once more."""
        party = self._guest if name.startswith("guest") else self._monitor
        assert party is not None
        with suppress(VtlabError):
            last = [known.sequence for known in party.reconnect("vm", 1)]
            enter.vp_index = rng.randrange(len(last))
            enter.sequence = last[enter.vp_index] + (rng.random() < 0.9)


def _sent(handler: Any, answer: Any) -> bytes:
    """As gRPC would send it."""
    return cast(bytes, handler.response_serializer(answer) if handler.response_serializer else answer)


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
