"""What this process knows: one machine, or none. Attaching, detaching, and finding the vCPU of a request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from vtlab.errors import BadArgument, Conflict, NotFound, WrongState
from vtlab.ram import PAGE_SIZE
from vtlab.session import Execute
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.vcpu import Processor, Vcpu, Wakes

MAX_PROCESSORS = 64
# Seconds that a kicked vCPU may take to exit.
STOP_TIMEOUT = 5.0


class Level(Protocol):
    """One level of one machine, ready to run (server.py builds it from the core)."""

    @property
    def processors(self) -> Sequence[Processor]:
        """By VP index."""
        ...

    def watch(self, woken: Callable[[int], None]) -> None:
        """`woken` is called with a VP index when an interrupt may have become deliverable there."""
        ...

    def pending_vector(self, vp_index: int) -> int | None:
        """The interrupt that could be delivered there."""
        ...

    def close(self) -> None:
        """Unmaps and forgets everything; nothing runs by then."""
        ...


class _Attached:
    def __init__(self, request: vcpu_pb2.AttachRequest, level: Level) -> None:
        self.request = request
        self.level = level
        self.vcpus = [Vcpu(index, request.vtl, processor) for index, processor in enumerate(level.processors)]


class Guest:
    """The machine that this process is attached to."""

    def __init__(self, build: Callable[[vcpu_pb2.AttachRequest], Level]) -> None:
        """`build` makes a level from a request that has been checked; it raises BadImage, BadArgument or OSError."""
        self._build = build
        self._lock = threading.Lock()
        self._attached: _Attached | None = None
        self._wakes = Wakes()

    def attach(self, request: vcpu_pb2.AttachRequest) -> None:
        """Binds to a machine; a higher generation of the same one replaces it, the same one again changes nothing.

        Raises:
            BadArgument: a field is out of range.
            Conflict: a lower generation, or the same one with another content.
            WrongState: attached to another machine, or a vCPU of the old generation cannot be stopped.
            What `build` raises; this process is then attached to nothing.
        """
        _check(request)
        with self._lock:
            if self._attached is not None:
                if self._is_repeated(self._attached, request):
                    return
                self._close(self._attached)
                self._attached = None
            level = self._build(request)
            self._attached = _Attached(request, level)
            level.watch(self._woken)

    def reconnect(self, vm: str, generation: int) -> list[vcpu_pb2.Enter]:
        """The last enter of each vCPU. Raises NotFound unless that generation of the machine is attached."""
        attached = self._attached
        if attached is None or (attached.request.vm, attached.request.generation) != (vm, generation):
            raise NotFound(f"generation {generation} of machine {vm}", "this process holds nothing of it")
        return [vcpu.last_enter for vcpu in attached.vcpus]

    def _is_repeated(self, attached: _Attached, request: vcpu_pb2.AttachRequest) -> bool:
        old = attached.request
        if request.vm != old.vm:
            raise WrongState(f"machine {request.vm}", f"this process is attached to machine {old.vm}")
        if request.generation < old.generation or (request.generation == old.generation and request != old):
            raise Conflict(f"machine {request.vm}", f"generation {request.generation} after {old.generation}")
        return request.generation == old.generation

    def _close(self, attached: _Attached) -> None:
        for vcpu in attached.vcpus:
            if not vcpu.stop(STOP_TIMEOUT):
                raise WrongState(vcpu.name, state="running", operation="let go of its machine")
        attached.level.close()

    def detach(self, vm: str) -> None:
        """Forgets the machine, if any. Raises WrongState for another one, or if a vCPU cannot stop."""
        with self._lock:
            if self._attached is None:
                return
            if self._attached.request.vm != vm:
                raise WrongState(f"machine {vm}", f"this process is attached to machine {self._attached.request.vm}")
            self._close(self._attached)
            self._attached = None

    def stream(self, vp_index: int) -> Execute:
        """Begins a stream of a vCPU: see Vcpu.stream. Raises NotFound, WrongState."""
        execute = self._vcpu(vp_index).stream()

        def answer(enter: vcpu_pb2.Enter) -> bytes:
            exit_ = execute(enter)
            if self._wakes.heard:
                self._woken(vp_index)  # what came while it ran, and was not taken before it left
            return exit_

        return answer

    def kick(self, vp_index: int, sequence: int) -> bool:
        """False if that enter has exited already."""
        return self._vcpu(vp_index).kick(sequence)

    def state(self, vp_index: int) -> registers_pb2.ProcessorState:
        """Raises WrongState while that vCPU runs."""
        return self._vcpu(vp_index).state()

    def events(self, on_end: Callable[[Callable[[], None]], object]) -> Iterator[vcpu_pb2.EventsResponse]:
        """Interrupts that became deliverable on vCPUs that were not entered, from now on.

        Args:
            on_end: is given a function that ends the iteration, from any thread; returns False if it should end now.
        """
        return self._wakes.stream(on_end)

    def close(self) -> None:
        """Ends what runs and forgets the machine. To be called once, when no new calls are taken."""
        self._wakes.close()
        with self._lock:
            attached, self._attached = self._attached, None
            if attached is not None:
                self._close(attached)

    def _vcpu(self, vp_index: int) -> Vcpu:
        attached = self._attached
        if attached is None:
            raise WrongState("vtl0_guest", "is not attached to a machine")
        if vp_index >= len(attached.vcpus):
            raise NotFound(f"vCPU {vp_index}", f"the machine has {len(attached.vcpus)}")
        return attached.vcpus[vp_index]

    def _woken(self, vp_index: int) -> None:
        """Runs on the thread that raised the interrupt. A vCPU that runs takes it by itself."""
        attached = self._attached
        if attached is None or not self._wakes.heard or attached.vcpus[vp_index].running:
            return
        vector = attached.level.pending_vector(vp_index)
        if vector is not None:
            self._wakes.report(vp_index, vector, attached.vcpus[vp_index].exited)


def _check(request: vcpu_pb2.AttachRequest) -> None:
    if not request.vm:
        raise BadArgument("vm", "is empty")
    if request.vtl != 0:
        raise BadArgument("vtl", f"{request.vtl}: this process is VTL0")
    if not 1 <= request.vp_count <= MAX_PROCESSORS:
        raise BadArgument("vp_count", f"{request.vp_count} is not between 1 and {MAX_PROCESSORS}")
    if request.deterministic and request.personality == vcpu_pb2.PERSONALITY_GUEST_CODE:
        raise BadArgument("deterministic", "runs do not repeat where both levels run guest code")
    if not request.ram_size or request.ram_size % PAGE_SIZE:
        raise BadArgument("ram_size", f"{request.ram_size} is not a positive multiple of {PAGE_SIZE}")
