"""PROTECT_MEMORY: the guest takes rights from its own pages while it boots. It can only tighten the policy."""

from __future__ import annotations

import errno

from vtl1_monitor import rights
from vtl1_monitor.rights import Change
from vtl1_monitor.services.call import Call, Refused
from vtl1_monitor.services.heki_page import Range, check_disjoint, read_ranges
from vtl1_monitor.steps import Steps, protect
from vtl1_monitor.table_guard import MODULES
from vtlab.ram import PAGE_SIZE
from vtlab.services import Rights

OWNER = "services"

# Plain integers: this runs for every range of a long list.
_READ, _WRITE, _EXECUTE = int(Rights.READ), int(Rights.WRITE), int(Rights.EXECUTE)
_KNOWN = _READ | _WRITE | _EXECUTE


def protect_memory(call: Call) -> Steps:
    """(pa of heki_page, number of ranges). All ranges are judged before any is applied."""
    memory = call.machine.memory
    ranges = read_ranges(memory, call.first, call.second)
    check_disjoint(ranges)
    judged: dict[tuple[int, int, str], tuple[int, str]] = {}  # a long list asks the same of like pages
    changes = []
    for one in ranges:
        _check(one)
        for run, code, owner in memory.pieces(one.run):
            question = one.attributes, code, owner
            answer = judged.get(question)
            if answer is None:
                answer = judged[question] = _judge(run, *question)
            changes.append(Change(run, *answer))
    yield from protect(memory, changes)
    return 0


def _check(one: Range) -> None:
    """Raises Refused for a range that no policy could allow."""
    va, pa, epa, wanted = one
    if (va | pa | epa) % PAGE_SIZE:
        raise Refused(errno.EINVAL, f"range {pa:#x}-{epa:#x} is not page-aligned")
    if wanted & ~_KNOWN or not wanted & _READ:
        raise Refused(errno.EINVAL, f"range {pa:#x}-{epa:#x} has attributes {wanted:#x}")
    if wanted & _WRITE and wanted & _EXECUTE:
        raise Refused(errno.EACCES, f"range {pa:#x}-{epa:#x} would be writable and executable")


def _judge(run: rights.Run, wanted: int, code: int, owner: str) -> tuple[int, str]:
    """New code and owner of pages. Raises Refused if that would relax what holds, naming the run."""
    if code & rights.STORE_MASK == rights.PRIVATE or code & rights.PAGE_TABLE or owner == MODULES:
        raise Refused(errno.EACCES, f"{_place(run)} is {rights.access_text(code)}, rule '{owner}'")
    asked = _asked(wanted)
    if asked & ~code:
        raise Refused(errno.EACCES, f"{_place(run)} is {rights.access_text(code)} by rule '{owner}': cannot be relaxed")
    # As in LVBS, EXECUTE is about the kernel; user programs keep what the policy gives them.
    new = asked | code & rights.USER_EXECUTE | (rights.WRITABLE if wanted & _WRITE else rights.SEALED)
    return new, owner if new == code else OWNER


def _asked(wanted: int) -> int:
    """The rights that the attributes name."""
    asked = rights.READ if wanted & _READ else 0
    asked |= rights.WRITE if wanted & _WRITE else 0
    return asked | (rights.KERNEL_EXECUTE if wanted & _EXECUTE else 0)


def _place(run: rights.Run) -> str:
    return f"{run.first * PAGE_SIZE:#x}-{run.end * PAGE_SIZE:#x}"
