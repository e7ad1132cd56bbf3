"""KEXEC_VALIDATE and KEXEC_EXECUTE: one kernel makes way for another that VTL1 has verified.

The image is sealed before it is looked at, and stays so. Executing is one step: VTL1 closes all memory to VTL0, so that
no vCPU and no device gets on, copies the kernel from the sealed bytes, wipes what is its own, and stands down with the
state that the kernel starts in. There is no moment at which protection is lifted and VTL0 runs.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable

from vtl1_monitor import cms, rights
from vtl1_monitor.kexec_image import (
    INFORMATION,
    INFORMATION_SIZE,
    LOW_END,
    BadKernel,
    Kernel,
    KexecModule,
    entry_state,
    information,
    read_kernel,
    read_modules,
)
from vtl1_monitor.machine import Machine, Successor
from vtl1_monitor.module_file import BadModule, split
from vtl1_monitor.policy.schema import Verified
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.services.call import EKEYREJECTED, Call, Refused
from vtl1_monitor.services.heki_page import Range, check_disjoint, read_ranges
from vtl1_monitor.steps import Steps, protect
from vtlab.ram import PAGE_SIZE, RamFile
from vtlab.services import MAX_KEXEC_SIZE, KexecType
from vtlab.v1 import vcpu_pb2

OWNER = "kexec image"
_CLOSED = "stand-down"
_READ_ONLY = rights.READ | rights.SEALED
_NAMES = {False: "kexec", True: "kdump"}


def validate(call: Call) -> Steps:
    """(pa of heki_page or 0, number of ranges, crash). On refusal all pages are ordinary memory again."""
    machine, crash = call.machine, _purpose(call, call.third)
    if not call.first:
        yield from _release(machine, crash)
        return 0
    ranges = read_ranges(machine.memory, call.first, call.second)
    yield from _release(machine, crash)
    kinds = _by_type(machine, ranges, crash)
    if not machine.kdata.signers():
        raise Refused(errno.EACCES, "no certificate was loaded")
    runs = [one.run for one in ranges]
    yield from protect(machine.memory, [Change(run, _READ_ONLY, OWNER) for run in runs])
    try:
        successor = _verify(machine, kinds, tuple(runs))
    except (BadKernel, BadModule, cms.BadSignature) as error:
        yield from protect(machine.memory, [machine.ordinary(run) for run in runs])
        raise Refused(EKEYREJECTED, str(error)) from None
    machine.successors[crash] = successor
    return 0


def execute(call: Call) -> Steps:
    """(crash): does not come back. -ENOENT without a validated image."""
    machine, crash = call.machine, _purpose(call, call.first)
    successor = machine.successors.get(crash)
    if successor is None:
        raise Refused(errno.ENOENT, f"no image was validated for {_NAMES[crash]}")
    file = _file(machine, successor)
    if hashlib.sha256(file).digest() != successor.sha256:
        raise Refused(errno.EBADMSG, "the sealed image is not what was validated")
    kernel = read_kernel(split(file).module, machine.memory.size)
    line = kernel.command_line
    if successor.kept is not None:
        gpa, size = successor.kept
        line += f" kept={gpa:#x}+{size:#x}@{kernel.first:#x}".encode()
    before = _readable(machine, kernel) if successor.kept is not None else b""
    low = information(line, successor.modules, machine.memory.size)
    yield from protect(machine.memory, [*_closed(machine), *_destinations(kernel)])
    machine.stand_down()
    machine.memory.write_sealed(kernel.first, kernel.image())
    machine.memory.write_sealed(INFORMATION, low.ljust(INFORMATION_SIZE, b"\0"))
    if successor.kept is not None:
        machine.memory.write_sealed(successor.kept[0], before)
    call.stand_down = _stand_down(machine, successor, kernel, crash)
    return 0


def _purpose(call: Call, crash: int) -> bool:
    """Raises Refused: -EINVAL for a number that is none, -EPERM where the policy does not want it."""
    if crash not in (0, 1):
        raise Refused(errno.EINVAL, f"crash {crash:#x}")
    lifecycle = call.machine.rules.lifecycle
    if (lifecycle.kdump if crash else lifecycle.kexec) is Verified.REFUSE:
        raise Refused(errno.EPERM, f"the policy refuses {_NAMES[bool(crash)]}")
    return bool(crash)


def _release(machine: Machine, crash: bool) -> Steps:
    """What was sealed for that purpose before is VTL0's again."""
    successor = machine.successors.pop(crash, None)
    if successor is not None:
        yield from protect(machine.memory, [machine.ordinary(run) for run in successor.runs])
    return 0


def _by_type(machine: Machine, ranges: list[Range], crash: bool) -> dict[KexecType, list[Range]]:
    """The ranges, checked: ordinary memory, disjoint, one list, a kernel, and for a crash kernel a place to keep."""
    check_disjoint(ranges)
    result: dict[KexecType, list[Range]] = {}
    for one in ranges:
        try:
            kind = KexecType(one.attributes)
        except ValueError:
            raise Refused(errno.EINVAL, f"kexec range type {one.attributes}") from None
        if one.pa % PAGE_SIZE:
            raise Refused(errno.EINVAL, f"kexec range {one.pa:#x} is not page-aligned")
        if not machine.is_ordinary(one.run):
            raise Refused(errno.EACCES, f"kexec range {one.pa:#x}-{one.epa:#x} is not ordinary memory")
        result.setdefault(kind, []).append(one)
    lists, kept = result.get(KexecType.KIMAGE, []), result.get(KexecType.PAGES, [])
    if len(lists) != 1 or lists[0].size > PAGE_SIZE or KexecType.KERNEL not in result or len(kept) != crash:
        raise Refused(errno.EINVAL, "an image has a list of at most a page, a kernel, and for crash one place to keep")
    if sum(one.size for one in result[KexecType.KERNEL]) > MAX_KEXEC_SIZE:
        raise Refused(errno.ERANGE, f"kernel image is larger than {MAX_KEXEC_SIZE} bytes")
    return result


def _verify(machine: Machine, kinds: dict[KexecType, list[Range]], runs: tuple[Run, ...]) -> Successor:
    """Raises BadKernel, BadModule or BadSignature. Reads sealed memory only."""
    file = b"".join(machine.memory.sealed(one.pa, one.size) for one in kinds[KexecType.KERNEL])
    signed, signature = split(file)
    cms.verify(signature, signed, machine.kdata.signers())
    kernel = read_kernel(signed, machine.memory.size)
    minimum = machine.rules.lifecycle.minimum_kernel_version
    if kernel.version < minimum:
        raise BadKernel(f"kernel version {kernel.version} is older than {minimum}")
    (listed,) = kinds[KexecType.KIMAGE]
    modules = read_modules(machine.memory.sealed(listed.pa, listed.size))
    needed = [one.run for kind in (KexecType.KERNEL, KexecType.PAGES) for one in kinds.get(kind, ())]
    _check_places(machine, kernel, modules, needed)
    kept = [(one.pa, one.size) for one in kinds.get(KexecType.PAGES, [])]
    if kept and kept[0][1] < kernel.end - kernel.first:
        raise BadKernel(f"{kept[0][1]:#x} bytes are too few to keep what the kernel lies on")
    places = tuple((one.pa, one.size) for one in kinds[KexecType.KERNEL])
    return Successor(runs, places, hashlib.sha256(file).digest(), modules, kept[0] if kept else None)


def _check_places(machine: Machine, kernel: Kernel, modules: Iterable[KexecModule], runs: list[Run]) -> None:
    """Nothing that the next kernel needs may be where it is put itself."""
    for run in runs:
        first, end = run.first * PAGE_SIZE, run.end * PAGE_SIZE
        if first < LOW_END or (first < kernel.end and kernel.first < end):
            raise BadKernel(f"image at {first:#x}-{end:#x} lies where the kernel goes")
    for module in modules:
        if not LOW_END <= module.start < module.end <= machine.memory.size:
            raise BadKernel(f"module at {module.start:#x}-{module.end:#x} is not RAM above 1 MiB")
        if module.start < kernel.end and kernel.first < module.end:
            raise BadKernel(f"module at {module.start:#x}-{module.end:#x} lies where the kernel goes")
    if len(information(kernel.command_line, list(modules), machine.memory.size)) > INFORMATION_SIZE - 64:
        raise BadKernel("command lines are too long")


def _file(machine: Machine, successor: Successor) -> bytes:
    return b"".join(machine.memory.sealed(gpa, size) for gpa, size in successor.file)


def _closed(machine: Machine) -> list[Change]:
    """All memory without any right for VTL0, each page in the file that it is in."""
    whole = Run(0, machine.memory.pages)
    return [Change(run, code & rights.STORE_MASK, _CLOSED) for run, code, _ in machine.memory.pieces(whole)]


def _destinations(kernel: Kernel) -> list[Change]:
    """Where the kernel and its information go: in the file that VTL0's process cannot write."""
    places = [(kernel.first, kernel.end), (INFORMATION, INFORMATION + INFORMATION_SIZE)]
    return [
        Change(Run(first // PAGE_SIZE, (end - first) // PAGE_SIZE), rights.SEALED, _CLOSED) for first, end in places
    ]


def _readable(machine: Machine, kernel: Kernel) -> bytes:
    """What VTL0 had where the kernel goes: zeros for VTL1's own."""
    views = machine.memory.ram.views
    files = {rights.WRITABLE: RamFile.WRITABLE, rights.SEALED: RamFile.SEALED}
    parts = []
    for run, code, _ in machine.memory.pieces(Run(kernel.first // PAGE_SIZE, (kernel.end - kernel.first) // PAGE_SIZE)):
        file = files.get(code & rights.STORE_MASK)
        first, end = run.first * PAGE_SIZE, run.end * PAGE_SIZE
        parts.append(views[file][first:end] if file is not None else bytes(end - first))
    return b"".join(parts)


def _stand_down(machine: Machine, successor: Successor, kernel: Kernel, crash: bool) -> vcpu_pb2.StandDown:
    """The signed file's part that is the ELF file, as places in memory."""
    file = split(_file(machine, successor)).module
    places: list[int] = []
    skip, left = kernel.offset, len(file) - kernel.offset
    for gpa, size in successor.file:
        used = min(max(size - skip, 0), left)
        if used:
            places += [gpa + skip, used]
        skip, left = max(skip - size, 0), left - used
    return vcpu_pb2.StandDown(
        entry=entry_state(kernel.entry),
        image=places,
        image_sha256=hashlib.sha256(file[kernel.offset :]).digest(),
        reason=f"{_NAMES[crash]} to kernel version {kernel.version}",
    )
