"""VALIDATE_MODULE, FREE_MODULE_INIT, UNLOAD_MODULE: code that joins the kernel at run time.

Everything that will be executed, and the file itself, is sealed *before* it is looked at, and looked at in `ram.ro`.
"""

from __future__ import annotations

import errno
from itertools import pairwise

from vtl1_monitor import cms, rights
from vtl1_monitor.machine import Machine
from vtl1_monitor.module_file import COMPARED, BadModule, expected_sections, split
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.services.call import EKEYREJECTED, Call, Refused
from vtl1_monitor.services.heki_page import Range, check_disjoint, read_ranges
from vtl1_monitor.steps import Steps, protect
from vtl1_monitor.table_guard import MODULES
from vtlab.ram import PAGE_SIZE
from vtlab.services import MAX_MODULE_SIZE, ModuleType

_READ_ONLY = rights.READ | rights.SEALED
_TEXT = rights.READ | rights.KERNEL_EXECUTE | rights.SEALED

MAX_MODULES = 1024
_PADDING = bytes.maketrans(b"\x00\x90\xcc", b"\x00\x00\x00")
_INIT = (ModuleType.INIT_TEXT, ModuleType.INIT_DATA, ModuleType.INIT_RODATA)


def validate_module(call: Call) -> Steps:
    """(pa of heki_page, number of ranges, flags 0) -> token. On refusal all pages are ordinary memory again."""
    machine = call.machine
    if call.third:
        raise Refused(errno.EINVAL, f"flags {call.third:#x}")
    if len(machine.modules) >= MAX_MODULES:
        raise Refused(errno.ERANGE, f"{MAX_MODULES} modules are loaded")
    ranges = _by_type(call, read_ranges(machine.memory, call.first, call.second))
    if not machine.kdata.signers():
        raise Refused(errno.EACCES, "no certificate was loaded")
    sealed = [one.run for kind in (*COMPARED, ModuleType.ELF) for one in ranges.get(kind, ())]
    yield from protect(machine.memory, [Change(run, _READ_ONLY, MODULES) for run in sealed])
    try:
        _verify(call, ranges)
    except (BadModule, cms.BadSignature) as error:
        yield from protect(machine.memory, [machine.ordinary(run) for run in sealed])
        raise Refused(EKEYREJECTED, str(error)) from None
    changes = [Change(one.run, _TEXT, MODULES) for kind in COMPARED[:2] for one in ranges.get(kind, ())]
    changes += [machine.ordinary(one.run) for one in ranges[ModuleType.ELF]]
    yield from protect(machine.memory, changes)
    token = machine.next_token
    machine.next_token += 1
    machine.modules[token] = [
        (kind, one.run) for kind, several in ranges.items() if kind is not ModuleType.ELF for one in several
    ]
    return token


def free_module_init(call: Call) -> Steps:
    """(token): init memory becomes ordinary, ro_after_init read-only."""
    machine = call.machine
    parts = _module(call)
    changes = [machine.ordinary(run) for run in _sealed(machine, [run for kind, run in parts if kind in _INIT])]
    for kind, run in parts:
        if kind is ModuleType.RO_AFTER_INIT:
            pieces = machine.memory.pieces(run)
            writable = [piece for piece, code, _ in pieces if code & rights.STORE_MASK == rights.WRITABLE]
            changes += [Change(piece, _READ_ONLY, MODULES) for piece in writable]
    yield from protect(machine.memory, changes)
    machine.modules[call.first] = [(kind, run) for kind, run in parts if kind not in _INIT]
    return 0


def unload_module(call: Call) -> Steps:
    """(token): all memory of the module becomes ordinary."""
    machine = call.machine
    parts = _module(call)
    yield from protect(machine.memory, [machine.ordinary(run) for run in _sealed(machine, [run for _, run in parts])])
    del machine.modules[call.first]
    return 0


def _sealed(machine: Machine, runs: list[Run]) -> list[Run]:
    """What VTL1 sealed of them for the module. The rest was writable: VTL0 may have made page tables of it since."""
    return [piece for run in runs for piece, _, owner in machine.memory.pieces(run) if owner == MODULES]


def _module(call: Call) -> list[tuple[ModuleType, Run]]:
    parts = call.machine.modules.get(call.first)
    if parts is None:
        raise Refused(errno.ENOENT, f"no module {call.first}")
    return parts


def _by_type(call: Call, ranges: list[Range]) -> dict[ModuleType, list[Range]]:
    """The ranges, checked: ordinary memory, disjoint, one file and some code."""
    check_disjoint(ranges)
    result: dict[ModuleType, list[Range]] = {}
    taken = [run for parts in call.machine.modules.values() for _, run in parts]
    for one in ranges:
        try:
            kind = ModuleType(one.attributes)
        except ValueError:
            raise Refused(errno.EINVAL, f"module range type {one.attributes}") from None
        if one.pa % PAGE_SIZE:
            raise Refused(errno.EINVAL, f"module range {one.pa:#x} is not page-aligned")
        if kind is not ModuleType.ELF and one.va % PAGE_SIZE:
            raise Refused(errno.EINVAL, f"module range {one.pa:#x} is for {one.va:#x}, which is not page-aligned")
        if not call.machine.is_ordinary(one.run):
            raise Refused(errno.EACCES, f"module range {one.pa:#x}-{one.epa:#x} is not ordinary memory")
        if any(run.first < one.run.end and one.run.first < run.end for run in taken):
            raise Refused(errno.EACCES, f"module range {one.pa:#x}-{one.epa:#x} belongs to another module")
        result.setdefault(kind, []).append(one)
    for kind, several in result.items():
        for one, following in pairwise(several):
            if one.epa % PAGE_SIZE or (kind is not ModuleType.ELF and one.va + one.size != following.va):
                raise Refused(errno.EINVAL, f"ranges of type {kind.name} do not join at {one.epa:#x}")
    if ModuleType.ELF not in result or not (ModuleType.TEXT in result or ModuleType.INIT_TEXT in result):
        raise Refused(errno.EINVAL, "a module has a file and text")
    if sum(one.size for one in result[ModuleType.ELF]) > MAX_MODULE_SIZE:
        raise Refused(errno.ERANGE, f"module file is larger than {MAX_MODULE_SIZE} bytes")
    return result


def _verify(call: Call, ranges: dict[ModuleType, list[Range]]) -> None:
    """Raises BadModule or BadSignature. Reads sealed memory only."""
    machine = call.machine
    file = b"".join(machine.memory.sealed(one.pa, one.size) for one in ranges[ModuleType.ELF])
    module, signature = split(file)
    cms.verify(signature, module, machine.kdata.signers())
    addresses: dict[ModuleType, int] = {
        kind: several[0].va for kind, several in ranges.items() if kind is not ModuleType.ELF
    }
    for several in ranges.values():
        for one in several:
            _check_mapping(call, one)
    expected = expected_sections(module, addresses, machine.image.global_value)
    for kind in COMPARED:
        loaded = b"".join(
            machine.memory.sealed(one.run.first * PAGE_SIZE, one.run.pages * PAGE_SIZE) for one in ranges.get(kind, ())
        )
        wanted = expected.get(kind, b"")
        if loaded[: len(wanted)] != wanted:
            raise BadModule(f"loaded {kind.name.lower()} is not that of the file")
        if loaded[len(wanted) :].translate(_PADDING).strip(b"\0"):
            raise BadModule(f"there is more than padding behind {kind.name.lower()}")


def _check_mapping(call: Call, one: Range) -> None:
    """Where VTL0 maps the address already, it must be this memory: the code was relocated for it."""
    registers = call.registers
    translate = call.machine.memory.translator(
        cr0=registers.cr0, cr3=registers.cr3, cr4=registers.cr4, efer=registers.efer
    )
    if one.attributes == ModuleType.ELF:
        return
    for offset in range(0, one.size, PAGE_SIZE):
        gpa = translate(one.va + offset)
        if gpa is not None and gpa != one.pa + offset:
            raise BadModule(f"{one.va + offset:#x} is mapped at {gpa:#x}, not at {one.pa + offset:#x}")
