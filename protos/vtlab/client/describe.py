"""Events and exits in one line, for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vtlab.client.names import state_name
from vtlab.enums import name_of
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2


def _register_write(write: vcpu_pb2.RegisterWrite) -> str:
    name = name_of(registers_pb2.RegisterName, write.name).removeprefix("REGISTER_NAME_")
    if write.HasField("new_table"):
        old, new = write.old_table, write.new_table
        return f"{name} {old.base:#x}/{old.limit:#x} -> {new.base:#x}/{new.limit:#x}"
    return f"{name} {write.old_value:#x} -> {write.new_value:#x}"


def _msr(access: vcpu_pb2.MsrAccess) -> str:
    if not access.write:
        return f"RDMSR {access.index:#x}"
    return f"WRMSR {access.index:#x} {access.old_value:#x} -> {access.new_value:#x}"


def _memory_fault(fault: vcpu_pb2.MemoryFault) -> str:
    access = name_of(vcpu_pb2.AccessKind, fault.access).removeprefix("ACCESS_KIND_").lower()
    where = f"GPA {fault.gpa:#x}" + (f" GVA {fault.gva:#x}" if fault.HasField("gva") else "")
    return f"{access} {where}" + (" (walk)" if fault.page_walk else "") + (" (unmapped)" if fault.unmapped else "")


def _port(access: vcpu_pb2.PortAccess) -> str:
    return f"OUT {access.port:#x} = {access.value:#x}" if access.write else f"IN {access.port:#x}"


# field of the oneof Exit.reason -> its text; those not here are told by their name
_REASONS: dict[str, Callable[[Any], str]] = {
    "register_write": _register_write,
    "msr": _msr,
    "memory_fault": _memory_fault,
    "port": _port,
    "cpuid": lambda cpuid: f"CPUID {cpuid.leaf:#x}.{cpuid.subleaf:#x}",
    "shutdown": lambda shutdown: f"triple fault: {shutdown.cause}",
    "debug_exit": lambda debug: f"debug exit {debug.value:#x}",
    "reset_request": lambda reset: f"reset by {reset.source}",
    "power_off": lambda off: f"switched off by {off.source}",
    "failure": lambda failure: f"failure: {failure.message}",
    "vtl_return": lambda answer: f"VTL return {_resolution(answer.resolution)}",
    "invlpg": lambda page: f"INVLPG {page.gva:#x}",
}


def describe_exit(one: vcpu_pb2.Exit) -> str:
    """Why a vCPU exited, and where."""
    reason = one.WhichOneof("reason") or "nothing"
    text = _REASONS[reason](getattr(one, reason)) if reason in _REASONS else reason.replace("_", " ")
    if reason == "hypercall":
        text = f"hypercall {one.registers.rcx:#x}"
    return f"{text} at RIP {one.registers.rip:#x}"


def _resolution(resolution: vcpu_pb2.Resolution) -> str:
    action = name_of(vcpu_pb2.Action, resolution.action).removeprefix("ACTION_").lower()
    return action + (f" ({resolution.reason})" if resolution.reason else "")


def _state(machine: vmm_pb2.Machine) -> str:
    return state_name(machine.state) + (f": {machine.reason}" if machine.reason else "")


def _protection(update: vcpu_pb2.ProtectionUpdate) -> str:
    access = update.access
    rights = "".join(
        letter if allowed else "-"
        for letter, allowed in zip(
            "rwxu", (access.read, access.write, access.kernel_execute, access.user_execute), strict=True
        )
    )
    store = name_of(vcpu_pb2.PageStore, update.store).removeprefix("PAGE_STORE_").lower()
    return f"{sum(update.runs[1::2])} pages {rights} {store}" + (" page tables" if access.page_table else "")


def _device(event: vmm_pb2.DeviceEvent) -> str:
    refused = " refused" if event.refused else ""
    return f"{event.device}: {event.what} GPA {event.gpa:#x} size {event.size:#x}{refused}"


def _userspace_exit(exit_: vmm_pb2.UserspaceExit) -> str:
    name = exit_.WhichOneof("run") or "nothing"
    values = " ".join(f"{field.name}={value:#x}" for field, value in getattr(exit_, name, exit_).ListFields())
    return f"exit to userspace: {name} {values}".rstrip()


# field of the oneof Event.detail -> its text
_DETAILS: dict[str, Callable[[Any], str]] = {
    "state": _state,
    "exit": describe_exit,
    "verdict": lambda verdict: f"{_resolution(verdict.resolution)}: {describe_exit(verdict.exit)}",
    "serial": lambda serial: f"COM{serial.port + 1} {bytes(serial.data)!r}",
    "protection": _protection,
    "lost": lambda lost: f"{lost.count} events",
    "vtl_event": lambda event: f"{event.what} {event.code:#x}",
    "device": _device,
    "userspace_exit": _userspace_exit,
}


def detail(event: vmm_pb2.Event) -> str:
    """What an event says."""
    name = event.WhichOneof("detail")
    return _DETAILS[name](getattr(event, name)) if name in _DETAILS else ""
