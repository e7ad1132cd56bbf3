"""How rows say what they do: hypercalls and registers as lists of steps. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias, TypeVar

from vtlab.hyperv.hypercalls import PARTITION_SELF, VP_SELF, HypercallCode, encode_input_value
from vtlab.hyperv.layouts import RegisterAssociation, VpHeader
from vtlab.hyperv.status import HvStatus
from vtlab_conformance import code as machine_code
from vtlab_conformance.layout import AFTER, BEFORE, code_page, input_page, output_page, report
from vtlab_conformance.steps import NO_VECTOR, Put, Row, Run, See, Step

C = HypercallCode
S = HvStatus
VTL0_TARGET: Final = 0x10
VTL1_TARGET: Final = 0x11
VECTORS: Final = 128
"""Offset of XMM0 in a block of registers."""
UD, GP, PF = 6, 13, 14
ALL: Final = (1 << 64) - 1

T = TypeVar("T")
Part: TypeAlias = Step | list[Step]


class By:
    """The expectations of one profile: `by(tlfs, openvmm, kvm)` takes its own."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self._number = ("tlfs", "openvmm", "kvm").index(profile)

    def __call__(self, tlfs: T, openvmm: T, kvm: T) -> T:
        return (tlfs, openvmm, kvm)[self._number]

    def only(self, *profiles: str) -> bool:
        return self.profile in profiles


def flat(parts: Iterable[Part]) -> tuple[Step, ...]:
    return tuple(step for part in parts for step in ([part] if isinstance(part, Step) else part))


def row(name: str, section: str, rule: str, source: str, *parts: Part) -> Row:
    return Row(name, section, rule, source, flat(parts))


def call(
    code: int,
    data: bytes = b"",
    status: HvStatus = S.SUCCESS,
    *,
    reps: int | None = None,
    vtl: int = 0,
    vp: int = 0,
    fast: bool = False,
    count: int = 0,
    start: int = 0,
    words: int = 0,
    output: bytes = b"",
    mask: bytes = b"",
    at: int | None = None,
    out: int | None = None,
    bits: int = 0,
    together: bool = True,
) -> list[Step]:
    """A hypercall, its status, and what it must leave in the output page or, fast, in XMM registers.

    Args:
        data: all of the input.
        reps: completed by then; without it all that were asked for on success, else `start`.
        count, start, words: rep count, rep start index, 64-bit words of the variable header.
        at, out: where input and output lie, if not in the pages for that.
        bits: more bits of the input value.
        together: False: nobody waits for the vCPU.
    """
    where = {"vtl": vtl, "vp": vp, "together": together}
    value = bits | encode_input_value(code, fast=fast, variable_header=words, rep_count=count, rep_start=start)
    completed = reps if reps is not None else (count if not status else start)
    steps: list[Step] = []
    if fast:
        low, high = struct.unpack("<QQ", data[:16].ljust(16, b"\0"))
        if data[16:]:
            steps.append(Put(at=report(vtl, vp) + BEFORE + VECTORS, data=data[16:], **where))
        place = report(vtl, vp) + AFTER + VECTORS + max(0, -(-len(data) // 16) * 16 - 16)
    else:
        low, high = input_page(vp) if at is None else at, output_page(vp) if out is None else out
        if data:
            steps.append(Put(at=low, data=data, **where))
        if output:
            steps.append(Put(at=high, data=b"\xee" * len(output), **where))
        place = high
    steps.append(
        Run(
            page=True,
            rcx=value,
            rdx=low,
            r8=high,
            mask=ALL,
            value=status | completed << 32,
            code=code,
            status=status,
            **where,
        )
    )
    if output:
        steps.append(See(at=place, value=output, mask=mask, **where))
    return steps


def header(partition: int = PARTITION_SELF, vp_index: int = VP_SELF, vtl: int = 0) -> bytes:
    """Start of the calls that name a VP and a level."""
    return VpHeader(partition, vp_index, vtl).encode()


def get(
    name: int,
    value: int | None = None,
    status: HvStatus = S.SUCCESS,
    *,
    mask: int = (1 << 128) - 1,
    target: int = 0,
    partition: int = PARTITION_SELF,
    vp_index: int = VP_SELF,
    vtl: int = 0,
    vp: int = 0,
) -> list[Step]:
    """HvCallGetVpRegisters of one register; `value` of 128 bits under `mask`."""
    output = b"" if value is None else value.to_bytes(16, "little")
    return call(
        C.GET_VP_REGISTERS,
        header(partition, vp_index, target) + struct.pack("<I", name),
        status,
        count=1,
        output=output,
        mask=mask.to_bytes(16, "little") if output else b"",
        vtl=vtl,
        vp=vp,
    )


def put(
    name: int,
    value: int,
    status: HvStatus = S.SUCCESS,
    *,
    target: int = 0,
    partition: int = PARTITION_SELF,
    vp_index: int = VP_SELF,
    vtl: int = 0,
    vp: int = 0,
) -> list[Step]:
    """HvCallSetVpRegisters of one register."""
    data = header(partition, vp_index, target) + RegisterAssociation(name, value).encode()
    return call(C.SET_VP_REGISTERS, data, status, count=1, vtl=vtl, vp=vp)


def protect(
    pages: Sequence[int],
    flags: int,
    status: HvStatus = S.SUCCESS,
    *,
    reps: int | None = None,
    target: int = 0,
    partition: int = PARTITION_SELF,
    vtl: int = 1,
) -> list[Step]:
    """HvCallModifyVtlProtectionMask of pages by number."""
    data = struct.pack("<QIB3x", partition, flags, target) + struct.pack(f"<{len(pages)}Q", *pages)
    return call(C.MODIFY_VTL_PROTECTION_MASK, data, status, reps=reps, count=len(pages), vtl=vtl)


def run(
    code: bytes,
    value: int | None = None,
    *,
    mask: int = ALL,
    vector: int = NO_VECTOR,
    rcx: int = 0,
    rdx: int = 0,
    r8: int = 0,
    rax: int = 0,
    vtl: int = 0,
    vp: int = 0,
    together: bool = True,
) -> list[Step]:
    """Machine code (vtlab_conformance.code), the value of RAX after it, and the exception that ends it."""
    where = {"vtl": vtl, "vp": vp, "together": together}
    return [
        Put(at=code_page(vp), data=code, **where),
        Run(
            address=code_page(vp),
            rcx=rcx,
            rdx=rdx,
            r8=r8,
            rax=rax,
            mask=0 if value is None else mask,
            value=value or 0,
            vector=vector,
            **where,
        ),
    ]


def read_msr(
    index: int, value: int | None = None, *, mask: int = ALL, vector: int = NO_VECTOR, vtl: int = 0, vp: int = 0
) -> list[Step]:
    return run(machine_code.RDMSR, value, mask=mask, vector=vector, rcx=index, vtl=vtl, vp=vp)


def write_msr(index: int, value: int, *, vector: int = NO_VECTOR, vtl: int = 0, vp: int = 0) -> list[Step]:
    return run(machine_code.WRMSR, vector=vector, rcx=index, r8=value, vtl=vtl, vp=vp)
