"""One machine: lifecycle, state, memory, serial ports, events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

from vtlab.client.calls import BackgroundStream, call, repeated, stream
from vtlab.client.names import RegisterContent, event_kinds, register_values, state_name
from vtlab.client.serial import ENDED, Observed, Pattern, SerialReader, events_of
from vtlab.errors import BadArgument, BadImage, NotFound, PeerUnavailable, VtlabError, WrongState
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2, vmm_pb2_grpc

MEMORY_CHUNK = 1 << 20  # bytes; the contract's limit for one read or write
PAGE_SIZE = 4096
# MC0_STATUS: VAL, UC, EN, MISCV, ADDRV, S; a memory scrubbing error (Intel SDM volume 3, 16.9.3).
MEMORY_ERROR = 0xBD00_0000_0000_00C0
_WATCHED = (vmm_pb2.EVENT_KIND_STATE, vmm_pb2.EVENT_KIND_SERIAL)


def _check_address(name: str, value: int) -> None:
    if not 0 <= value < 1 << 64:
        raise BadArgument(name, f"{value:#x} is no 64-bit address")


class Machine:
    """A machine of a VMM. As a context manager it destroys the machine at the end.

    Attributes:
        name: as the VMM knows it; str() gives it too.
    """

    def __init__(self, stub: vmm_pb2_grpc.VmmServiceStub, peer: str, name: str, image_name: str = "") -> None:
        """Attaches to a machine that exists; Lab.create() makes one."""
        self.name = name
        self._stub = stub
        self._peer = peer
        self._image_name = image_name
        self._observed = Observed(f"machine '{name}'")

        def request() -> vmm_pb2.WatchEventsRequest:
            following = self._observed.following
            return vmm_pb2.WatchEventsRequest(vm=name, kinds=_WATCHED, from_sequence=following, batches=True)

        self._watch = BackgroundStream(peer, stub.WatchEvents, request, self._observed.take, self._observed.fail)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<Machine '{self.name}' of {self._peer}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.destroy()
        except NotFound:
            self.close()
        except VtlabError:
            self.close()
            if error is None:  # an error in the block matters more than that its machine is gone already
                raise

    def close(self) -> None:
        """Stops watching; the machine lives on."""
        self._watch.close()

    # ------------------------------------------------------------------------------------------------- lifecycle

    def info(self) -> vmm_pb2.Machine:
        """State, specification and why it ended, as the VMM holds them now."""
        return repeated(self._peer, self._stub.GetMachine, vmm_pb2.GetMachineRequest(vm=self.name)).machine

    @property
    def state(self) -> vmm_pb2.MachineState.ValueType:
        return self.info().state

    def start(self) -> vmm_pb2.Machine:
        """Boots it. Raises WrongState unless it is CREATED, BadImage if its image cannot be loaded."""
        try:
            return self._move(self._stub.StartMachine, vmm_pb2.StartMachineRequest(vm=self.name))
        except BadImage as error:
            raise BadImage(self._image_name or error.subject, error.detail) from None

    def pause(self) -> vmm_pb2.Machine:
        """Stops its vCPUs where they are."""
        return self._move(self._stub.PauseMachine, vmm_pb2.PauseMachineRequest(vm=self.name))

    def resume(self) -> vmm_pb2.Machine:
        """Goes on from PAUSED."""
        return self._move(self._stub.ResumeMachine, vmm_pb2.ResumeMachineRequest(vm=self.name))

    def stop(self) -> vmm_pb2.Machine:
        """Ends it; its memory can still be read."""
        return self._move(self._stub.StopMachine, vmm_pb2.StopMachineRequest(vm=self.name))

    def reset(self) -> vmm_pb2.Machine:
        """Emulated RESET: VTL1 gone, memory zeroed, the image loaded again, running."""
        return self._move(self._stub.ResetMachine, vmm_pb2.ResetMachineRequest(vm=self.name))

    def guard(self) -> vmm_pb2.Machine:
        """Has the operator's policy (`lab.policy.set`) hold from here on, whatever the guest knows of VTL1.

        Raises:
            Refused: there is none, or the guest is not in a state that it allows; nothing was changed.
            WrongState: VTL1 is not on offer, or is the guest's own code, or the machine does not run.
        """
        return self._move(self._stub.GuardMachine, vmm_pb2.GuardMachineRequest(vm=self.name))

    def set_filters(self, filters: vmm_pb2.UserspaceFilters) -> None:
        """Replaces the filters of a machine of design `cr-filter`; they hold when this returns.

        Raises:
            BadArgument: KVM would refuse them, or a rule makes no sense.
            Unsupported: the machine is of another design.
        """
        request = vmm_pb2.SetUserspaceFiltersRequest(vm=self.name, filters=filters)
        call(self._peer, self._stub.SetUserspaceFilters, request)

    def destroy(self) -> None:
        """Removes it and its memory."""
        call(self._peer, self._stub.DestroyMachine, vmm_pb2.DestroyMachineRequest(vm=self.name))
        self.close()

    def _move(self, method: Any, request: Any) -> vmm_pb2.Machine:
        machine: vmm_pb2.Machine = call(self._peer, method, request).machine
        return machine

    def wait_state(self, *states: vmm_pb2.MachineState.ValueType, timeout: float = 10.0) -> vmm_pb2.Machine:
        """Waits until it is in one of the states, and until all that it said before has arrived.

        Raises:
            TimedOut: it was in another all the time.
            WrongState: it ended in another, which it cannot leave by itself.
        """
        deadline = time.monotonic() + timeout
        wanted = " or ".join(state_name(state) for state in states)
        observed = self._observed
        while True:
            seen = observed.state_changes
            machine = self.info()
            if machine.state in states:
                break
            if machine.state in ENDED:
                name = state_name(machine.state)
                detail = f"is {name} ({machine.reason or 'no reason given'}), not {wanted}"
                raise WrongState(f"machine '{self.name}'", detail, state=name, operation="wait")
            left = deadline - time.monotonic()
            observed.wait(f"state {wanted}", partial(observed.changed_since, seen), timeout, False, left)
        if observed.machine.state != machine.state:
            what = f"event of state {state_name(machine.state)}"
            left = max(deadline - time.monotonic(), 1.0)
            observed.wait(what, partial(observed.shows, machine.state), timeout, False, left)
        return machine

    # ------------------------------------------------------------------------------------------------- registers

    def registers(self, vp_index: int = 0) -> registers_pb2.ProcessorState:
        """VTL0's state of one vCPU; a running one is stopped for an instant."""
        request = vmm_pb2.GetRegistersRequest(vm=self.name, vp_index=vp_index)
        return repeated(self._peer, self._stub.GetRegisters, request).state

    def set_registers(
        self,
        registers: Mapping[str, RegisterContent] | None = None,
        msrs: Mapping[int, int] | None = None,
        vp_index: int = 0,
    ) -> registers_pb2.ProcessorState:
        """Writes registers by name ("rax", "cr0", "gdtr") and MSRs by index; returns the state after it.

        Raises:
            Refused: VTL1 guards one of them.
        """
        request = vmm_pb2.SetRegistersRequest(
            vm=self.name,
            vp_index=vp_index,
            registers=register_values(registers or {}),
            msrs=[registers_pb2.MsrValue(index=index, value=value) for index, value in (msrs or {}).items()],
        )
        return repeated(self._peer, self._stub.SetRegisters, request).state

    def hijack(
        self,
        code: bytes = b"",
        code_gpa: int = 0,
        registers: Mapping[str, RegisterContent] | None = None,
        resume: bool = True,
        vp_index: int = 0,
    ) -> registers_pb2.ProcessorState:
        """Pauses, places code and registers, and resumes if asked: an attacker's debugger. Returns the state before."""
        request = vmm_pb2.HijackRequest(
            vm=self.name,
            vp_index=vp_index,
            code=code,
            code_gpa=code_gpa,
            registers=register_values(registers or {}),
            resume=resume,
        )
        return call(self._peer, self._stub.Hijack, request).before

    # ---------------------------------------------------------------------------------------------------- memory

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Bytes at a guest-physical address, with VTL0's rights. Raises Refused, BadArgument."""
        _check_address("gpa", gpa)
        data = bytearray()
        while len(data) < size:
            request = vmm_pb2.ReadMemoryRequest(
                vm=self.name, gpa=gpa + len(data), size=min(size - len(data), MEMORY_CHUNK)
            )
            part = repeated(self._peer, self._stub.ReadMemory, request).data
            if not part:
                raise PeerUnavailable(self._peer, f"returned no bytes for GPA {gpa + len(data):#x}")
            data += part
        return bytes(data)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Writes at a guest-physical address, with VTL0's rights. Raises Refused, BadArgument."""
        _check_address("gpa", gpa)
        for start in range(0, len(data), MEMORY_CHUNK):
            part = data[start : start + MEMORY_CHUNK]
            request = vmm_pb2.WriteMemoryRequest(vm=self.name, gpa=gpa + start, data=part)
            repeated(self._peer, self._stub.WriteMemory, request)

    def translate(self, gva: int, vp_index: int = 0) -> vmm_pb2.TranslateResponse:
        """Walks VTL0's page tables for a guest-virtual address."""
        _check_address("gva", gva)
        request = vmm_pb2.TranslateRequest(vm=self.name, vp_index=vp_index, gva=gva)
        return repeated(self._peer, self._stub.Translate, request)

    def read_virtual(self, gva: int, size: int, vp_index: int = 0) -> bytes:
        """Bytes at a guest-virtual address, page by page. Raises BadArgument where it is not mapped."""
        data = bytearray()
        while len(data) < size:
            at = gva + len(data)
            walk = self.translate(at, vp_index)
            if not walk.present:
                raise BadArgument(f"address {at:#x}", "is not mapped")
            data += self.read_memory(walk.gpa, min(size - len(data), PAGE_SIZE - at % PAGE_SIZE))
        return bytes(data)

    def inject_nmi(self, vp_index: int = 0) -> None:
        """The NMI button. Raises WrongState unless it runs or is paused."""
        call(self._peer, self._stub.Inject, vmm_pb2.InjectRequest(vm=self.name, vp_index=vp_index, nmi=True))

    def inject_machine_check(
        self, address: int, status: int = MEMORY_ERROR, mcg_status: int = 1, vp_index: int = 0
    ) -> vmm_pb2.Machine:
        """A memory error at a guest-physical address; what became of the machine.

        Args:
            status: MC0_STATUS; by default an uncorrected error that software may leave aside.
            mcg_status: 1 if the interrupted code can go on (RIPV).

        Raises:
            WrongState, Unsupported: it does not run, or its VTL1 is guest code.
        """
        error = vcpu_pb2.MachineCheck(status=status, address=address, mcg_status=mcg_status)
        request = vmm_pb2.InjectRequest(vm=self.name, vp_index=vp_index, machine_check=error)
        return self._move(self._stub.Inject, request)

    def read_disk(self, offset: int, size: int) -> bytes:
        """Bytes of its disk, also while it is off. Raises BadArgument, Unsupported without a disk."""
        data = bytearray()
        while len(data) < size:
            part = min(size - len(data), MEMORY_CHUNK)
            request = vmm_pb2.ReadDiskRequest(vm=self.name, offset=offset + len(data), size=part)
            data += repeated(self._peer, self._stub.ReadDisk, request).data
        return bytes(data)

    def write_disk(self, offset: int, data: bytes) -> None:
        """Writes to its disk, as whoever holds it can. Raises BadArgument, Unsupported without a disk."""
        for start in range(0, len(data), MEMORY_CHUNK):
            part = data[start : start + MEMORY_CHUNK]
            request = vmm_pb2.WriteDiskRequest(vm=self.name, offset=offset + start, data=part)
            repeated(self._peer, self._stub.WriteDisk, request)

    # ---------------------------------------------------------------------------------------- serial and events

    def write_serial(self, port: int, data: str | bytes) -> None:
        """Types at a serial port: 0 is COM1, 1 is COM2."""
        raw = data.encode() if isinstance(data, str) else data
        call(self._peer, self._stub.WriteSerial, vmm_pb2.WriteSerialRequest(vm=self.name, port=port, data=raw))

    def serial(self, port: int = 0) -> str:
        """All that a port said since this object watches."""
        return self._observed.output(port).decode("utf-8", "replace")

    def serial_reader(self, port: int = 0, from_now: bool = False) -> SerialReader:
        """Reads a port from the start, or from what comes now."""
        return SerialReader(self._observed, port, len(self._observed.output(port)) if from_now else 0)

    def wait_serial(self, pattern: Pattern, port: int = 0, timeout: float = 10.0) -> str:
        """Waits until the port has said a text or regular expression; returns all from the start to its end.

        Raises:
            TimedOut: it did not come.
            WrongState: the machine ended, so it cannot come.
        """
        return SerialReader(self._observed, port).read_until(pattern, timeout)

    def events(
        self, kinds: Iterable[str | int] = (), from_sequence: int = 0, until_now: bool = False
    ) -> Iterator[vmm_pb2.Event]:
        """Events as they come, from the oldest kept or a number on, until the iterator is closed.

        Args:
            kinds: names ("verdict", "exit", …) or numbers; none means all.
            from_sequence: first number wanted; 0 is the oldest kept.
            until_now: end with the last one that is recorded already.
        """
        request = vmm_pb2.WatchEventsRequest(
            vm=self.name, from_sequence=from_sequence, kinds=event_kinds(kinds), until_now=until_now, batches=True
        )
        return self._follow(request)

    def _follow(self, request: vmm_pb2.WatchEventsRequest) -> Iterator[vmm_pb2.Event]:
        """Goes on behind the last event if the VMM is restarted."""
        while True:
            try:
                for answer in stream(self._peer, self._stub.WatchEvents, request):
                    for event in events_of(answer):
                        yield event
                        request.from_sequence = event.sequence + 1
                return
            except PeerUnavailable:
                self.info()  # returns once the VMM is back
