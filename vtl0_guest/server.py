"""The process of VTL0: opens a machine's memory with VTL0's rights, builds the core, boots the image, serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from vtl0_guest.cpu.core import Core
from vtl0_guest.cpu.devices.platform import build_platform
from vtl0_guest.cpu.devices.virtual_clock import VirtualClock
from vtl0_guest.images import read_file
from vtl0_guest.loaders import load
from vtl0_guest.service import VcpuService
from vtl0_guest.session import Guest
from vtlab import logs, vcpu_rpc
from vtlab.channels import ServerConfig, serve
from vtlab.errors import BadArgument
from vtlab.process import switch_threads_soon
from vtlab.ram import TURN_FILE, Ram, RamFile
from vtlab.traced import OutsideProcessor
from vtlab.traces import Spans, open_spans
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.vcpu import Processor

_VTL = 0
_PARTY = "vtl0"


class CoreLevel:
    """VTL0 of one machine on the CPU core (vtl0_guest.session.Level).

    Attributes:
        processors: of the core, by VP index.
    """

    def __init__(self, request: vcpu_pb2.AttachRequest, spans: Spans | None = None) -> None:
        """Boots the image of the request, or what is in memory already (AttachRequest.start).

        Raises:
            BadArgument: the memory files are not there or have another size.
            BadImage: the image or a module cannot be loaded.
        """
        folder = Path(request.memory_directory)
        try:
            self._ram = Ram(folder, request.ram_size, _PARTY)
        except (OSError, ValueError) as error:
            raise BadArgument("memory_directory", str(error)) from None
        with ExitStack() as undo:
            undo.callback(self._ram.close)
            state = request.start if request.HasField("start") else _load(request, folder, self._ram)
            seed = request.seed if request.deterministic else None
            virtual = VirtualClock() if request.deterministic else None
            self._platform = build_platform(request.vp_count, request.ram_size, virtual)
            self._core = Core(self._ram, request.vp_count, _VTL, self._platform, seed=seed)
            undo.callback(self._core.close)
            if request.personality == vcpu_pb2.PERSONALITY_GUEST_CODE:
                self._core.share(folder / TURN_FILE)
            if request.HasField("reference"):
                clock = request.reference
                self._core.reference.adopt(clock.scale, clock.offset, clock.tsc_hz)
            processors = [self._core.processor(index) for index in range(request.vp_count)]
            processors[0].load_state(state)
            undo.pop_all()
        self.processors: Sequence[Processor] = processors
        if spans is not None:
            self.processors = [OutsideProcessor(one, spans) for one in self.processors]

    def watch(self, woken: Callable[[int], None]) -> None:
        """Tells both the core and `woken`."""
        core_wakes = self._platform.on_wake

        def on_wake(vp_index: int) -> None:
            core_wakes(vp_index)
            woken(vp_index)

        self._platform.on_wake = on_wake

    def pending_vector(self, vp_index: int) -> int | None:
        return self._platform.pending_vector(vp_index)

    def close(self) -> None:
        self._core.close()
        self._ram.close()


def _load(request: vcpu_pb2.AttachRequest, folder: Path, ram: Ram) -> registers_pb2.ProcessorState:
    """Reads the files of the image and loads them into RAM."""
    boot = request.image
    image = read_file(folder, boot.path, boot.sha256)
    modules = [read_file(folder, module.path, module.sha256) for module in boot.modules]
    memory = ram.views[RamFile.WRITABLE]

    def write(gpa: int, data: bytes) -> None:
        memory[gpa : gpa + len(data)] = data

    return load(image, boot, modules, write, ram.size, request.vp_count)


def main(config: ServerConfig) -> None:
    """Serves VcpuService until SIGTERM or SIGINT. To be called in the main thread."""
    logs.configure(config.role, config.log_format)
    switch_threads_soon()
    spans = open_spans("" if "://" in config.traces else config.traces, config.role)
    guest = Guest(partial(CoreLevel, spans=spans))
    server = serve(config, partial(vcpu_rpc.add_to_server, VcpuService(guest)))
    try:
        server.wait(grace=0.2)
    finally:
        guest.close()
        if spans is not None:
            spans.close()
