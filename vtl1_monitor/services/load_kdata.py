"""LOAD_KDATA: certificates and the patch list, from memory that is sealed and measured. Nothing else is believed."""

from __future__ import annotations

import errno
from collections.abc import Callable

from vtl1_monitor.cms import load_certificates
from vtl1_monitor.machine import Machine
from vtl1_monitor.services.call import ENOTSUP, Call, Refused
from vtl1_monitor.services.heki_page import Range, read_ranges
from vtl1_monitor.services.patch_text import NOPS
from vtlab.ram import PAGE_SIZE
from vtlab.services import PATCH_RECORD, KdataType

MAX_SIZE = 1 << 20
"""Bytes of one range."""


def load_kdata(call: Call) -> int:
    """(pa of heki_page, number of ranges). Ranges before a refused one stay loaded."""
    machine = call.machine
    for one in read_ranges(machine.memory, call.first, call.second):
        loader = _LOADERS.get(one.attributes)
        if loader is None:
            raise Refused(ENOTSUP, f"kdata type {one.attributes}")
        loader(machine, _measured(machine, one))
    return 0


def load_section_kdata(machine: Machine) -> None:
    """Loads what the policy names by section; resolve() made sure that measured rules cover it."""
    if machine.rules.certificates is not None:
        _certificates(machine, machine.memory.sealed(*machine.rules.certificates))
    if machine.rules.patches is not None:
        _patches(machine, machine.memory.sealed(*machine.rules.patches))


def _measured(machine: Machine, one: Range) -> bytes:
    if one.size > MAX_SIZE:
        raise Refused(errno.ERANGE, f"{one.size} bytes of kdata")
    for rule in machine.rules.memory:
        first, last = rule.run.first * PAGE_SIZE, rule.run.end * PAGE_SIZE
        if rule.measured and first <= one.pa and one.epa <= last and machine.memory.is_sealed(one.pa, one.size):
            return machine.memory.sealed(one.pa, one.size)
    raise Refused(errno.EACCES, f"{one.pa:#x}-{one.epa:#x} is in no sealed and measured memory")


def _certificates(machine: Machine, data: bytes) -> None:
    try:
        machine.kdata.certificates += load_certificates(data)
    except ValueError as error:
        raise Refused(errno.EINVAL, f"certificates: {error}") from None


def _revoked(machine: Machine, data: bytes) -> None:
    try:
        revoked = {(one.issuer.public_bytes(), one.serial_number) for one in load_certificates(data)}
    except ValueError as error:
        raise Refused(errno.EINVAL, f"revoked certificates: {error}") from None
    machine.kdata.revoked |= revoked


def _patches(machine: Machine, data: bytes) -> None:
    for start in range(0, len(data) - PATCH_RECORD.size + 1, PATCH_RECORD.size):
        record = data[start : start + PATCH_RECORD.size]
        if not any(record):
            continue
        address, zero, size, code = PATCH_RECORD.unpack(record)
        gpa = machine.image.gpa(address, size) if 1 <= size <= len(code) and not zero else None
        if gpa is None or not machine.memory.is_sealed(gpa, size):
            raise Refused(errno.EINVAL, f"patch record {start // PATCH_RECORD.size}: {address:#x} is no sealed text")
        allowed = machine.kdata.patches.setdefault((gpa, size), set())
        allowed |= {code[:size], machine.image.expected(gpa, size), NOPS[size]}


_LOADERS: dict[int, Callable[[Machine, bytes], None]] = {
    KdataType.SYSTEM_CERTIFICATES: _certificates,
    KdataType.REVOCATION_CERTIFICATES: _revoked,
    KdataType.PATCH_INFO: _patches,
}
