"""VTL0 and its VMM as VTL1 meets them: memory files, VTL calls, and protections applied as the VMM applies them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.unit.monitor import kernel_image as image
from vtl1_monitor.machine import Machine
from vtl1_monitor.monitor import Monitor
from vtlab.ram import PAGE_SIZE, Ram, RamFile, create_ram_files
from vtlab.services import HEKI_PAGE, HEKI_PATCH, HEKI_RANGE, Service
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer

CR0 = int(Cr0.PE | Cr0.PG | Cr0.WP | Cr0.NE | Cr0.ET)
CR4 = int(Cr4.PAE | Cr4.SMEP | Cr4.SMAP | Cr4.UMIP)
EFER = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE)

_FILE = {
    vcpu_pb2.PAGE_STORE_WRITABLE: RamFile.WRITABLE,
    vcpu_pb2.PAGE_STORE_SEALED: RamFile.SEALED,
    vcpu_pb2.PAGE_STORE_PRIVATE: RamFile.PRIVATE,
}


def boot_image(directory: Path) -> vcpu_pb2.BootImage:
    """What VTL1 is told of the image that was booted."""
    return vcpu_pb2.BootImage(path="image", sha256=hashlib.sha256((directory / "image").read_bytes()).digest())


class Result(NamedTuple):
    """What VTL0 gets from a VTL call."""

    value: int
    returned: vcpu_pb2.VtlReturn


class Vtl0:
    """One machine of one vCPU.

    Attributes:
        registers: VTL0's at the next call.
        access, store: page -> what the VMM programmed last.
        protect_status: what the VMM answers to the next Protect.
        state: VTL0's whole state, where VTL1 asks for it.
        before_resume: called when a Protect was applied, with its number from 1: the moment of a race.
    """

    def __init__(
        self, directory: Path, kernel: image.KernelImage, rules: tuple[object, ...] = (), vp_count: int = 1
    ) -> None:
        create_ram_files(directory, image.RAM_SIZE)
        (directory / "image").write_bytes(kernel.elf())
        self.ram = Ram(directory, image.RAM_SIZE, "vmm")
        self.registers = registers_pb2.Registers(cr0=CR0, cr3=image.PML4, cr4=CR4, efer=EFER)
        self.access: dict[int, vcpu_pb2.PageAccess] = {}
        self.store: dict[int, RamFile] = {}
        self.protect_status = 0
        self.protects = 0
        self.state = registers_pb2.ProcessorState()
        self.before_resume: Callable[[int], object] = lambda _number: None
        kernel.load(self.write)
        image.build_page_tables(self.write)
        self.monitor = Monitor(rules)  # type: ignore[arg-type]
        self.monitor.attach(
            vcpu_pb2.AttachRequest(
                vm="vm",
                generation=1,
                vtl=1,
                vp_count=vp_count,
                ram_size=image.RAM_SIZE,
                memory_directory=str(directory),
                image=boot_image(directory),
            )
        )
        self._sequence = [0] * vp_count

    @property
    def machine(self) -> Machine:
        return self.monitor._require("vm")

    def close(self) -> None:
        self.monitor.close()
        self.ram.close()

    # ------------------------------------------------------------------------------------------- memory

    def file(self, gpa: int) -> RamFile:
        return self.store.get(gpa // PAGE_SIZE, RamFile.WRITABLE)

    def write(self, gpa: int, data: bytes) -> None:
        """As VTL0 would, without asking for rights: only ram.rw is writable to its process."""
        self.ram.views[RamFile.WRITABLE][gpa : gpa + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        """From the file that backs the first page."""
        return self.ram.views[self.file(gpa)][gpa : gpa + size]

    def rights(self, gpa: int) -> str:
        """VTL0's rights on a page as text: r, w, k, u, t, -."""
        access = self.access.get(gpa // PAGE_SIZE)
        if access is None:
            return "rwku"
        bits = (("r", access.read), ("w", access.write), ("k", access.kernel_execute), ("u", access.user_execute))
        return "".join(letter for letter, value in bits if value) + ("t" if access.page_table else "")

    def apply(self, update: vcpu_pb2.ProtectionUpdate) -> None:
        """Moves pages between files and notes rights, as the VMM does with every vCPU stopped."""
        target = _FILE[update.store]
        for first, count in zip(update.runs[::2], update.runs[1::2], strict=True):
            for gfn in range(first, first + count):
                source = self.store.get(gfn, RamFile.WRITABLE)
                if source is not target:
                    place = slice(gfn * PAGE_SIZE, (gfn + 1) * PAGE_SIZE)
                    data = bytes(PAGE_SIZE) if source is RamFile.PRIVATE else self.ram.views[source][place]
                    self.ram.views[target][place] = data
                    if RamFile.PRIVATE in (source, target):
                        self.ram.views[source][place] = bytes(PAGE_SIZE)
                self.store[gfn] = target
                self.access[gfn] = update.access

    # ------------------------------------------------------------------------------------------- entering VTL1

    def enter(self, reason: vcpu_pb2.EnterReason.ValueType, vp_index: int = 0, **fields: object) -> vcpu_pb2.Exit:
        self._sequence[vp_index] += 1
        enter = vcpu_pb2.Enter(vp_index=vp_index, sequence=self._sequence[vp_index], reason=reason, **fields)  # type: ignore[arg-type]
        return vcpu_pb2.Exit.FromString(self.monitor.run(enter))

    def call(self, service: int, first: int = 0, second: int = 0, third: int = 0, vp_index: int = 0) -> Result:
        """A VTL call, with all that the VMM does for it."""
        self.registers.rdi, self.registers.rsi, self.registers.rdx, self.registers.r8 = service, first, second, third
        exit_ = self.enter(vcpu_pb2.ENTER_REASON_VTL_CALL, vp_index, registers=self.registers)
        while exit_.WhichOneof("reason") in ("protect", "state_request"):
            if exit_.HasField("state_request"):
                exit_ = self.enter(vcpu_pb2.ENTER_REASON_RESUME, vp_index, state=self.state)
                continue
            if not self.protect_status:
                for update in exit_.protect.protections:
                    self.apply(update)
            self.protects += 1
            self.before_resume(self.protects)
            exit_ = self.enter(vcpu_pb2.ENTER_REASON_RESUME, vp_index, status=self.protect_status)
        returned = exit_.vtl_return
        values = [u.register.value for u in returned.updates if u.register.name == registers_pb2.REGISTER_NAME_R8]
        assert len(values) == 1
        return Result(values[0] - (1 << 64) if values[0] >> 63 else values[0], returned)

    def intercept(self, **reason: object) -> vcpu_pb2.VtlReturn:
        """VTL0 does something that exits; VTL1's answer, its protections applied."""
        exit_ = vcpu_pb2.Exit(origin=vcpu_pb2.ORIGIN_VCPU, registers=self.registers, **reason)  # type: ignore[arg-type]
        returned = self.enter(vcpu_pb2.ENTER_REASON_INTERCEPT, intercept=exit_).vtl_return
        for update in returned.updates:
            if update.HasField("protection"):
                self.apply(update.protection)
        return returned

    # ------------------------------------------------------------------------------------------- arguments

    def take_policy(self, text: str) -> Result:
        """The text in ordinary memory, then TAKE_POLICY."""
        data = text.encode()
        self.write(image.FREE, data)
        return self.call(Service.TAKE_POLICY, image.FREE, len(data))

    def lock(self, text: str) -> None:
        """The whole sequence; every step must succeed."""
        assert self.take_policy(text).value == 0, self.log()
        assert self.call(Service.LOCK_REGS).value == 0, self.log()
        assert self.call(Service.SIGNAL_END_OF_BOOT).value == 0, self.log()

    def ranges(self, rows: list[tuple[int, int, int, int]], pa: int = image.FREE) -> tuple[int, int]:
        """Writes one heki_page; its address and number of ranges."""
        self.write(pa, HEKI_PAGE.pack(0, 0, len(rows)) + b"".join(HEKI_RANGE.pack(*row) for row in rows))
        return pa, len(rows)

    def patch(self, target: int, code: bytes, second: int = 0, pa: int = image.FREE) -> Result:
        self.write(pa, HEKI_PATCH.pack(target, second, len(code), code))
        return self.call(Service.PATCH_TEXT, pa, 0)

    def log(self) -> list[str]:
        """Reasons of all verdicts, oldest first."""
        return [f"{row.rule}: {row.resolution.reason}" for row in self.machine.verdicts.kept()]
