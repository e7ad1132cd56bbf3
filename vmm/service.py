"""VmmService: every method only forwards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import grpc

from vmm import client_access
from vmm.guarding import guard
from vmm.machines import Machines
from vmm.states import Operation
from vtlab import raw_rpc
from vtlab.run_messages import repeated
from vtlab.v1 import vmm_pb2, vmm_pb2_grpc

_NAME = vmm_pb2.DESCRIPTOR.services_by_name["VmmService"].full_name
_EVENT, _EVENTS = (vmm_pb2.WatchEventsResponse.DESCRIPTOR.fields_by_name[name].number for name in ("event", "events"))


class VmmService(vmm_pb2_grpc.VmmServiceServicer):
    """Errors leave as VtlabError; the server's gate turns them into statuses."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    def UploadImage(
        self, request_iterator: Iterator[vmm_pb2.UploadImageRequest], context: grpc.ServicerContext
    ) -> vmm_pb2.UploadImageResponse:
        sha256, size = self._machines.images.add(request.chunk for request in request_iterator)
        return vmm_pb2.UploadImageResponse(sha256=sha256, size=size)

    def CreateMachine(
        self, request: vmm_pb2.CreateMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.CreateMachineResponse:
        return vmm_pb2.CreateMachineResponse(machine=self._machines.create(request.vm, request.spec).describe())

    def StartMachine(
        self, request: vmm_pb2.StartMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.StartMachineResponse:
        return vmm_pb2.StartMachineResponse(machine=self._machines.get(request.vm).start())

    def PauseMachine(
        self, request: vmm_pb2.PauseMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.PauseMachineResponse:
        return vmm_pb2.PauseMachineResponse(machine=self._machines.get(request.vm).pause())

    def ResumeMachine(
        self, request: vmm_pb2.ResumeMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.ResumeMachineResponse:
        return vmm_pb2.ResumeMachineResponse(machine=self._machines.get(request.vm).resume())

    def StopMachine(
        self, request: vmm_pb2.StopMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.StopMachineResponse:
        return vmm_pb2.StopMachineResponse(machine=self._machines.get(request.vm).stop())

    def ResetMachine(
        self, request: vmm_pb2.ResetMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.ResetMachineResponse:
        return vmm_pb2.ResetMachineResponse(machine=self._machines.get(request.vm).reset())

    def DestroyMachine(
        self, request: vmm_pb2.DestroyMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.DestroyMachineResponse:
        self._machines.destroy(request.vm)
        return vmm_pb2.DestroyMachineResponse()

    def GetMachine(
        self, request: vmm_pb2.GetMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.GetMachineResponse:
        return vmm_pb2.GetMachineResponse(machine=self._machines.get(request.vm).describe())

    def ListMachines(
        self, request: vmm_pb2.ListMachinesRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.ListMachinesResponse:
        return vmm_pb2.ListMachinesResponse(machines=[machine.describe() for machine in self._machines.all()])

    def GetRegisters(
        self, request: vmm_pb2.GetRegistersRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.GetRegistersResponse:
        with self._machines.get(request.vm).doing(Operation.GET_REGISTERS, parked=True) as board:
            return vmm_pb2.GetRegistersResponse(state=client_access.get_registers(board, request.vp_index))

    def SetRegisters(
        self, request: vmm_pb2.SetRegistersRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.SetRegistersResponse:
        with self._machines.get(request.vm).doing(Operation.SET_REGISTERS, parked=True) as board:
            state = client_access.set_registers(board, request.vp_index, request.registers, request.msrs)
            return vmm_pb2.SetRegistersResponse(state=state)

    def ReadMemory(
        self, request: vmm_pb2.ReadMemoryRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.ReadMemoryResponse:
        with self._machines.get(request.vm).doing(Operation.READ_MEMORY) as board:
            return vmm_pb2.ReadMemoryResponse(data=client_access.read_memory(board, request.gpa, request.size))

    def WriteMemory(
        self, request: vmm_pb2.WriteMemoryRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.WriteMemoryResponse:
        with self._machines.get(request.vm).doing(Operation.WRITE_MEMORY) as board:
            client_access.write_memory(board, request.gpa, request.data)
            return vmm_pb2.WriteMemoryResponse()

    def Translate(self, request: vmm_pb2.TranslateRequest, context: grpc.ServicerContext) -> vmm_pb2.TranslateResponse:
        with self._machines.get(request.vm).doing(Operation.TRANSLATE, parked=True) as board:
            return client_access.translate(board, request.vp_index, request.gva)

    def Hijack(self, request: vmm_pb2.HijackRequest, context: grpc.ServicerContext) -> vmm_pb2.HijackResponse:
        return vmm_pb2.HijackResponse(before=self._machines.get(request.vm).hijack(request))

    def GuardMachine(
        self, request: vmm_pb2.GuardMachineRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.GuardMachineResponse:
        machine = self._machines.get(request.vm)
        with machine.doing(Operation.GUARD, parked=True) as board:
            guard(board)
        return vmm_pb2.GuardMachineResponse(machine=machine.describe())

    def SetUserspaceFilters(
        self, request: vmm_pb2.SetUserspaceFiltersRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.SetUserspaceFiltersResponse:
        with self._machines.get(request.vm).doing(Operation.SET_FILTERS) as board:
            board.design.set_filters(board, request.filters)
        return vmm_pb2.SetUserspaceFiltersResponse()

    def WriteSerial(
        self, request: vmm_pb2.WriteSerialRequest, context: grpc.ServicerContext
    ) -> vmm_pb2.WriteSerialResponse:
        with self._machines.get(request.vm).doing(Operation.WRITE_SERIAL) as board:
            client_access.write_serial(board, request.port, request.data)
            return vmm_pb2.WriteSerialResponse()

    def Inject(self, request: vmm_pb2.InjectRequest, context: grpc.ServicerContext) -> vmm_pb2.InjectResponse:
        machine = self._machines.get(request.vm)
        if request.WhichOneof("event") == "machine_check":
            return vmm_pb2.InjectResponse(machine=machine.check(request.vp_index, request.machine_check))
        with machine.doing(Operation.INJECT) as board:
            client_access.inject_nmi(board, request.vp_index)
        return vmm_pb2.InjectResponse(machine=machine.describe())

    def ReadDisk(self, request: vmm_pb2.ReadDiskRequest, context: grpc.ServicerContext) -> vmm_pb2.ReadDiskResponse:
        with self._machines.get(request.vm).doing(Operation.READ_DISK) as board:
            data = client_access.read_disk(board, request.offset, request.size)
            return vmm_pb2.ReadDiskResponse(data=data)

    def WriteDisk(self, request: vmm_pb2.WriteDiskRequest, context: grpc.ServicerContext) -> vmm_pb2.WriteDiskResponse:
        with self._machines.get(request.vm).doing(Operation.WRITE_DISK) as board:
            client_access.write_disk(board, request.offset, request.data)
            return vmm_pb2.WriteDiskResponse()

    def WatchEvents(  # type: ignore[override]
        self, request: vmm_pb2.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Serialized answers: an event is serialized once for all its readers."""
        events = self._machines.get(request.vm).events
        if request.until_now:
            batches = events.batches(request.kinds, request.from_sequence)
        else:
            batches = events.watch(request.from_sequence, request.kinds, context.is_active)
        for batch in batches:
            if request.batches:
                yield repeated(_EVENTS, batch)
            else:
                yield from (repeated(_EVENT, [event]) for event in batch)


def add_to_server(servicer: VmmService, server: grpc.Server) -> None:
    """Adds the service; see WatchEvents."""
    watch: raw_rpc.Handler = grpc.unary_stream_rpc_method_handler(
        cast(Any, servicer.WatchEvents), vmm_pb2.WatchEventsRequest.FromString, response_serializer=None
    )
    generated = partial(vmm_pb2_grpc.add_VmmServiceServicer_to_server, servicer)
    raw_rpc.add_to_server(server, _NAME, generated, {"WatchEvents": watch})
