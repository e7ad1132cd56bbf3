"""What enters the monitor: a VTL1 whose policy is in force, calls of its services, and exits of VTL0 to judge.

The VMM is not believed either: any Enter has to be survived. No answer may let through what the policy's pins forbid.
"""

from __future__ import annotations

import gc
import random
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from tests.fuzz.making import Maker
from tests.fuzz.target import Defect, Target
from tests.unit.monitor import kernel_image as image
from tests.unit.monitor import keys
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import Vtl0
from vtl1_monitor.service import VcpuService
from vtlab import vcpu_rpc
from vtlab.errors import VtlabError
from vtlab.ram import RamFile
from vtlab.run_messages import framed
from vtlab.services import HEKI_PAGE, HEKI_RANGE, Service
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import Enter, Exit, RunRequest
from vtlab.x86.registers import Cr0, Cr4, Efer

VPS = 2
_RENEW_AFTER = 5_000
_PLACES = [
    getattr(image, name) for name in ("TEXT", "PRIVILEGED", "RODATA", "DATA", "VTL1", "FREE", "PML4", "KERNEL_PT")
]
_PLACES += [image.RAM_SIZE - 8, image.RAM_SIZE, (1 << 64) - 8]
_KNOWN = {
    "vp_index": [*range(VPS)],
    "gpa": _PLACES,
    "gva": [image.KERNEL + place for place in _PLACES[:8]],
    "base": [image.KERNEL + place for place in _PLACES[:8]],
    "cr0": [0x80010031, 0x80000031, 0],
    "cr3": [image.PML4, image.FREE],
    "cr4": [0x300020 | 0x800, 0x20, 0],
    "efer": [0xD01, 0x501, 0],
    "index": [0xC0000080, 0xC0000082, 0xC0000102, 0x174, 0x176, 0x277],
}
_REASONS = [field.name for field in Exit.DESCRIPTOR.oneofs_by_name["reason"].fields][:-2]
_WEIGHTS = [
    10 if name in ("register_write", "msr", "memory_fault", "startup", "state_load", "sleep") else 1
    for name in _REASONS
]
# What the policy pins to 1, and to 0.
_PINS = {
    registers_pb2.REGISTER_NAME_CR0: (int(Cr0.PE | Cr0.PG | Cr0.WP), 0),
    registers_pb2.REGISTER_NAME_CR4: (int(Cr4.SMEP | Cr4.SMAP | Cr4.UMIP), int(Cr4.VMXE)),
    registers_pb2.REGISTER_NAME_EFER: (int(Efer.NXE | Efer.LME), 0),
}
_COMMITS = {vcpu_pb2.ACTION_COMMIT: False, vcpu_pb2.ACTION_REPLACE: True}


class EnterTarget(Target):
    """RunRequests to the monitor of a machine: parsed as on the stream, numbered right, mostly."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtlab-fuzz-")
        self._kernel = image.kernel(certificates=keys.der("module signer"))
        self._vtl0: Vtl0 | None = None
        self._rounds = self._steps = 0
        self._requests, self._enters = Maker(RunRequest, _KNOWN), Maker(Enter, _KNOWN)
        self._exits = Maker(Exit, _KNOWN)
        fields: Any = Exit.DESCRIPTOR.fields_by_name
        self._reasons = {name: Maker(fields[name].message_type._concrete_class, _KNOWN) for name in _REASONS}
        self._services = [*Service]

    def close(self) -> None:
        if self._vtl0 is not None:
            self._vtl0.close()
        self._folder.cleanup()

    def _renew(self, rng: random.Random) -> None:
        if self._vtl0 is not None:
            self._vtl0.close()
            gc.collect()  # what a closed machine leaves are cycles, which would pass for growth
        self._rounds += 1
        folder = Path(self._folder.name) / str(self._rounds)
        folder.mkdir()
        self._vtl0 = Vtl0(folder, self._kernel, vp_count=VPS)
        if rng.random() < 0.9:
            self._vtl0.lock(POLICY)

    def step(self, rng: random.Random) -> str:
        vtl0 = self._vtl0
        if vtl0 is None or self._steps % _RENEW_AFTER == 0 or (vtl0.machine.broken and rng.random() < 0.05):
            self._renew(rng)
            self._steps = 0
        self._steps += 1
        vtl0 = self._vtl0
        assert vtl0 is not None
        data = self._request(rng, vtl0)
        try:
            enter = vcpu_rpc._enter(data)
        except DecodeError:
            return "no message"
        reason = enter.reason
        serving: Any = vtl0.machine.serving
        if serving is not None and enter.vp_index != serving._vp_index:
            return "another vCPU waits for the service of this one"  # on a thread of its own, which there is not here
        ready = vtl0.machine.ready and vtl0.machine.end_of_boot
        try:
            (answer,) = VcpuService(vtl0.monitor).Run(iter([enter]), None)  # type: ignore[arg-type]
        except VtlabError:
            return f"{_name(reason)}: refused"
        exit_ = Exit.FromString(answer)
        if (exit_.sequence, exit_.vtl, exit_.vp_index) != (enter.sequence, 1, enter.vp_index):
            raise Defect(f"enter {enter.sequence} is answered with {exit_}")
        if ready:
            _check(enter, exit_)
        self._apply(vtl0, exit_)
        return f"{_name(reason)}: {exit_.WhichOneof('reason')}"

    def _request(self, rng: random.Random, vtl0: Vtl0) -> bytes:
        kind = rng.random()
        if kind < 0.1:
            return self._requests.data(rng, damaged=0.5)
        enter = Enter() if kind < 0.9 else self._enters.message(rng)
        serving: Any = vtl0.machine.serving
        vp_index = enter.vp_index = rng.randrange(VPS) if serving is None else serving._vp_index
        last = vtl0.monitor._sessions[vp_index].last
        enter.sequence = last + 1 if rng.random() < 0.97 else last + rng.choice((0, 2))
        if kind < 0.25:
            enter.reason, enter.status = vcpu_pb2.ENTER_REASON_RESUME, rng.choice((0, 0, 0, 5))
        elif kind < 0.5:
            self._call(rng, vtl0, enter)
        elif kind < 0.9:
            enter.reason = vcpu_pb2.ENTER_REASON_INTERCEPT
            enter.intercept.CopyFrom(self._exits.message(rng))
            (reason,) = rng.choices(_REASONS, _WEIGHTS)
            getattr(enter.intercept, reason).CopyFrom(self._reasons[reason].message(rng))
            if rng.random() < 0.1:
                enter.reason = rng.choice((vcpu_pb2.ENTER_REASON_CLIENT_WRITE, vcpu_pb2.ENTER_REASON_ENABLE))
        return framed(enter.SerializeToString())

    def _call(self, rng: random.Random, vtl0: Vtl0, enter: Enter) -> None:
        """A service, with something like its arguments in ordinary memory."""
        enter.reason = vcpu_pb2.ENTER_REASON_VTL_CALL
        registers = enter.registers
        registers.CopyFrom(vtl0.registers)
        registers.rdi = rng.choice(self._services) if rng.random() < 0.97 else rng.getrandbits(32)
        pa = image.FREE + rng.choice((0, 0, 0, 8, 4096 - 16))
        count = rng.choice((0, 1, 1, 2, 3, 127))
        if rng.random() < 0.7:
            rows = [
                HEKI_RANGE.pack(
                    rng.getrandbits(64), first, first + rng.choice((1, 64, 4096)) & (1 << 64) - 1, rng.randrange(9)
                )
                for first in rng.choices(_PLACES, k=min(count, 3))
            ]
            vtl0.write(pa, (HEKI_PAGE.pack(0, 0, count) + b"".join(rows))[: 4096 - pa % 4096])
        else:
            vtl0.write(pa, rng.randbytes(rng.choice((8, 24, 64)))[: 4096 - pa % 4096])
        registers.rsi = rng.choice((pa, pa, pa, *_PLACES, rng.getrandbits(64)))
        registers.rdx = rng.choice((count, count, 0, 64, *_PLACES, rng.getrandbits(64)))
        registers.r8 = rng.choice((0, 0, 1, 2, 3, rng.getrandbits(64)))

    @staticmethod
    def _apply(vtl0: Vtl0, exit_: Exit) -> None:
        """What the VMM does with what VTL1 wishes, as far as the page is there."""
        wanted = [*exit_.protect.protections]
        wanted += [update.protection for update in exit_.vtl_return.updates if update.HasField("protection")]
        for update in wanted:
            ends = [first + count for first, count in zip(update.runs[::2], update.runs[1::2], strict=True)]
            if ends and max(ends) * 4096 > image.RAM_SIZE:
                raise Defect(f"VTL1 asks for pages that are not there: {update}")
            vtl0.apply(update)

    def check(self) -> None:
        """Text is what it was as long as its page is sealed."""
        vtl0 = self._vtl0
        if vtl0 is not None and vtl0.file(image.PRIVILEGED) is RamFile.WRITABLE and vtl0.machine.ready:
            raise Defect("the page with the privileged code is writable though the policy holds")


def _check(enter: Enter, exit_: Exit) -> None:
    if enter.reason != vcpu_pb2.ENTER_REASON_INTERCEPT or not enter.intercept.HasField("register_write"):
        return
    write, resolution = enter.intercept.register_write, exit_.vtl_return.resolution
    replaced = _COMMITS.get(resolution.action)
    if write.name not in _PINS or replaced is None:
        return
    value = resolution.value if replaced else write.new_value
    ones, zeros = _PINS[write.name]
    old = write.old_value  # changes are judged: what INIT cleared is judged as a whole, where the trampoline ends
    if old & ones & ~value or value & zeros & ~old:
        raise Defect(f"VTL1 lets {value:#x} into register {write.name}: {exit_.vtl_return.resolution}")


def _name(reason: int) -> str:
    return vcpu_pb2.EnterReason.Name(reason) if reason in vcpu_pb2.EnterReason.values() else "another reason"  # type: ignore[arg-type]
