"""Which role may call which RPC. One table for all servers; what is not in it is denied to all."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Who a process is, as its certificate says (URI vtlab://role/NAME)."""

    VMM = "vmm"
    GUEST = "guest"
    MONITOR = "monitor"
    OPERATOR = "operator"
    OBSERVER = "observer"


_VMM = frozenset({Role.VMM})
_OPERATOR = frozenset({Role.OPERATOR})
_CLIENTS = frozenset({Role.OPERATOR, Role.OBSERVER})
_NOT_THE_GUEST = frozenset({Role.VMM, Role.MONITOR, Role.OPERATOR, Role.OBSERVER})

# RPC -> roles. The VMM alone enters vCPUs; the operator commands; the observer looks; the guest calls nobody, since
# whoever breaks out of the emulator holds its certificate.
RPC_ROLES: dict[str, frozenset[Role]] = {
    "vtlab.v1.VcpuService/Attach": _VMM,
    "vtlab.v1.VcpuService/Reconnect": _VMM,
    "vtlab.v1.VcpuService/Detach": _VMM,
    "vtlab.v1.VcpuService/Run": _VMM,
    "vtlab.v1.VcpuService/Kick": _VMM,
    "vtlab.v1.VcpuService/GetState": _VMM,
    "vtlab.v1.VcpuService/Events": _VMM,
    "vtlab.v1.VmmService/UploadImage": _OPERATOR,
    "vtlab.v1.VmmService/CreateMachine": _OPERATOR,
    "vtlab.v1.VmmService/StartMachine": _OPERATOR,
    "vtlab.v1.VmmService/PauseMachine": _OPERATOR,
    "vtlab.v1.VmmService/ResumeMachine": _OPERATOR,
    "vtlab.v1.VmmService/StopMachine": _OPERATOR,
    "vtlab.v1.VmmService/ResetMachine": _OPERATOR,
    "vtlab.v1.VmmService/DestroyMachine": _OPERATOR,
    "vtlab.v1.VmmService/GetMachine": _CLIENTS,
    "vtlab.v1.VmmService/ListMachines": _CLIENTS,
    "vtlab.v1.VmmService/GetRegisters": _CLIENTS,
    "vtlab.v1.VmmService/SetRegisters": _OPERATOR,
    "vtlab.v1.VmmService/ReadMemory": _CLIENTS,
    "vtlab.v1.VmmService/WriteMemory": _OPERATOR,
    "vtlab.v1.VmmService/Translate": _CLIENTS,
    "vtlab.v1.VmmService/Hijack": _OPERATOR,
    "vtlab.v1.VmmService/GuardMachine": _OPERATOR,
    "vtlab.v1.VmmService/SetUserspaceFilters": _OPERATOR,
    "vtlab.v1.VmmService/WriteSerial": _OPERATOR,
    "vtlab.v1.VmmService/Inject": _OPERATOR,
    "vtlab.v1.VmmService/ReadDisk": _OPERATOR,
    "vtlab.v1.VmmService/WriteDisk": _OPERATOR,
    "vtlab.v1.VmmService/WatchEvents": _CLIENTS,
    "vtlab.v1.MonitorService/GetPolicy": _CLIENTS,
    "vtlab.v1.MonitorService/SetPolicy": _OPERATOR,
    "vtlab.v1.MonitorService/LockPolicy": _OPERATOR,
    "vtlab.v1.MonitorService/CheckPolicy": _CLIENTS,
    "vtlab.v1.MonitorService/WatchVerdicts": _CLIENTS,
    "vtlab.v1.MonitorService/GetQuote": _CLIENTS,
    "grpc.health.v1.Health/Check": _NOT_THE_GUEST,
    "grpc.health.v1.Health/List": _NOT_THE_GUEST,
    "grpc.health.v1.Health/Watch": _NOT_THE_GUEST,
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _CLIENTS,
}

# A server may also be asked this with its own certificate: a container checks its own health and holds no other key.
OPEN_TO_ITSELF = frozenset({"grpc.health.v1.Health/Check"})


def may_call(rpc: str, caller: Role | None, server: Role) -> bool:
    """True if a peer of that role may call that RPC ("package.Service/Method") of a server of that role."""
    if caller is None:
        return False
    return caller in RPC_ROLES.get(rpc, frozenset()) or (caller is server and rpc in OPEN_TO_ITSELF)
