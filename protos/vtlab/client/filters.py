"""Filters of design `cr-filter` that an owner of a machine would use."""

from __future__ import annotations

from vtlab.v1.vmm_pb2 import (
    FILTER_ANSWER_GENERAL_PROTECTION,
    FilterAnswer,
    FilterRange,
    FilterRule,
    RegisterFilter,
    UserspaceFilters,
)
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr

FILTERED = 4  # KVM_MSR_EXIT_REASON_FILTER
_WORD = 8  # bytes that bitmaps come in
_ENTRY_POINTS = (Msr.STAR, Msr.LSTAR, Msr.CSTAR, Msr.SFMASK)


def deny_writes(*indices: int) -> RegisterFilter:
    """A filter of writes to these registers, by default allow; one range a register, so at most 16."""
    return RegisterFilter(
        ranges=[FilterRange(write=True, base=index, count=1, bitmap=bytes(_WORD)) for index in indices]
    )


def pinning(answer: FilterAnswer.ValueType = FILTER_ANSWER_GENERAL_PROTECTION) -> UserspaceFilters:
    """What Heki pins, and system-call entry points and EFER besides: bits that are set stay set.

    It can be in force from the start, since it says nothing of bits that were never set.
    """
    rules = [
        FilterRule(name="CR0.WP stays", index=0, stays_set=int(Cr0.WP | Cr0.PE | Cr0.PG), answer=answer),
        FilterRule(name="CR4 stays", index=4, stays_set=int(Cr4.SMEP | Cr4.SMAP | Cr4.UMIP), answer=answer),
        FilterRule(
            name="EFER stays", msr=True, index=Msr.EFER, stays_set=int(Efer.NXE | Efer.LME | Efer.SCE), answer=answer
        ),
        *(
            FilterRule(name=f"{msr.name} frozen", msr=True, index=msr, frozen_once_set=True, answer=answer)
            for msr in _ENTRY_POINTS
        ),
    ]
    return UserspaceFilters(
        msr=deny_writes(Msr.EFER, *_ENTRY_POINTS),
        cr=deny_writes(0, 4),
        exit_reasons=FILTERED,
        rules=rules,
        keep_on_reset=True,
    )
