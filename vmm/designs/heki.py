"""Designs `heki-v3` and `heki-v2`: the guest pins bits of CR0 and CR4, and in v2 page rights, by KVM hypercalls.

What their authors left open stays open: pins only grow and survive RESET, RSM and INIT pass by them, userspace is told
but has no say, SVM does not check (option vendor=amd), and v2's page rights do not bind the devices of the host.
"""

from __future__ import annotations

import json
from typing import ClassVar

from vmm.board import Answer, Board
from vmm.designs import cr_pins, memory_list
from vmm.designs.cr_pins import Pins
from vmm.designs.kvm_abi import KvmCall
from vmm.designs.native import DENY, Hypercalls, Native
from vmm.processor import Processor
from vmm.vtl import VTL0, VTL1
from vtlab.errors import BadArgument
from vtlab.v1 import vcpu_pb2, vmm_pb2
from vtlab.v1.vcpu_pb2 import Exit, InterceptFilter, Resolution
from vtlab.v1.vmm_pb2 import HekiExit, MachineSpec, UserspaceExit

_COMMIT = Resolution(action=vcpu_pb2.ACTION_COMMIT)
_VENDORS = ("intel", "amd")


class HekiV3(Native):
    """Options.

    vendor: "intel" (default), or "amd" where KVM accepts pins and checks no write.
    configure, denial: masks of KVM_CAP_HEKI_CONFIGURE and KVM_CAP_HEKI_DENIAL, 1 CR0, 2 CR4; default 0, no exit.
    """

    options: ClassVar[tuple[str, ...]] = ("vendor", "configure", "denial")
    has_state = True

    def __init__(self, spec: MachineSpec) -> None:
        super().__init__(spec)
        vendor = spec.design_options.get("vendor", "intel")
        if vendor not in _VENDORS:
            raise BadArgument("option 'vendor'", f"must be {' or '.join(_VENDORS)}, not {vendor!r}")
        self._checks = vendor == "intel"
        self._configure = _mask(spec, "configure")
        self._denial = _mask(spec, "denial")
        self._pins = Pins()

    def save(self) -> bytes:
        return json.dumps(self._pins).encode()

    def restore(self, state: bytes) -> None:
        try:
            self._pins = Pins(*json.loads(state))
        except TypeError as error:
            raise ValueError(str(error)) from None

    def filter(self) -> InterceptFilter:
        wanted = super().filter()
        if self._checks:
            wanted.cr0_pinned, wanted.cr4_pinned = self._pins
        return wanted

    def lock_cr_update(self, board: Board, processor: Processor, call: KvmCall) -> int:
        """The pin holds before userspace is told of it."""
        number, pin, flags, _ = call.arguments
        lock = cr_pins.lock_cr(number, pin, flags)
        if lock.value == 0:
            old = self._pins
            grown = Pins(old.cr0 | lock.pin, old.cr4) if lock.number == 0 else Pins(old.cr0, old.cr4 | lock.pin)
            if grown != old:
                self._pins = grown
                board.watch_all(self.filter())
            reason = cr_pins.reason_of(lock.number)
            if self._configure & reason:
                told = UserspaceExit(heki_configure=HekiExit(reason=reason, value=lock.pin))
                tell_userspace(board, processor, told)
        return lock.value

    hypercalls: ClassVar[Hypercalls] = {cr_pins.LOCK_CR_UPDATE: lock_cr_update}

    def intercepted(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        found = cr_pins.denied(self._pins, exit_)
        if found is None:
            return processor.resume(_COMMIT)
        number, value = found
        missing = self._pins.of(number) & ~value
        resolution = Resolution(action=vcpu_pb2.ACTION_DENY, reason=f"CR{number}: clears pinned bits {missing:#x}")
        reason = cr_pins.reason_of(number)
        if self._denial & reason:
            tell_userspace(board, processor, UserspaceExit(heki_denial=HekiExit(reason=reason, value=value)))
        record_verdict(board, processor, exit_, resolution)
        return processor.resume(resolution)


class HekiV2(HekiV3):
    """Option besides: mbec=1, the host's MBEC, without which a missing EXEC is granted."""

    options: ClassVar[tuple[str, ...]] = (*HekiV3.options, "mbec")
    device_rights = VTL1  # a device model of the host writes what the guest protected

    def __init__(self, spec: MachineSpec) -> None:
        super().__init__(spec)
        self._pages = memory_list.PagePermissions(mbec=spec.design_options.get("mbec", "0") == "1")

    def save(self) -> bytes:
        return json.dumps([self._pins, self._pages.immutable]).encode()

    def restore(self, state: bytes) -> None:
        try:
            pins, pages = json.loads(state)
            self._pins = Pins(*pins)
            self._pages.immutable[:] = [memory_list.Range(*one) for one in pages]
        except TypeError as error:
            raise ValueError(str(error)) from None

    def reset(self) -> None:
        """The pins stay. The rights of pages go with the memory that they were of."""
        self._pages.forget()

    def protect_memory(self, board: Board, processor: Processor, call: KvmCall) -> int:
        return self._pages.protect(board, call.arguments[0])

    hypercalls: ClassVar[Hypercalls] = {**HekiV3.hypercalls, memory_list.PROTECT_MEMORY: protect_memory}

    def intercepted(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        if exit_.WhichOneof("reason") != "memory_fault":
            return super().intercepted(board, processor, exit_)
        fault = memory_list.page_fault(exit_)
        reason = f"page {exit_.memory_fault.gpa >> 12:#x}: no permission"
        resolution = Resolution(action=vcpu_pb2.ACTION_DENY, exception=fault, reason=reason) if fault else DENY
        record_verdict(board, processor, exit_, resolution)
        return processor.resume(resolution)


def _mask(spec: MachineSpec, option: str) -> int:
    """The argument of KVM_ENABLE_CAP. Raises BadArgument for other bits than REASONS, where KVM says EINVAL."""
    text = spec.design_options.get(option, "0")
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value & ~cr_pins.REASONS:
        raise BadArgument(f"option '{option}'", f"EINVAL: {text!r} has other bits than {cr_pins.REASONS:#x}")
    return value


def tell_userspace(board: Board, processor: Processor, exit_: UserspaceExit) -> None:
    board.events.record(vmm_pb2.EVENT_KIND_USERSPACE_EXIT, exit_, processor.index, VTL0, processor.resumed)


def record_verdict(board: Board, processor: Processor, exit_: Exit, resolution: Resolution) -> None:
    board.events.record(
        vmm_pb2.EVENT_KIND_VERDICT, (exit_, resolution), processor.index, VTL0, exit_.sequence, weight=512
    )
