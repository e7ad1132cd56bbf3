"""Lists of ranges as LVBS has them: a chain of pages, each copied once."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

from vtl1_monitor.memory import GuestMemory
from vtl1_monitor.rights import Run
from vtl1_monitor.services.call import Refused
from vtlab.ram import PAGE_SIZE
from vtlab.services import HEKI_PAGE, HEKI_PAGE_RANGES, HEKI_RANGE, MAX_RANGES


class Range(NamedTuple):
    """Guest-virtual start, guest-physical start and end, meaning."""

    va: int
    pa: int
    epa: int
    attributes: int

    @property
    def size(self) -> int:
        return self.epa - self.pa

    @property
    def run(self) -> Run:
        """The pages, whole."""
        first = self.pa // PAGE_SIZE
        return Run(first, -(-self.epa // PAGE_SIZE) - first)


# Range._make without its check of the length, which the format gives: this runs for every range of a long list.
_RANGE = cast("Callable[[tuple[int, ...]], Range]", partial(tuple.__new__, Range))


def read_ranges(memory: GuestMemory, pa: int, total: int) -> list[Range]:
    """Copies a chain of `total` ranges out of VTL0's memory; nothing is read twice.

    Raises:
        Refused: -EINVAL for a malformed chain or range, -EFAULT for ranges outside RAM.
        GuestFault: a page of the chain is not readable by VTL0.
    """
    if not 1 <= total <= MAX_RANGES:
        raise Refused(errno.EINVAL, f"{total} ranges")
    ranges: list[Range] = []
    while pa:
        if pa % PAGE_SIZE:
            raise Refused(errno.EINVAL, f"heki_page at {pa:#x} is not page-aligned")
        page = memory.read(pa, PAGE_SIZE)
        _, next_pa, count = HEKI_PAGE.unpack_from(page)
        if not 1 <= count <= HEKI_PAGE_RANGES or len(ranges) + count > total:
            raise Refused(errno.EINVAL, f"heki_page at {pa:#x} has {count} ranges of {total}")
        ranges += map(_RANGE, HEKI_RANGE.iter_unpack(page[HEKI_PAGE.size :][: count * HEKI_RANGE.size]))
        pa = next_pa
    if len(ranges) != total:
        raise Refused(errno.EINVAL, f"the list has {len(ranges)} ranges, not {total}")
    size = memory.size
    for _, pa, epa, _ in ranges:
        if pa >= epa:
            raise Refused(errno.EINVAL, f"range {pa:#x}-{epa:#x} is empty")
        if epa > size:
            raise Refused(errno.EFAULT, f"range {pa:#x}-{epa:#x} is not RAM")
    return ranges


def check_disjoint(ranges: list[Range]) -> None:
    """Raises Refused (-EINVAL) if two ranges share a page."""
    last = 0
    for _, pa, epa, _ in ranges:
        if pa >> 12 < last:
            break
        last = epa + 0xFFF >> 12
    else:
        return  # they ascend, as lists do
    spans = sorted([(pa >> 12, epa + 0xFFF >> 12) for _, pa, epa, _ in ranges])
    for (_, end), (first, _) in pairwise(spans):
        if end > first:
            raise Refused(errno.EINVAL, f"two ranges share the page {first * PAGE_SIZE:#x}")
