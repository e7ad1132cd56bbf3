"""Toy servers for tests of the client and the launcher: a VMM that echoes, and levels that only come up.

What a server does wrong is told by the environment variable VTLAB_TEST_FAULT, "ROLE:FAULT", read by the process itself.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from vtlab.channels import ServerConfig, serve
from vtlab.errors import AlreadyExists, BadImage, NotFound, Refused, Unsupported, WrongState
from vtlab.v1 import monitor_pb2, monitor_pb2_grpc, registers_pb2, vmm_pb2, vmm_pb2_grpc

# operation -> (states in which it is legal, state after it)
MOVES = {
    "start": ({vmm_pb2.MACHINE_STATE_CREATED}, vmm_pb2.MACHINE_STATE_RUNNING),
    "pause": ({vmm_pb2.MACHINE_STATE_RUNNING}, vmm_pb2.MACHINE_STATE_PAUSED),
    "resume": ({vmm_pb2.MACHINE_STATE_PAUSED}, vmm_pb2.MACHINE_STATE_RUNNING),
    "stop": ({vmm_pb2.MACHINE_STATE_RUNNING, vmm_pb2.MACHINE_STATE_PAUSED}, vmm_pb2.MACHINE_STATE_STOPPED),
}


class ToyVmm(vmm_pb2_grpc.VmmServiceServicer):
    """Machines without processors: a serial port echoes in capitals, `quit` stops one, memory is a dictionary."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.machines: dict[str, vmm_pb2.Machine] = {}
        self.log: list[vmm_pb2.Event] = []
        self.memory: dict[int, int] = {}
        self.registers = registers_pb2.ProcessorState()
        self.images: dict[bytes, bytes] = {}

    def post(self, vm: str, **detail: Any) -> None:
        kind = {"state": 1, "serial": 4, "lost": 6}[next(iter(detail))]
        with self.changed:
            event = vmm_pb2.Event(sequence=len(self.log) + 1, vm=vm, kind=vmm_pb2.EventKind.ValueType(kind), **detail)
            self.log.append(event)
            self.changed.notify_all()

    def _machine(self, vm: str) -> vmm_pb2.Machine:
        if vm not in self.machines:
            raise NotFound(f"machine '{vm}'", "no such machine")
        return self.machines[vm]

    def _move(self, vm: str, operation: str, reason: str = "") -> vmm_pb2.Machine:
        machine = self._machine(vm)
        legal, after = MOVES[operation]
        if machine.state not in legal:
            state = vmm_pb2.MachineState.Name(machine.state).removeprefix("MACHINE_STATE_")
            raise WrongState(f"machine '{vm}'", state=state, operation=operation)
        machine.state = after
        machine.reason = reason
        self.post(vm, state=machine)
        return machine

    def UploadImage(self, request_iterator: Iterator[vmm_pb2.UploadImageRequest], context: Any) -> Any:
        data = b"".join(request.chunk for request in request_iterator)
        digest = hashlib.sha256(data).digest()
        self.images[digest] = data
        return vmm_pb2.UploadImageResponse(sha256=digest, size=len(data))

    def CreateMachine(self, request: vmm_pb2.CreateMachineRequest, context: Any) -> Any:
        if request.vm in self.machines:
            raise AlreadyExists(f"machine '{request.vm}'", "the name is taken")
        if self.images[request.spec.image.sha256].startswith(b"bad"):
            raise BadImage("image 1234", "e_machine is 3")
        machine = vmm_pb2.Machine(vm=request.vm, state=vmm_pb2.MACHINE_STATE_CREATED, spec=request.spec)
        self.machines[request.vm] = machine
        self.post(request.vm, state=machine)
        return vmm_pb2.CreateMachineResponse(machine=machine)

    def StartMachine(self, request: vmm_pb2.StartMachineRequest, context: Any) -> Any:
        machine = self._move(request.vm, "start")
        self.post(request.vm, serial={"port": 0, "data": b"hello\n"})
        self._play(machine, self.images[machine.spec.image.sha256])
        return vmm_pb2.StartMachineResponse(machine=machine)

    def _play(self, machine: vmm_pb2.Machine, image: bytes) -> None:
        """An image that says "exit N" or "fail" does so; any other runs on."""
        word, _, number = image.partition(b" ")
        if word == b"exit":
            self.post(machine.vm, serial={"port": 1, "data": b"on COM2\n"})
            machine.debug_exit = int(number)
            self._move(machine.vm, "stop", "debug exit")
        elif word == b"fail":
            machine.state, machine.reason = vmm_pb2.MACHINE_STATE_FAILED, "the core broke"
            self.post(machine.vm, state=machine)

    def PauseMachine(self, request: vmm_pb2.PauseMachineRequest, context: Any) -> Any:
        return vmm_pb2.PauseMachineResponse(machine=self._move(request.vm, "pause"))

    def ResumeMachine(self, request: vmm_pb2.ResumeMachineRequest, context: Any) -> Any:
        return vmm_pb2.ResumeMachineResponse(machine=self._move(request.vm, "resume"))

    def GuardMachine(self, request: vmm_pb2.GuardMachineRequest, context: Any) -> Any:
        raise Unsupported("toy", "has no VTL1")

    def StopMachine(self, request: vmm_pb2.StopMachineRequest, context: Any) -> Any:
        return vmm_pb2.StopMachineResponse(machine=self._move(request.vm, "stop", "by the operator"))

    def ResetMachine(self, request: vmm_pb2.ResetMachineRequest, context: Any) -> Any:
        return vmm_pb2.ResetMachineResponse(machine=self._machine(request.vm))

    def DestroyMachine(self, request: vmm_pb2.DestroyMachineRequest, context: Any) -> Any:
        del self.machines[self._machine(request.vm).vm]
        return vmm_pb2.DestroyMachineResponse()

    def GetMachine(self, request: vmm_pb2.GetMachineRequest, context: Any) -> Any:
        return vmm_pb2.GetMachineResponse(machine=self._machine(request.vm))

    def ListMachines(self, request: vmm_pb2.ListMachinesRequest, context: Any) -> Any:
        return vmm_pb2.ListMachinesResponse(machines=self.machines.values())

    def GetRegisters(self, request: vmm_pb2.GetRegistersRequest, context: Any) -> Any:
        return vmm_pb2.GetRegistersResponse(state=self.registers)

    def SetRegisters(self, request: vmm_pb2.SetRegistersRequest, context: Any) -> Any:
        for value in request.registers:
            if value.name == registers_pb2.REGISTER_NAME_CR0:
                raise Refused("register CR0", "WP is pinned", rule="registers.cr0")
            if value.name == registers_pb2.REGISTER_NAME_GDTR:
                self.registers.gdtr.CopyFrom(value.table)
            else:
                setattr(self.registers.registers, registers_pb2.RegisterName.Name(value.name)[14:].lower(), value.value)
        self.registers.msrs.extend(request.msrs)
        return vmm_pb2.SetRegistersResponse(state=self.registers)

    def ReadMemory(self, request: vmm_pb2.ReadMemoryRequest, context: Any) -> Any:
        assert request.size <= 1 << 20
        data = bytes(self.memory.get(at, 0) for at in range(request.gpa, request.gpa + request.size))
        return vmm_pb2.ReadMemoryResponse(data=data)

    def WriteMemory(self, request: vmm_pb2.WriteMemoryRequest, context: Any) -> Any:
        assert len(request.data) <= 1 << 20
        self.memory.update(enumerate(request.data, request.gpa))
        return vmm_pb2.WriteMemoryResponse()

    def Translate(self, request: vmm_pb2.TranslateRequest, context: Any) -> Any:
        """Virtual pages are the physical ones in odd order; above 1 MiB nothing is mapped."""
        return vmm_pb2.TranslateResponse(present=request.gva < 1 << 20, gpa=request.gva ^ 0x1000, page_size=4096)

    def Hijack(self, request: vmm_pb2.HijackRequest, context: Any) -> Any:
        self.memory.update(enumerate(request.code, request.code_gpa))
        return vmm_pb2.HijackResponse(before=self.registers)

    def SetUserspaceFilters(self, request: vmm_pb2.SetUserspaceFiltersRequest, context: Any) -> Any:
        return vmm_pb2.SetUserspaceFiltersResponse()

    def Inject(self, request: vmm_pb2.InjectRequest, context: Any) -> Any:
        return vmm_pb2.InjectResponse(machine=self._machine(request.vm))

    def ReadDisk(self, request: vmm_pb2.ReadDiskRequest, context: Any) -> Any:
        self._machine(request.vm)
        return vmm_pb2.ReadDiskResponse(data=bytes(request.size))

    def WriteDisk(self, request: vmm_pb2.WriteDiskRequest, context: Any) -> Any:
        self._machine(request.vm)
        return vmm_pb2.WriteDiskResponse()

    def WriteSerial(self, request: vmm_pb2.WriteSerialRequest, context: Any) -> Any:
        self._machine(request.vm)
        if request.data == b"lose\n":
            self.post(request.vm, lost={"count": 7})
        elif request.data == b"quit\n":
            self.post(request.vm, serial={"port": request.port, "data": b"bye\n"})
            self._move(request.vm, "stop", "the guest quit")
        else:
            for part in request.data.upper():
                self.post(request.vm, serial={"port": request.port, "data": bytes([part])})
        return vmm_pb2.WriteSerialResponse()

    def WatchEvents(self, request: vmm_pb2.WatchEventsRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        def wake() -> None:
            with self.changed:
                self.changed.notify_all()

        context.add_callback(wake)
        at = max(request.from_sequence - 1, 0)

        def more() -> bool:
            return len(self.log) > at or not context.is_active()

        while True:
            with self.changed:
                self.changed.wait_for(more)
                if not context.is_active():
                    return
                event = self.log[at]
            at += 1
            if event.vm == request.vm and (not request.kinds or event.kind in request.kinds or event.kind == 6):
                yield vmm_pb2.WatchEventsResponse(event=event)


class ToyMonitor(monitor_pb2_grpc.MonitorServiceServicer):
    """Takes any policy; its name tells which rules it was started with."""

    def __init__(self, rules: Any = None) -> None:
        self.rules = rules

    def GetPolicy(self, request: monitor_pb2.GetPolicyRequest, context: Any) -> Any:
        lines = [] if self.rules is None else [str(rule()) for rule in self.rules]
        return monitor_pb2.GetPolicyResponse(policy=monitor_pb2.PolicyStatus(rules=lines))

    def SetPolicy(self, request: monitor_pb2.SetPolicyRequest, context: Any) -> Any:
        return monitor_pb2.SetPolicyResponse(policy=monitor_pb2.PolicyStatus(text=request.text))

    def LockPolicy(self, request: monitor_pb2.LockPolicyRequest, context: Any) -> Any:
        return monitor_pb2.LockPolicyResponse(policy=monitor_pb2.PolicyStatus(locked=True))

    def CheckPolicy(self, request: monitor_pb2.CheckPolicyRequest, context: Any) -> Any:
        return monitor_pb2.CheckPolicyResponse(problems=[monitor_pb2.PolicyProblem(line=3, key="a", message="no")])

    def GetQuote(self, request: monitor_pb2.GetQuoteRequest, context: Any) -> Any:
        return monitor_pb2.GetQuoteResponse()

    def WatchVerdicts(self, request: monitor_pb2.WatchVerdictsRequest, context: Any) -> Iterator[Any]:
        yield monitor_pb2.WatchVerdictsResponse(rule="text")


def main(config: ServerConfig) -> None:
    """Serves the role of the configuration until SIGTERM."""
    role, _, fault = os.environ.get("VTLAB_TEST_FAULT", "").partition(":")
    if role == config.role and fault == "refuse":
        raise BadImage("toy", "refuses to start")
    if role == config.role and fault == "break":
        raise KeyError("toy")
    if role == config.role and fault == "die":
        os.write(2, b"toy: dying\n")
        os._exit(7)
    if role == config.role and fault == "hang":
        threading.Event().wait()

    def register(server: grpc.Server) -> None:
        if config.role == "vmm":
            vmm_pb2_grpc.add_VmmServiceServicer_to_server(ToyVmm(), server)
        if config.role == "monitor":
            monitor_pb2_grpc.add_MonitorServiceServicer_to_server(ToyMonitor(config.rules), server)

    serve(config, register).wait()
