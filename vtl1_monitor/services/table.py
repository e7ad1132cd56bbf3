"""Service number -> handler, and who may call what when."""

from __future__ import annotations

import errno

from vtl1_monitor.services.authentication import authenticate, challenge
from vtl1_monitor.services.boot import end_of_boot, lock_registers
from vtl1_monitor.services.call import Call, Handler, Refused, immediate
from vtl1_monitor.services.control_registers import write_control_register
from vtl1_monitor.services.hibernate import hibernate, restore
from vtl1_monitor.services.kexec import execute, validate
from vtl1_monitor.services.load_kdata import load_kdata
from vtl1_monitor.services.modules import free_module_init, unload_module, validate_module
from vtl1_monitor.services.patch_text import patch_text
from vtl1_monitor.services.protect_memory import protect_memory
from vtl1_monitor.services.take_policy import take_policy
from vtl1_monitor.services.upgrade import upgrade
from vtl1_monitor.services.write_page_table import write_page_table
from vtl1_monitor.steps import Steps
from vtlab.services import BOOT_ONLY, Service


def ping(_call: Call) -> int:
    """(): nothing."""
    return 0


HANDLERS: dict[Service, Handler] = {
    Service.TAKE_POLICY: take_policy,
    Service.WRITE_PAGE_TABLE: write_page_table,
    Service.WRITE_CONTROL_REGISTER: immediate(write_control_register),
    Service.CHALLENGE: immediate(challenge),
    Service.AUTHENTICATE: immediate(authenticate),
    Service.PING: immediate(ping),
    Service.LOCK_REGS: immediate(lock_registers),
    Service.SIGNAL_END_OF_BOOT: end_of_boot,
    Service.PROTECT_MEMORY: protect_memory,
    Service.LOAD_KDATA: immediate(load_kdata),
    Service.VALIDATE_MODULE: validate_module,
    Service.FREE_MODULE_INIT: free_module_init,
    Service.UNLOAD_MODULE: unload_module,
    Service.KEXEC_VALIDATE: validate,
    Service.KEXEC_EXECUTE: execute,
    Service.UPGRADE: immediate(upgrade),
    Service.HIBERNATE: hibernate,
    Service.RESTORE: restore,
    Service.PATCH_TEXT: immediate(patch_text),
}

_BY_NUMBER = {int(service): service for service in Service}
# Before a policy is taken.
_WITHOUT_POLICY = frozenset({Service.PING, Service.TAKE_POLICY, Service.RESTORE})
# What leaves VTL1 as it was when it was sealed for hibernation.
_STAYS_SEALED = frozenset({Service.PING, Service.HIBERNATE})


def serve(call: Call) -> Steps:
    """Runs a service, if it may be called now. Raises Refused, GuestFault, ProtectFailed."""
    machine = call.machine
    service = _BY_NUMBER.get(call.service)
    if service is None:
        raise Refused(errno.ENOSYS, "no such service")
    if not machine.taken and service not in _WITHOUT_POLICY:
        raise Refused(errno.EPERM, "no policy was taken")
    if machine.end_of_boot and service in BOOT_ONLY:
        if not machine.take_grant(service):
            raise Refused(errno.EPERM, "boot has ended")
    elif machine.taken and service not in machine.rules.services and not machine.take_grant(service):
        raise Refused(errno.ENOSYS, "the policy does not offer it")
    if machine.hibernation is not None and service not in _STAYS_SEALED:
        machine.tickets.void(machine.vm)
    return (yield from HANDLERS[service](call))
